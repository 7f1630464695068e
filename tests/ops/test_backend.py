"""Choosing a backend: by name, by environment, and what happens when it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

from fastpeft.errors import BackendError
from fastpeft.ops import backend as module
from fastpeft.ops import lora_linear
from fastpeft.ops.backend import available_backends, backend, backend_report, cpu_extension, route

CPU = torch.device("cpu")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTPEFT_")} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def operands() -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in ((64, 96), (32, 96), (32,), (4, 96), (32, 4))]


def test_a_forced_backend_is_used_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    x, w, b, A, B = operands()
    launch = lambda x, A, scaling, p, seed: called.append("triton") or torch.zeros(64, 4)  # noqa: E731
    expand = lambda y, s, B, splits: None  # noqa: E731
    kernels = types.SimpleNamespace(lora_shrink=launch, lora_expand_=expand)
    monkeypatch.setitem(sys.modules, "fastpeft.kernels.lora_linear", kernels)
    assert route(CPU) == "auto"
    with backend("triton"):
        assert route(CPU) == "triton"
        lora_linear(x, w, b, A, B, 1.0)
        with backend("reference"):
            lora_linear(x, w, b, A, B, 1.0)
    lora_linear(x, w, b, A, B, 1.0)
    assert route(CPU) == "auto" and called == ["triton"]


def test_a_backend_is_let_go_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert route(CPU) == "auto"


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b, A, B = operands()
    A.requires_grad_()
    with backend("reference"):
        y = lora_linear(x, w, b, A, B, 1.0)
    real, seen = module.OPS["reference"].lora_shrink_backward, []
    monkeypatch.setattr(module.OPS["reference"], "lora_shrink_backward", lambda *a: seen.append(1) or real(*a))
    y.sum().backward()
    assert seen


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BackendError, match="unknown backend 'cuda-graphs'.*reference"), backend("cuda-graphs"):
        raise AssertionError
    run = python("import fastpeft.ops", FASTPEFT_BACKEND="nonsense")
    assert run.returncode and "unknown backend 'nonsense'" in run.stderr


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_extension", None)
    monkeypatch.setattr(module, "_reason", "not available: no compiler")
    monkeypatch.setattr(module, "_triton_spec", lambda: None)
    for name, reason in (("cpu", "no compiler"), ("triton", "pip install triton")):
        with pytest.raises(BackendError, match=reason), backend(name):
            raise AssertionError
    assert available_backends() == ["reference"]


def test_the_cpu_backend_refuses_other_devices() -> None:
    if cpu_extension() is None:
        pytest.skip("fastpeft was installed without its C++ extension")
    with backend("cpu"):
        assert route(CPU) == "auto"
        with pytest.raises(BackendError, match="input is on meta"):
            route(torch.device("meta"))


def test_a_gpu_backend_without_a_gpu_says_what_to_do() -> None:
    def no_driver(*args: object) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    sys.modules["fastpeft.kernels._no_driver"] = types.SimpleNamespace(op=no_driver)  # type: ignore[assignment]
    try:
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            module._launch("_no_driver", "op")
    finally:
        del sys.modules["fastpeft.kernels._no_driver"]


def test_the_environment_forces_a_backend() -> None:
    code = "import torch; from fastpeft.ops.backend import route; print(route(torch.device('cpu')))"
    assert python(code, FASTPEFT_BACKEND="reference").stdout == "reference\n"


def test_the_environment_chooses_the_instruction_set() -> None:
    if cpu_extension() is None:
        pytest.skip("fastpeft was installed without its C++ extension")
    code = "import fastpeft.ops; from fastpeft.ops.backend import backend_report; print(backend_report()['cpu'])"
    assert python(code, FASTPEFT_CPU_ISA="scalar").stdout == "C++ kernels, scalar\n"
    run = python(code, FASTPEFT_CPU_ISA="avx1024")
    assert run.returncode and "FASTPEFT_CPU_ISA" in run.stderr and "avx512, avx2 or scalar" in run.stderr


def test_without_the_extension_the_reference_runs() -> None:
    code = (
        "import importlib.util as u; real = u.find_spec;"
        "u.find_spec = lambda n, *a: None if n == 'fastpeft._C' else real(n, *a);"
        "import torch, fastpeft.ops as o; from fastpeft.ops.backend import backend_report as b;"
        "y = o.lora_linear(torch.ones(70, 80), torch.ones(3, 80), None, torch.ones(2, 80), torch.ones(3, 2), 0.5);"
        "print(y[0, 0].item(), b()['cpu'])"
    )
    run = python(code)
    assert run.stdout.startswith("160.0 not available: fastpeft was installed without"), run.stderr


def test_the_report_has_a_line_for_every_backend() -> None:
    report = backend_report()
    assert set(report) == {"reference", "cpu", "triton", "cuda"} and all(report.values())
    assert "reference" in available_backends()


def fake_cuda(**answers: object) -> types.SimpleNamespace:
    info = {"cuda": "13.0", "archs": "8.0,9.0a", "nvcc": "13.0.88", "torch": "2.13.0"}
    return types.SimpleNamespace(build_info=lambda: info, **{k: lambda *a, v=v: v for k, v in answers.items()})


def test_cuda_kernels_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for a CUDA release on a machine without a driver, beside a CPU build of torch, or on another GPU."""
    built = r"\(CUDA 13.0 kernels for 8.0,9.0a are installed\)"
    monkeypatch.setattr(module, "_cuda", fake_cuda(why_no_driver="this machine has no NVIDIA driver", why_not=None))
    for cuda, reason in ((None, f"is a CPU build {built}"), ("13.0", f"this machine has no NVIDIA driver {built}")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(BackendError, match=reason), backend("cuda"):
            raise AssertionError
    monkeypatch.setattr(module, "_cuda", fake_cuda(why_no_driver=None, why_not="GPU 0 has compute capability 7.5"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match="GPU 0 has compute capability 7.5"), backend("cuda"):
        raise AssertionError


def test_cuda_kernels_that_run_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cuda", fake_cuda(why_no_driver=None, why_not=None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
    assert backend_report()["cuda"] == "CUDA 13.0 kernels for 8.0,9.0a, on NVIDIA H100"
    with backend("cuda"):
        assert route(torch.device("cuda")) == "auto"
        with pytest.raises(BackendError, match="'cuda' is forced but the input is on cpu"):
            route(CPU)


def test_importing_the_operators_imports_neither_triton_nor_peft() -> None:
    code = "import sys, fastpeft.ops; print([m for m in ('triton', 'peft', 'transformers') if m in sys.modules])"
    assert python(code).stdout == "[]\n"
