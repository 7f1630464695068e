"""`fastpeft finetune` from rows to an adapter: what is written, what is refused, and a run that was interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tiny import rows, write_rows
from safetensors.torch import load_file

QUICK = ("--batch", 4, "--lr", 1e-2, "--r", 4, "--samples", 1, "--max-new-tokens", 4, "--device", "cpu")


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text("utf-8"))


@pytest.fixture
def run(fastpeft_command: Callable, tiny_model: Path, data: Path, tmp_path: Path) -> Callable:
    def finetune(name: str, *arguments: object, code: int = 0, source: Path = data) -> Path:
        fastpeft_command(
            *("finetune", "--model", tiny_model, "--data", source, "--out", tmp_path / name, *QUICK, *arguments),
            code=code,
        )
        return tmp_path / name

    return finetune


def test_an_adapter_that_peft_reads(run: Callable, tiny_model: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fastpeft

    out = run("out", "--epochs", 3, "--eval-split", 0.25, "--prompt", "hello how are you")
    ids = torch.arange(4, 24).view(2, 10)
    ours, theirs = (
        module.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out).eval()
        for module in (fastpeft, peft)
    )
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    found = metrics(out)
    summary = found["summary"]
    assert found["status"] == "finished" and summary["steps"] == summary["max_steps"] == 15
    assert [row["step"] for row in found["train"]] == list(range(1, 16))
    assert found["train"][-1]["tokens"] == summary["tokens"] == 3 * found["data"]["tokens_per_epoch"]
    assert [row["step"] for row in found["eval"]] == [0, 15]
    assert summary["final_loss"] < summary["first_loss"] and summary["final_eval_loss"] < summary["first_eval_loss"]
    assert found["samples"][0]["prompt"] == "hello how are you" and {"before", "after"} <= set(found["samples"][0])


@pytest.mark.parametrize("kind", ["text", "instruction", "txt"])
def test_other_rows(run: Callable, tmp_path: Path, kind: str) -> None:
    source = tmp_path / ("a.txt" if kind == "txt" else "a.jsonl")
    text = "the cat sat on a mat and then it ran " * 20
    if kind == "txt":
        source.write_text(text)
    else:
        row = {"text": text} if kind == "text" else {"instruction": "how are you", "output": "fine thanks"}
        write_rows(source, [row] * 8)
    out = run("out", "--steps", 2, "--max-length", 32, source=source)
    assert metrics(out)["summary"]["steps"] == 2 and (out / "adapter_model.safetensors").exists()


def test_options_reach_the_adapter(run: Callable) -> None:
    out = run(
        "out",
        "--steps",
        1,
        "--alpha",
        3,
        "--dropout",
        0.1,
        "--target-modules",
        "q_proj,v_proj",
        "--rslora",
        "--no-patch",
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 3, 0.1, True)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"] and config["task_type"] == "CAUSAL_LM"
    assert {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")} == {"q_proj", "v_proj"}


def test_gradient_checkpointing_gives_the_same_adapter(run: Callable) -> None:
    options = ("--steps", 3, "--dropout", 0.1)
    plain = load_file(run("plain", *options) / "adapter_model.safetensors")
    thrifty = load_file(run("thrifty", *options, "--gradient-checkpointing") / "adapter_model.safetensors")
    for name, value in plain.items():
        torch.testing.assert_close(thrifty[name], value, msg=name)


def test_interrupted_and_resumed_is_the_same_run(
    run: Callable, fastpeft_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpeft.cli.training import TrainingDisplay

    pressed_at = [2, 6]  # inside the first epoch, and at the end of the second
    options = ("--epochs", 3, "--grad-accum", 2, "--dropout", 0.1, "--eval-split", 2, "--eval-steps", 3)
    whole = run("whole", *options)

    on_step_end = TrainingDisplay.on_step_end

    def press_ctrl_c(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in pressed_at:
            pressed_at.remove(state.global_step)
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "on_step_end", press_ctrl_c)
        broken = run("broken", *options, code=130)
        assert metrics(broken)["status"] == "interrupted" and not (broken / "adapter_config.json").exists()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        before = metrics(broken)["samples"][0]["before"]
        (broken / "checkpoints" / "checkpoint-99").mkdir()  # one whose writing was cut short
        first = fastpeft_command("finetune", "--resume", "--out", broken, code=130).output
        second = fastpeft_command("finetune", "--resume", "--out", broken).output
    assert not pressed_at and not (broken / "checkpoints" / "checkpoint-99").exists()
    assert "checkpoint-2" in first.replace("\n", "") and "checkpoint-6" in second.replace("\n", "")

    mine, theirs = metrics(broken), metrics(whole)
    assert mine["train"] == theirs["train"] and mine["eval"] == theirs["eval"] and len(mine["train"]) == 9
    assert mine["samples"] == theirs["samples"] and mine["samples"][0]["before"] == before
    resumed = load_file(broken / "adapter_model.safetensors")
    for name, value in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(resumed[name], value), name


def test_a_run_killed_after_its_last_step_is_completed(run: Callable, fastpeft_command: Callable) -> None:
    out = run("out", "--steps", 2)
    wanted = (out / "adapter_model.safetensors").read_bytes()
    assert "nothing to continue" in fastpeft_command("finetune", "--resume", "--out", out).output.replace("\n", " ")
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json"):
        (out / name).unlink()
    fastpeft_command("finetune", "--resume", "--out", out)
    assert (out / "adapter_model.safetensors").read_bytes() == wanted
    assert metrics(out)["status"] == "finished" and len(metrics(out)["train"]) == 2


WITHOUT_PEFT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec


def without_peft(name, *rest, **more):
    return None if name.split(".")[0] == "peft" else find(name, *rest, **more)


PathFinder.find_spec = staticmethod(without_peft)
from fastpeft.cli.app import main
main()
"""


def test_without_peft(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The Trainer still takes the model for an adapted one: its checkpoints hold the adapter only."""
    out = tmp_path / "out"
    arguments = ("finetune", "--model", tiny_model, "--data", data, "--out", out, "--steps", 2, *QUICK)
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PeftWarning" not in done.stderr
    files = {path.name for path in (out / "checkpoints" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def test_what_a_resumed_run_may_not_change(run: Callable, fastpeft_command: Callable, data: Path) -> None:
    out = run("out", "--steps", 1)
    said = fastpeft_command("finetune", "--resume", "--out", out, "--lr", 0.5, code=2).output
    assert "--lr 0.5 differs from the run being resumed (0.01)" in said
    (out / "metrics.json").unlink()  # as if killed before the end
    write_rows(data, rows(25))
    assert "has changed since the run" in fastpeft_command("finetune", "--resume", "--out", out, code=2).output.replace(
        "\n", " "
    )
    said = fastpeft_command("finetune", "--resume", "--out", out.parent / "nothing", code=2).output
    assert "nothing to resume" in said


def test_a_finished_run_is_not_overwritten(run: Callable) -> None:
    out = run("out", "--steps", 1)
    before = (out / "adapter_model.safetensors").read_bytes()
    run("out", "--steps", 2, code=2)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    run("out", "--steps", 2, "--overwrite")
    assert metrics(out)["summary"]["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "/no/such/model"), "/no/such/model: no such folder"),
        (("--data", "nothing.jsonl"), "nothing.jsonl: no such file"),
        (("--target-modules", "nope"), "nope"),
        (("--chat-template", "nothing.jinja"), "nothing.jinja"),
        (("--eval-split", "500"), "--eval-split 500"),
        (("--max-length", "4096"), "4096 is more than the model's 128"),
    ],
)
def test_mistakes_get_a_sentence(
    fastpeft_command: Callable, tiny_model: Path, data: Path, tmp_path: Path, arguments: tuple, said: str
) -> None:
    given = ("--model", tiny_model, "--data", data, "--out", tmp_path / "out", "--steps", 1, *QUICK)
    output = fastpeft_command("finetune", *given, *arguments, code=2).output
    assert output.startswith("error: ") and said in output and "Traceback" not in output


def test_model_and_data_are_needed(fastpeft_command: Callable, tmp_path: Path) -> None:
    assert "--model is missing" in fastpeft_command("finetune", "--out", tmp_path, code=2).output


def test_a_loss_that_is_no_number_stops_the_run(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.cli.training import RowTrainer

    compute = RowTrainer.compute_loss
    monkeypatch.setattr(RowTrainer, "compute_loss", lambda *args, **kwargs: compute(*args, **kwargs) * float("nan"))
    assert not (run("out", "--steps", 3, code=2) / "adapter_config.json").exists()


def test_optimizer_and_checkpointing_by_name(
    fastpeft_command: Callable[..., Any], tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """Checkpointing changes no number; bitsandbytes' optimizers train."""
    losses = []
    for number, extra in enumerate([(), ("--checkpoint", "mlp"), ("--checkpoint", "block", "--no-patch")]):
        out = tmp_path / str(number)
        common = ("--model", tiny_model, "--data", data, "--out", out, "--steps", 3, "--samples", 0, "--device", "cpu")
        fastpeft_command("finetune", *common, *extra)
        losses.append([row["loss"] for row in json.loads((out / "metrics.json").read_text())["train"]])
    assert losses[0] == losses[1] and losses[2] == pytest.approx(losses[0], rel=1e-4)
    common = ("--model", tiny_model, "--data", data, "--steps", 2, "--samples", 0, "--device", "cpu")
    if importlib.util.find_spec("bitsandbytes"):
        fastpeft_command("finetune", *common, "--out", tmp_path / "eight", "--optim", "adamw_8bit")
        told = fastpeft_command("finetune", *common, "--out", tmp_path / "paged", "--optim", "paged_adamw_8bit", code=2)
        assert "need a CUDA GPU" in told.output
