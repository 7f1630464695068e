"""A linear layer over a 4-bit weight: the formula, its gradients, and that W is never held whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.ops import decisions, lora_linear, lora_linear_group, nf4_linear
from fastpeft.ops.backend import backend
from fastpeft.ops.glu import glu
from fastpeft.ops.glu_linear import glu_linear
from fastpeft.ops.nf4 import Weight4bit, dequantize_4bit, quantize_4bit
from fastpeft.ops.norm_linear import RMSNorm, norm_linear
from fastpeft.ops.rms_norm import rms_norm

module = sys.modules["fastpeft.ops.nf4_linear"]


def weight(n: int, k: int, blocksize: int = 64) -> Weight4bit:
    return quantize_4bit(torch.randn(n, k) * 0.1, "nf4", blocksize, nested=True)


@pytest.fixture(params=["few rows", "panels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways, whatever the number of rows; panels are of 32 rows or columns."""
    rows = 0 if request.param == "panels" else 10**9
    monkeypatch.setattr(module.decisions, "linear_4bit", lambda *_: decisions.Rows(rows, rows, 4096))
    return request.param


def operands(dtype: torch.dtype, m: int, n: int, k: int, r: int) -> list[Tensor]:
    shapes = ((m, k), (n,), (r, k), (n, r))
    return [torch.randn(*shape, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_() for shape in shapes]


def test_gradients_in_float64() -> None:
    w = weight(7, 12)
    with backend("reference"):
        x, bias, A, B = operands(torch.float64, 5, 7, 12, 3)
        assert gradcheck(lambda *t: nf4_linear(t[0], w, *t[1:], 0.7, 0.0), (x, bias, A, B))
        assert gradgradcheck(lambda *t: nf4_linear(t[0], w, *t[1:], 0.7, 0.0), (x, bias, A, B))
        assert gradcheck(lambda x: nf4_linear(x, w), (x,))

        def masked(*t: Tensor) -> Tensor:
            torch.manual_seed(1)
            return nf4_linear(t[0], w, *t[1:], 0.7, 0.4)

        assert gradcheck(masked, (x, bias, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_lora_linear_on_the_decoded_weight(
    isa: str, path: str, dtype: torch.dtype, p: float, no_worse: Callable[..., None]
) -> None:
    """Same numbers, same masks, same gradients, within PyTorch's own error in the dtype."""
    w = weight(70, 96)
    found = []
    for kind in ("packed", "dense", "exact"):
        torch.manual_seed(3)
        t = operands(dtype, 33, 70, 96, 5)
        dy = torch.randn(33, 70).to(dtype)
        if kind == "exact":
            t, dy = [x.detach().double().requires_grad_() for x in t], dy.double()
        base = w if kind == "packed" else dequantize_4bit(w, t[0].dtype)
        torch.manual_seed(4)
        y = lora_linear(t[0], base, *t[1:], 0.5, p)
        found.append([y.detach(), *torch.autograd.grad(y, t, dy)])
    for ours, dense, exact in zip(*found):
        no_worse(ours, dense, exact)


def test_group_equals_its_members_alone(isa: str, path: str) -> None:
    """q, k and v over 4 bits, one without an adapter, one gradient missing: shared work, the same numbers."""
    ws, x = [weight(64, 96), weight(32, 96), weight(32, 96)], torch.randn(2, 9, 96, requires_grad=True)
    As = [torch.randn(4, 96, requires_grad=True), None, torch.randn(2, 96, requires_grad=True)]
    Bs = [torch.randn(64, 4, requires_grad=True), None, torch.randn(32, 2, requires_grad=True)]
    given = [x, *(t for t in (*As, *Bs) if t is not None)]
    scaling = [0.5, 0.0, 2.0]
    together = lora_linear_group(x, ws, [None] * 3, As, Bs, scaling)
    alone = [nf4_linear(x, w, None, a, b, c) for w, a, b, c in zip(ws, As, Bs, scaling)]
    dys = [torch.randn_like(y) for y in alone]
    for left_out in (None, 2):
        used = [i for i in range(3) if i != left_out]
        grads = [
            torch.autograd.grad(
                [ys[i] for i in used], given, [dys[i] for i in used], retain_graph=True, allow_unused=True
            )
            for ys in (together, alone)
        ]
        for a, b in zip(*grads):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(lora_linear_group(x, ws, [None] * 3, As, Bs, scaling), alone):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_joined_to_what_produces_its_input(path: str, p: float, compute: torch.dtype | None) -> None:
    """A norm or an activation and 4-bit projections as one operator: the numbers of the two apart."""
    k, sizes = 64, (96, 32)
    weights = [weight(n, k)._replace(compute_dtype=compute) for n in sizes]
    A = [torch.randn(4, k, requires_grad=True) for _ in sizes]
    B = [torch.randn(n, 4, requires_grad=True) for n in sizes]
    z, gate = torch.randn(2, 40, k, requires_grad=True), torch.randn(2, 40, k, requires_grad=True)
    dys = [torch.randn(2, 40, n) for n in sizes]
    lists = (weights, [None, None], A, B, [0.5, 0.5], p)

    def run(joined: bool, of_norm: bool) -> list[Tensor]:
        torch.manual_seed(3)
        if of_norm:
            kind = RMSNorm(1e-5, 0.0, torch.float32)
            if joined:
                n, ys = norm_linear(kind, z, (None,), *lists)
            else:
                n = rms_norm(z, None, 1e-5)
                ys = lora_linear_group(n, *lists)
        elif joined:
            n, ys = glu_linear(gate, z, "silu", *lists)
        else:
            n = glu(gate, z, "silu")
            ys = lora_linear_group(n, *lists)
        inputs = (z,) if of_norm else (gate, z)
        grads = torch.autograd.grad(list(ys), [*inputs, *A, *B], dys)
        return [n.detach(), *(y.detach() for y in ys), *grads]

    for of_norm in (True, False):
        for ours, apart in zip(run(True, of_norm), run(False, of_norm)):
            torch.testing.assert_close(ours, apart, atol=1e-4 if compute is None else 0.2, rtol=1e-4)


def test_joined_second_derivative_and_refusal() -> None:
    w, A = weight(6, 16, 32), torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    B = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    kind = RMSNorm(1e-5, 0.0, torch.float64)
    with backend("reference"):

        def f(z: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return norm_linear(kind, z, (None,), [w], [None], [A], [B], [0.7])[1][0]

        assert gradcheck(f, (z, A, B)) and gradgradcheck(f, (z, A, B))
    with pytest.raises(ValueError, match="DoRA over weights of 4 bits"):
        norm_linear(kind, z, (None,), [w], [None], [A], [B], [0.7], magnitudes=[torch.ones(6)])


def test_compute_dtype_is_that_of_the_base_product(path: str) -> None:
    """As bitsandbytes: x goes into the base product in bf16, the result and the adapter stay in x's dtype."""
    w = weight(64, 96)._replace(compute_dtype=torch.bfloat16)
    x, A, B = torch.randn(40, 96, requires_grad=True), torch.randn(4, 96), torch.randn(64, 4)
    y = nf4_linear(x, w, None, A, B, 0.5)
    exact = x.double() @ dequantize_4bit(w, torch.float32).double().T + 0.5 * x.double() @ A.double().T @ B.double().T
    assert y.dtype == torch.float32
    assert (y - exact).norm() / exact.norm() < 4e-3
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32


def test_autocast_gives_the_input_dtype_back() -> None:
    w, x, A, B = weight(64, 96), torch.randn(3, 40, 96, requires_grad=True), torch.randn(4, 96), torch.randn(64, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, w, None, A, B, 0.5)
        (z,) = lora_linear_group(x, [w], [None], [A], [B], [0.5])
    assert y.dtype == z.dtype == torch.float32 and torch.equal(y, z)
    torch.testing.assert_close(y, nf4_linear(x, w, None, A, B, 0.5), atol=0.2, rtol=0.05)


class Largest(TorchDispatchMode):
    """The most elements of any floating tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.elements = max(self.elements, t.untyped_storage().nbytes())
        return out


def test_the_weight_is_never_held_whole() -> None:
    """Forward and backward of a (2048, 2048) weight, 16 MiB in fp32: no tensor above the scratch's 4 MiB."""
    w = weight(2048, 2048)
    for rows in (1, 64):
        x = torch.randn(rows, 2048, requires_grad=True)
        with Largest() as largest:
            nf4_linear(x, w).sum().backward()
        assert largest.elements <= decisions.MAX_PANEL_BYTES
        A, B = torch.randn(4, 2048, requires_grad=True), torch.randn(2048, 4, requires_grad=True)
        with Largest() as largest:
            norm_linear(RMSNorm(1e-5, 0.0, x.dtype), x, (None,), [w], [None], [A], [B], [1.0])[1][0].sum().backward()
        assert largest.elements <= decisions.MAX_PANEL_BYTES


def test_decisions_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's table holds unless the user's cache has one; a damaged one is told by its name."""
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    try:
        decisions.forget()
        table, source = decisions.load()
        assert source.endswith("ops/decisions.json") and decisions.linear_4bit("cpu", torch.float32).panel_bytes > 0
        assert decisions.linear_4bit("xpu", torch.float64) == decisions.Rows(0, 0, decisions.MAX_PANEL_BYTES)
        table = json.loads(json.dumps(table))
        table["linear_4bit"]["cpu"]["float32"]["forward"] = 77
        assert decisions.save(table) == tmp_path / "decisions.json"
        assert decisions.linear_4bit("cpu", torch.float32).forward == 77
        table["linear_4bit"]["cpu"]["float32"]["panel_bytes"] = 1 << 30
        with pytest.raises(ValueError, match="out of range"):
            decisions.save(table)
        (tmp_path / "decisions.json").write_text("{")
        decisions.forget()
        with pytest.raises(ValueError, match="--calibrate"):
            decisions.load()
    finally:
        decisions.forget()


def test_what_does_not_fit_is_refused() -> None:
    w = weight(8, 64)
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    for x, arguments in (
        (torch.randn(3, 32), (None, None, None)),
        (torch.randn(3, 64), (None, A, None)),
        (torch.randn(3, 64), (None, A[:, :5], B)),
        (torch.randn(3, 64), (None, A, B[:5])),
    ):
        with pytest.raises(ValueError):
            nf4_linear(x, w, *arguments)
    with pytest.raises(ValueError):
        nf4_linear(torch.randn(3, 64), w, None, A, B, 1.0, 1.5)


def test_compiles_without_a_graph_break() -> None:
    w, x = weight(64, 64), torch.randn(3, 8, 64, requires_grad=True)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(64, 4, requires_grad=True)

    def step(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return nf4_linear(x, w, None, A, B, 0.5).sum()

    eager = torch.autograd.grad(step(x, A, B), (x, A, B))
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(x, A, B), (x, A, B))
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)
