"""The Triton launchers of both norms against the float64 reference: any shape, dtype, row stride and set of parameters.

The tolerance is that of the C++ kernels' tests. Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels import _launch, norm
from fastpeft.kernels import layer_norm as triton_layer_norm
from fastpeft.kernels import rms_norm as triton_rms_norm
from hypothesis import HealthCheck, given, settings
from norm_operands import compare, exactly, magnitudes, norm_case, norm_cases
from test_layer_norm import backwards as layer_norm_backwards
from test_layer_norm import forwards as layer_norm_forwards
from test_rms_norm import backwards as rms_norm_backwards
from test_rms_norm import forwards as rms_norm_forwards
from torch import Tensor

from fastpeft.ops.backend import OPS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("rms_norm", "layer_norm")
FUNCTIONS = {
    "rms_norm": (triton_rms_norm, rms_norm_forwards, rms_norm_backwards),
    "layer_norm": (triton_layer_norm, layer_norm_forwards, layer_norm_backwards),
}


def launch(kind: str, case: dict[str, Any]) -> None:
    """Every operator of one norm once, results unread."""
    ops, forwards, backwards = FUNCTIONS[kind]
    kept = forwards(ops, case)[kind][1:]
    backwards(ops, case, *kept, case["out"])


def check(kind: str, no_worse: Callable[..., None], case: dict[str, Any]) -> None:
    """Every operator of one norm, forward and backward."""
    ops, forwards, backwards = FUNCTIONS[kind]
    wide = exactly(case)
    ours, torchs, exact = (forwards(o, c) for o, c in ((ops, case), (OPS["reference"], case), (OPS["reference"], wide)))
    kept, wide_kept = torchs[kind][1:], exact[kind][1:]
    bias = {} if kind == "layer_norm" else {"bias": None}
    mean = wide_kept[0] if kind == "layer_norm" else torch.zeros_like(wide_kept[0])
    terms = magnitudes(wide | bias, mean, wide_kept[-1])
    statistics = [wide["x"].abs()] * (len(kept) - 1) + [None]
    for name in ours:
        s = terms["s"] if name.endswith("shrink") else ()
        known = (*terms["y"], *statistics, *s) if not name.endswith("add") else None
        compare(no_worse, ours[name], torchs[name], exact[name], known)
    ours, torchs = (backwards(o, case, *kept, case["out"]) for o in (ops, OPS["reference"]))
    exact = backwards(OPS["reference"], wide, *wide_kept, torch.float64)
    for name in ours:
        compare(no_worse, ours[name], torchs[name], exact[name], terms[name])


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=norm_cases(rows=20, columns=80, rank=18))
def test_any_shape(kind: str, no_worse: Callable[..., None], case: dict) -> None:
    check(kind, no_worse, case)


@pytest.mark.parametrize(
    "dtypes, p",
    [((BF16, BF16, BF16), 0.1), ((BF16, FP32, BF16), 0.1), ((FP32, FP32, FP32), 0.0), ((FP16, FP16, FP32), 0.0)],
)
def test_a_group_of_three(no_worse: Callable[..., None], device: torch.device, dtypes: tuple, p: float) -> None:
    """q, k, v behind one norm, in PEFT's mixtures of dtypes: of x and y, of the adapters, of the parameters."""
    x, adapter, parameter = dtypes
    case = norm_case(18, 72, x, x, adapter, parameter, members=3, rank=16, p=p, device=device)
    for kind in KINDS:
        check(kind, no_worse, case)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_and_large_groups(kind: str, no_worse: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows walked through piece by piece; more members and a larger rank than one pass takes; sums of several parts."""
    monkeypatch.setattr(norm, "WHOLE_COLUMNS", 64)
    monkeypatch.setattr(norm, "PIECE", 64)
    monkeypatch.setattr(_launch, "_limits", lambda kind, index: _launch.Limits(4, 163 * 1024))
    check(kind, no_worse, norm_case(34, 72, FP16, FP32, FP16, FP32, members=5, rank=3, p=0.2))
    check(kind, no_worse, norm_case(16, 72, BF16, BF16, FP32, BF16, members=2, rank=80, p=0.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, columns", [(0, 16), (3, 1), (1, 40)])
def test_few_rows_or_columns(kind: str, no_worse: Callable[..., None], rows: int, columns: int) -> None:
    check(kind, no_worse, norm_case(rows, columns, FP32, FP32, FP32, FP32, members=2, rank=2, p=0.1))


def test_the_same_bits_every_time(device: torch.device) -> None:
    x, dy = (torch.randn(60, 130, device=device) for _ in range(2))
    w = torch.randn(130, device=device)
    _, rstd = triton_rms_norm.rms_norm(x, w, 1e-5, 0.0, FP32)
    first, again = (triton_rms_norm.rms_norm_backward(dy, x, rstd, w, 0.0, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_dtype_without_kernels_is_refused(device: torch.device) -> None:
    x: Tensor = torch.zeros(4, 6, device=device).double()
    with pytest.raises(TypeError, match="x is torch.float64; the Triton kernels take"):
        triton_rms_norm.rms_norm(x, None, 1e-5, 0.0, FP32)
