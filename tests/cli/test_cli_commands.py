"""`fastpeft merge`, `doctor` and `bench`, and how quickly the help comes."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft.cli import bench, contenders, doctor
from fastpeft.cli.console import console
from fastpeft.cli.products import Products


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merged_is_base_and_adapter(
    fastpeft_command: Callable, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fastpeft_command("merge", "--adapter", adapter, "--out", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(4, 24).view(2, 10)
    plain = base(ids).logits
    wanted = fastpeft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template

    assert (
        "is not empty" in fastpeft_command("merge", "--adapter", adapter, "--out", tmp_path / "merged", code=2).output
    )
    fastpeft_command(
        *("merge", "--adapter", adapter, "--out", tmp_path / "merged", "--model", tiny_model),
        *("--dtype", "bfloat16", "--overwrite"),
    )
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").parameters()).dtype == torch.bfloat16


def test_merge_of_what_is_no_adapter(fastpeft_command: Callable, tmp_path: Path, tiny_model: Path) -> None:
    said = fastpeft_command("merge", "--adapter", tiny_model, "--out", tmp_path / "merged", code=2).output
    assert "no adapter_config.json" in said and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("model", [False, True])
def test_merge_of_a_folder_that_is_not_there(
    fastpeft_command: Callable, tmp_path: Path, tiny_model: Path, model: bool
) -> None:
    """It is no Hub id either, so the rules of those would mislead."""
    base = ("--model", tiny_model) if model else ()
    said = fastpeft_command("merge", "--adapter", tmp_path / "nope", "--out", tmp_path / "merged", *base, code=2).output
    assert "no such folder" in said.replace("\n", " ") and "repo" not in said.lower()
    assert not (tmp_path / "merged").exists()


def test_doctor_finds_a_healthy_install(fastpeft_command: Callable) -> None:
    report = json.loads(fastpeft_command("doctor", "--json").output)
    assert report["healthy"] and report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert {"lora_shrink", "lora_linear_wide", "lora_embedding"} <= set(report["operators"])
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    if report["cpu"]["extension_loaded"]:
        assert report["build"]["cpu"]["torch_abi"] == "2.10" and "scalar" in report["build"]["cpu"]["isas"]
    assert report["self_test"].startswith("lora_linear forward and backward right on cpu")
    if not report["cpu"]["extension_loaded"]:
        assert any("C++ extension" in note for note in report["notes"])
    with console.capture() as shown:
        doctor._show(report)
    assert "healthy" in shown.get() and "lora_shrink" in shown.get()


def test_doctor_explains_what_is_broken() -> None:
    code = (
        "import sys; from fastpeft.cli import doctor; doctor.OPTIONAL = {'triton': ''};"  # not to wait for all
        "sys.exit(doctor.doctor(as_json=True))"
    )
    environment = {**os.environ, "FASTPEFT_BACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and not report["healthy"]
    assert any("unknown backend 'nonsense'" in problem for problem in report["problems"])


def test_doctor_names_packages_that_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise ImportError('libmissing.so: not found')")
    (tmp_path / "deadly_package.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failures = doctor._failures(["json", "broken_package", "deadly_package", "csv"])
    assert failures == {
        "broken_package": "ImportError: libmissing.so: not found",
        "deadly_package": "the import ended the process with status 7",
    }


@pytest.mark.parametrize("baseline", ["peft", "eager", "none"])
def test_bench(
    fastpeft_command: Callable, tiny_model: Path, tmp_path: Path, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if baseline == "peft":
        pytest.importorskip("peft")
    else:  # in this process: one test of the processes of their own is enough
        monkeypatch.setattr(bench, "_memory_elsewhere", contenders.measure_memory)
    fastpeft_command(
        *(
            "bench",
            "--config",
            tiny_model / "config.json",
            "--baseline",
            baseline,
            "--out",
            tmp_path,
            "--device",
            "cpu",
        ),
        *("--batch", 2, "--seq", 16, "--r", 4, "--steps", 3, "--warmup", 1, "--layers", 1, "--threads", 1),
    )
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [c["name"] for c in report["contenders"]] == ["fastpeft"] + ([] if baseline == "none" else [baseline])
    assert report["layers"] == 1 and report["threads"] == 1
    for contender in report["contenders"]:
        assert len(contender["step_seconds"]) == 3 and len(contender["losses"]) == 4
        assert contender["tokens_per_second"] == pytest.approx(32 / contender["step_seconds_median"])
        assert contender["saved_activation_bytes"] > 0 and contender["peak_memory_bytes"] > 0
    if baseline == "none":
        assert "comparison" not in report
    else:
        assert report["comparison"]["max_loss_difference"] < 1e-4
        assert report["comparison"]["speedup"] > 0 and report["comparison"]["saved_activation_ratio"] <= 1


def test_bench_of_several_baselines_and_the_floor(
    fastpeft_command: Callable, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "_memory_elsewhere", contenders.measure_memory)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)  # a compiler takes a minute
    options = ("bench", "--config", tiny_model / "config.json", "--out", tmp_path, "--device", "cpu")
    small = ("--batch", 2, "--seq", 16, "--r", 4, "--steps", 2, "--warmup", 0, "--layers", 1, "--threads", 1)
    with console.capture() as shown:
        fastpeft_command(*options, *small, "--baseline", "peft,compile", "--products")
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(compiled) == 2  # for its memory and for its steps
    assert [c["name"] for c in report["contenders"]] == ["fastpeft", "peft", "compile"]
    assert [c["baseline"] for c in report["comparisons"]] == ["peft", "compile"]
    assert report["comparison"] == report["comparisons"][0]
    assert set(report["products"]["ratios"]) == {"fastpeft", "peft", "compile"}
    assert all(ratio > 1 for ratio in report["products"]["ratios"].values())
    said = fastpeft_command(*options, "--baseline", "peft,unsloth", code=2).output + shown.get()
    assert "peft, compile, eager" in said and "Traceback" not in said


def test_the_floor_is_the_products_a_step_cannot_do_without(tiny_model: Path) -> None:
    options = contenders.BenchOptions(
        config=tiny_model / "config.json", layers=2, batch=2, seq=16, r=4, device="cpu", dtype="float32"
    )
    floor = Products(options)
    config = json.loads((tiny_model / "config.json").read_text())
    rows, vocabulary = 32, config["vocab_size"]
    assert len(floor.forward) == 2 * 7 + 1
    assert len(floor.backward) == len(floor.forward) - 3  # nothing below the first q, k and v needs a gradient
    x, weight = floor.forward[-1]
    assert x.shape == (rows, config["hidden_size"]) and weight.shape == (config["hidden_size"], vocabulary)
    floor.step(0)


def test_the_floor_of_a_model_of_4_bits_is_of_its_weights_not_of_their_bytes(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shape = {"layers": 2, "batch": 2, "seq": 16, "r": 4, "device": "cpu"}
    options = contenders.BenchOptions(config=tiny_model / "config.json", dtype="bfloat16", method="qlora", **shape)
    floor = Products(options)
    hidden = json.loads((tiny_model / "config.json").read_text())["hidden_size"]
    assert all(x.shape[1] == weight.shape[0] for x, weight in floor.forward)
    assert floor.forward[0][1].shape == (hidden, hidden) and floor.forward[0][1].dtype == torch.bfloat16
    assert floor.forward[-1][1].dtype == torch.float32  # the head is not quantised
    floor.step(0)


def test_bench_of_nothing(fastpeft_command: Callable, tmp_path: Path) -> None:
    assert "smollm2-6l" in fastpeft_command("bench", "--out", tmp_path, code=2).output
    said = fastpeft_command("bench", "--config", tmp_path / "no.json", "--out", tmp_path, code=2).output
    assert "no.json" in said and "Traceback" not in said


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fastpeft.cli.app import app;"
        "result = CliRunner().invoke(app, ['finetune', '--help']); assert '--max-length' in result.output;"
        "print([name for name in ('torch', 'transformers', 'peft', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_version(fastpeft_command: Callable) -> None:
    assert fastpeft_command("--version").output.strip() == f"fastpeft {fastpeft.__version__}"


def test_the_commands_offer_what_the_package_has() -> None:
    from fastpeft.cli import app
    from fastpeft.memory import MODES
    from fastpeft.memory.estimate import PARALLEL
    from fastpeft.memory.optimizers import OPTIMIZERS
    from fastpeft.memory.standin import METHODS

    def values(choices: type[enum.Enum]) -> list[str]:
        return [choice.value for choice in choices]

    assert values(app.Optim) == list(OPTIMIZERS)
    assert values(app.Checkpoint) == list(MODES) and values(app.EstimatedCheckpoint) == ["all", "auto", *MODES]
    assert set(values(app.MethodName)) == set(METHODS) and set(values(app.Parallel)) == set(PARALLEL)
