"""Activations, gated or not: gradients, dtypes, shapes, and everything PyTorch does around a function."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpeft.ops import glu
from fastpeft.ops.activation import ACTIVATIONS
from fastpeft.ops.backend import available_backends, backend

BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATED = pytest.mark.parametrize("gated", [True, False])


def eager(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """What a model's code computes."""
    h = ACTIVATIONS[act][0](gate)
    return h if up is None else h * up


def results(function: Callable[..., Tensor], gate: Tensor, up: Tensor | None, act: str) -> list[Tensor]:
    """The output and the gradients, for a fixed output gradient."""
    given = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
    h = function(given[0], given[1] if up is not None else None, act)
    dh = torch.randn(h.shape, device=h.device, generator=torch.Generator(h.device).manual_seed(2))
    return [h.detach(), *torch.autograd.grad(h, given, dh.to(gate.dtype).to(h.dtype))]


def operands(*shape: int, gated: bool = True, dtype: torch.dtype = torch.float32, **like) -> list[Tensor | None]:
    gate, up = (3 * torch.randn(shape, **like)).to(dtype), torch.randn(shape, **like).to(dtype)
    return [gate, up if gated else None]


@GATED
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients_and_second_derivatives(fused_always: None, act: str, gated: bool) -> None:
    inputs = [t.requires_grad_() for t in operands(3, 4, gated=gated, dtype=torch.float64) if t is not None]
    call = lambda gate, up=None: glu(gate, up, act)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_at_the_kinks_are_pytorchs(fused_always: None, act: str) -> None:
    x = torch.tensor([-1e4, -30.0, -3.0, -1.0, -0.0, 0.0, 1e-30, 3.0, 6.0, 30.0, 1e4]).repeat(4)
    ones = torch.ones_like(x)
    for name in BACKENDS:
        with backend(name):
            for ours, theirs in zip(results(glu, x, ones, act), results(eager, x, ones, act)):
                torch.testing.assert_close(ours, theirs)


@GATED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_dtype(
    fused_always: None,
    no_worse: Callable[..., None],
    device: torch.device,
    name: str,
    act: str,
    dtype: torch.dtype,
    gated: bool,
) -> None:
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's kernels")
    gate, up = operands(3, 21, 77, gated=gated, dtype=dtype, device=device)
    with backend(name):
        ours = results(glu, gate, up, act)
    theirs = results(eager, gate, up, act)
    exact = results(eager, gate.double(), None if up is None else up.double(), act)
    dh = torch.randn(gate.shape, device=device, generator=torch.Generator(device).manual_seed(2)).to(dtype).double()
    doubles = [t.double().requires_grad_() for t in (gate, up) if t is not None]
    exact[1:] = torch.autograd.grad(eager(doubles[0], doubles[1] if gated else None, act), doubles, dh)
    for three in zip(ours, theirs, exact):
        no_worse(*three)


@GATED
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (2, 3, 0, 4), (7,), ()])
def test_any_shape(fused_always: None, device: torch.device, shape: tuple[int, ...], gated: bool) -> None:
    gate, up = operands(*shape, gated=gated, device=device)
    for ours, theirs in zip(results(glu, gate, up, "silu"), results(eager, gate, up, "silu")):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_any_strides(fused_always: None, device: torch.device) -> None:
    """Gate and up as the halves of one matrix, transposed, expanded; an expanded output gradient."""
    both = torch.randn(2, 9, 2 * 70, device=device)
    gate, up = both.chunk(2, dim=-1)
    expected = glu(gate.contiguous(), up.contiguous())
    torch.testing.assert_close(glu(gate, up), expected)
    torch.testing.assert_close(glu(gate.mT.contiguous().mT, up), expected)
    row = gate[:, :1]
    torch.testing.assert_close(glu(row.expand(-1, 9, -1), up), glu(row.repeat(1, 9, 1), up.contiguous()))
    both.requires_grad_()
    (ours,) = torch.autograd.grad(glu(*both.chunk(2, dim=-1)).sum(), both)
    (theirs,) = torch.autograd.grad(eager(*both.chunk(2, dim=-1), "silu").sum(), both)
    torch.testing.assert_close(ours, theirs)


def test_inputs_are_not_written_to_and_only_they_are_kept(fused_always: None, device: torch.device) -> None:
    gate, up = (t.requires_grad_() for t in operands(5, 300, device=device))
    before, kept = (gate.detach().clone(), up.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h = glu(gate, up, "gelu")
    dh = torch.randn_like(h)
    dh_before = dh.clone()
    for _ in range(2):
        h.backward(dh, retain_graph=True)
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1]) and torch.equal(dh, dh_before)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


def test_small_inputs_equal_large_ones(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    gate, up = operands(2, 50, device=device)
    small = results(glu, gate, up, "silu")
    monkeypatch.setattr(sys.modules["fastpeft.ops.glu"], "NATIVE_ELEMENTS", -1)
    for s, t in zip(small, results(glu, gate, up, "silu")):
        torch.testing.assert_close(s, t)


def test_operands_of_two_dtypes(fused_always: None, device: torch.device) -> None:
    """As in eager code, the result has the wider dtype; each gradient its operand's."""
    gate, up = torch.randn(4, 30, device=device), torch.randn(4, 30, device=device)
    gate, up = gate.bfloat16().requires_grad_(), up.requires_grad_()
    h = glu(gate, up)
    assert h.dtype == torch.float32 == eager(gate, up, "silu").dtype
    h.sum().backward()
    assert gate.grad.dtype == torch.bfloat16 and up.grad.dtype == torch.float32


def test_under_autocast(fused_always: None, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate, up = operands(4, 80, dtype=dtype, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            for ours, theirs in zip(results(glu, gate, up, "silu"), results(eager, gate, up, "silu")):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_whole(fused_always: None, name: str) -> None:
    gate, up = (t.requires_grad_() for t in operands(2, 11, 40))

    def f(gate: Tensor, up: Tensor) -> Tensor:
        return (glu(gate, up) + glu(gate, None, "gelu_tanh")).square().sum()

    with backend(name):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(gate, up)
        ours = torch.autograd.grad(compiled, (gate, up))
    plain = (eager(gate, up, "silu") + eager(gate, None, "gelu_tanh")).square().sum()
    for o, t in zip(ours, torch.autograd.grad(plain, (gate, up))):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-4)


def test_functional_transforms_and_subclasses(fused_always: None) -> None:
    gate, up = operands(3, 20)
    torch.testing.assert_close(torch.vmap(glu)(gate, up), eager(gate, up, "silu"))
    _, tangent = torch.func.jvp(glu, (gate, up), (up, gate))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda g, u: eager(g, u, "silu"), (gate, up), (up, gate))[1])

    class Tagged(Tensor):
        pass

    assert type(glu(gate.as_subclass(Tagged), up)) is Tagged


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="gate .* and up"):
        glu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="unknown activation 'swoosh'; choose one of silu"):
        glu(torch.zeros(2, 3), None, "swoosh")
