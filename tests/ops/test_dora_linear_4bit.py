"""DoRA over a 4-bit weight: what DoRA over the decoded weight gives, by either way of multiplying, W never whole."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastpeft.ops import decisions, dora_linear, dora_linear_group
from fastpeft.ops.backend import backend
from fastpeft.ops.nf4 import dequantize_4bit, quantize_4bit
from fastpeft.ops.weight_norm import weight_norm

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(params=["few rows", "panels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    rows = 0 if request.param == "panels" else 10**9
    module = sys.modules["fastpeft.ops.nf4_linear"]
    monkeypatch.setattr(module.decisions, "linear_4bit", lambda *_: decisions.Rows(rows, rows, 4096))
    return request.param


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    """x, bias, A, B and a magnitude that has moved."""
    shapes = ((m, k), (n,), (r, k), (n, r))
    made = [torch.randn(*shape, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_() for shape in shapes]
    return [*made, (torch.rand(n, dtype=torch.float64) + 0.7).to(dtype).requires_grad_()]


def test_gradients_in_float64() -> None:
    w = quantize_4bit(torch.randn(6, 12) * 0.1, "nf4", 64, nested=True)
    with backend("reference"):
        t = operands(5, 6, 12, 2, torch.float64)
        for p in (0.0, 0.4):

            def f(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor, p: float = p) -> Tensor:
                torch.manual_seed(1)
                return dora_linear(x, w, bias, A, B, m, 0.7, p)

            given = (t[0], t[1], t[4])  # A's and B's gradients take the norm for a constant
            assert gradcheck(lambda x, b, m: f(x, b, t[2].detach(), t[3].detach(), m), given)
            assert gradgradcheck(lambda x, b, m: f(x, b, t[2].detach(), t[3].detach(), m), given)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equals_dora_on_the_decoded_weight(
    path: str, dtype: torch.dtype, p: float, no_worse: Callable[..., None]
) -> None:
    w = quantize_4bit(torch.randn(70, 96) * 0.1, "nf4", 64, nested=True)
    found = []
    for kind in ("packed", "dense", "exact"):
        torch.manual_seed(3)
        t = operands(33, 70, 96, 5, dtype)
        dy = torch.randn(33, 70).to(dtype)
        if kind == "exact":
            t, dy = [x.detach().double().requires_grad_() for x in t], dy.double()
        base = w if kind == "packed" else dequantize_4bit(w, FP32 if kind == "exact" else dtype).to(t[0].dtype)
        torch.manual_seed(4)
        y = dora_linear(t[0], base, *t[1:], 0.5, p)
        found.append([y.detach(), *torch.autograd.grad(y, t, dy)])
    for ours, dense, exact in zip(*found):
        no_worse(ours, dense, exact)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norms_are_those_of_the_weight_that_bitsandbytes_decodes(dtype: torch.dtype, path: str) -> None:
    w = quantize_4bit((torch.randn(131, 96) * 0.1).to(dtype), "nf4", 64, nested=True)
    A, B = torch.randn(5, 96), torch.randn(131, 5)
    B[3] = 0
    torch.testing.assert_close(weight_norm(w, A, B, 0.7), weight_norm(dequantize_4bit(w), A, B, 0.7))


def test_group_equals_its_members_alone(path: str) -> None:
    ws = [quantize_4bit(torch.randn(n, 96) * 0.1, "nf4", 64, nested=True) for n in (64, 32)]
    x, parts = (
        torch.randn(2, 9, 96, requires_grad=True),
        [operands(1, n, 96, r, FP32)[2:] for n, r in ((64, 4), (32, 2))],
    )
    lists = [[part[i] for part in parts] for i in range(3)]
    together = dora_linear_group(x, ws, [None] * 2, *lists, [0.5, 2.0])
    alone = [dora_linear(x, w, None, *part, c) for w, part, c in zip(ws, parts, (0.5, 2.0))]
    given = [x, *(t for part in parts for t in part)]
    dys = [torch.randn_like(y) for y in alone]
    for a, b in zip(torch.autograd.grad(together, given, dys), torch.autograd.grad(alone, given, dys)):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_graph_break() -> None:
    w = quantize_4bit(torch.randn(64, 64) * 0.1, "nf4", 64, nested=True)
    t = operands(24, 64, 64, 4, FP32)

    def step(*t: Tensor) -> Tensor:
        return dora_linear(t[0], w, *t[1:], 0.5).sum()

    eager = torch.autograd.grad(step(*t), t)
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(*t), t)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
