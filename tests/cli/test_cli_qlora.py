"""`fastpeft finetune --method qlora` and what `fastpeft merge` makes of its adapter."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")

QUICK = ("--method", "qlora", "--batch", 4, "--lr", 1e-2, "--r", 4, "--samples", 1, "--max-new-tokens", 4)


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text("utf-8"))


@pytest.fixture
def run(fastpeft_command: Callable, tiny_model_of_blocks: Path, data: Path, tmp_path: Path) -> Callable:
    def finetune(name: str, *arguments: object, code: int = 0) -> Path:
        given = ("--model", tiny_model_of_blocks, "--data", data, "--out", tmp_path / name, "--device", "cpu")
        fastpeft_command("finetune", *given, *QUICK, *arguments, code=code)
        return tmp_path / name

    return finetune


@pytest.fixture
def adapter(run: Callable) -> Path:
    return run("adapter", "--steps", 6, "--eval-split", 0.25)


def quantised(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def test_trains_samples_and_saves_an_adapter_that_peft_reads(adapter: Path, tiny_model_of_blocks: Path) -> None:
    import peft

    import fastpeft.cli.models

    found = metrics(adapter)
    summary = found["summary"]
    assert found["status"] == "finished" and summary["steps"] == 6
    assert summary["final_loss"] < summary["first_loss"] and summary["final_eval_loss"] < summary["first_eval_loss"]
    assert {"prompt", "before", "after"} <= set(found["samples"][0])
    assert found["patched"]["left"] == 0, found["patched"]
    plain = fastpeft.cli.models.load_model(str(tiny_model_of_blocks), torch.float32)
    elements = sum(p.numel() for p in plain.parameters())  # not the bytes that 4-bit weights are kept in
    assert found["parameters"]["total"] == elements + found["parameters"]["trainable"]
    files = {path.name for path in (adapter / "checkpoints" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    ids = torch.arange(4, 44).view(2, 20)
    ours, theirs = (
        library.PeftModel.from_pretrained(quantised(tiny_model_of_blocks), adapter).eval()
        for library in (fastpeft, peft)
    )
    x = ours.get_input_embeddings()(ids).detach().requires_grad_()  # else bitsandbytes' own way in evaluation is bf16's
    torch.testing.assert_close(ours(inputs_embeds=x).logits, theirs(inputs_embeds=x).logits, atol=1e-5, rtol=0)


def test_interrupted_and_resumed_is_the_same_run(
    run: Callable, fastpeft_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastpeft.cli.training import TrainingDisplay

    options = ("--steps", 4, "--dropout", 0.1, "--gradient-checkpointing")
    whole = run("whole", *options)
    on_step_end = TrainingDisplay.on_step_end

    def press_ctrl_c(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "on_step_end", press_ctrl_c)
        broken = run("broken", *options, code=130)
    fastpeft_command("finetune", "--resume", "--out", broken)
    assert metrics(broken)["train"] == metrics(whole)["train"]
    resumed = load_file(broken / "adapter_model.safetensors")
    for name, value in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(resumed[name], value), name


def test_merged_three_ways(
    adapter: Path, tiny_model_of_blocks: Path, tmp_path: Path, fastpeft_command: Callable
) -> None:
    from transformers import AutoModelForCausalLM

    import fastpeft

    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        trained = fastpeft.PeftModel.from_pretrained(quantised(tiny_model_of_blocks), adapter).eval()(ids).logits

    def merged(into: str, *more: object) -> tuple[Any, str]:
        given = ("merge", "--adapter", adapter, "--out", tmp_path / into, "--into", into)
        said = " ".join(fastpeft_command(*given, *more).output.replace("│", " ").split())
        return AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype=torch.float32).eval(), said

    with torch.no_grad():
        model, said = merged("decoded")
        assert not getattr(model, "is_quantized", False) and "4 bits" not in said
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-5, rtol=1e-5)

        model, said = merged("4bit")
        assert model.is_loaded_in_4bit and "quantising moved the sums by" in said
        lost = (model(ids).logits - trained).norm() / trained.norm()
        assert 1e-4 < lost < 0.5

        model, said = merged("base")
        assert not getattr(model, "is_quantized", False) and "--into decoded gives the model that was trained" in said
        lost = (model(ids).logits - trained).norm() / trained.norm()
        assert 1e-4 < lost < 0.5


def test_a_base_that_is_stored_in_4_bits_needs_a_word(
    adapter: Path, tiny_model_of_blocks: Path, tmp_path: Path, fastpeft_command: Callable
) -> None:
    from transformers import AutoModelForCausalLM

    quantised(tiny_model_of_blocks).save_pretrained(tmp_path / "stored")
    given = ("merge", "--adapter", adapter, "--model", tmp_path / "stored", "--out", tmp_path / "merged")
    said = fastpeft_command(*given, code=2).output.replace("\n", " ")
    assert "stored quantised" in said and "--into" in said and not (tmp_path / "merged").exists()
    fastpeft_command(*given, "--into", "decoded")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)


def test_without_bitsandbytes_it_says_what_to_install(
    data: Path, tiny_model_of_blocks: Path, tmp_path: Path, fastpeft_command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    given = ("--model", tiny_model_of_blocks, "--data", data, "--out", tmp_path / "out", "--steps", 1, *QUICK)
    said = fastpeft_command("finetune", *given, code=2).output.replace("\n", " ")
    assert "--method qlora needs bitsandbytes" in said and "pip install" in said
