"""`fastpeft.kernels` says why Triton cannot run, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastpeft import kernels


def test_import_loads_neither_triton_nor_torch():
    code = "import sys, fastpeft.kernels; assert not {'triton', 'torch'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interpreted_kernels_take_any_device(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.why_unavailable("cpu") is None


def test_reasons_say_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in kernels.why_unavailable(torch.device("cuda", 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "TRITON_INTERPRET=1" in kernels.why_unavailable("cpu")
    if not torch.cuda.is_available():
        assert "sees no cuda device" in kernels.why_unavailable("cuda")
