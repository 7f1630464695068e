"""The Triton launchers of `glu` against the float64 reference. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from glu_results import case, everything, magnitudes
from torch import Tensor

from fastpeft.ops.activation import ACTIVATIONS
from fastpeft.ops.backend import OPS

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(operands: dict, no_worse: Callable[..., None] | None = None) -> dict[str, Tensor]:
    """The results, compared with the reference. Without `no_worse`: root-mean-square errors, as the emulator's test."""
    ours = everything(OPS["triton"], operands, lambda t: t)
    theirs = everything(OPS["reference"], operands, lambda t: t)
    exact = everything(OPS["reference"], operands, Tensor.double)
    assert ours.keys() == exact.keys()
    sums = magnitudes(operands, exact["h"])
    for name, truth in exact.items():
        if no_worse is not None:
            no_worse(ours[name], theirs[name], truth, sums.get(name) if truth.numel() else None)
            continue
        error, allowed = ((t.double() - truth).norm().item() for t in (ours[name], theirs[name]))
        rounding = torch.finfo(ours[name].dtype).eps / 2 * truth.norm().item()
        assert error <= max(2 * allowed, rounding), f"{name}: {error:.2e}, the reference's {allowed:.2e}"
    return ours


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(no_worse, device, act, gated):
    check(case(19, 40, 1, 4, FP32, FP32, 0.0, act, gated, device=device), no_worse)


@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_dtype(no_worse, device, dtype, adapter, p):
    check(case(35, 72, 2, 5, dtype, adapter, p, "silu", device=device), no_worse)


@pytest.mark.parametrize(
    ("rows", "n", "members", "rank"),
    [(1, 1, 1, 1), (3, 130, 1, 16), (5, 24, 5, 2), (20, 33, 1, 72), (0, 8, 1, 2), (3, 2080, 1, 4), (260, 24, 1, 4)],
)
def test_shapes(no_worse, device, rows, n, members, rank):
    """One element, odd ones, more members and ranks than one pass takes, no rows, reductions in several parts."""
    operands = case(rows, n, members, rank, BF16, BF16, 0.1, "gelu_tanh", gap=3, device=device)
    first = check(operands, no_worse)
    if max(rows, n) > 200:
        again = everything(OPS["triton"], operands, lambda t: t)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_cannot_be_is_refused(device):
    gate, A = torch.zeros(4, 6, device=device), torch.zeros(2, 6, device=device)
    ops = OPS["triton"]
    for error, call in (
        (ValueError, lambda: ops.glu(gate, gate[:, :5], "silu")),
        (ValueError, lambda: ops.glu(gate, None, "swoosh")),
        (TypeError, lambda: ops.glu(gate.double(), None, "silu")),
        (
            ValueError,
            lambda: ops.glu_shrink_backward(None, gate[:, :2], gate, None, "silu", A, [1.0], 0.0, None, True),
        ),
    ):
        with pytest.raises(error):
            call()
