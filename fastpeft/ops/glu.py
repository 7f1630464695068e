"""Activations, gated or not, and the same with the adapter's narrow product of the result.

    h = act(gate) * up          or act(gate) where there is no up (Shazeer, arXiv:2002.05202)
    dgate = dh * up * act'(gate)        dup = dh * act(gate)

gate and up (M, N) may have any row stride, so they may be column blocks of one matrix. Arithmetic is in fp32 (float64
if an operand is) and h is rounded once; eager code rounds act(gate) before it multiplies. Only gate and up are kept.

The margin forms serve a LoRA on the projection that reads h (`down`), A (G*r, N), c_g, p_q and masks as in `products`:

    glu_shrink            h, and s_g = c_g/(1-p_q) (m_g * h) A_g^T of the rounded h
    glu_shrink_backward   dh' = dh + sum_g c_g/(1-p_q) m_g * (ds_g A_g),  dgate and dup of dh',
                          dA_g = c_g/(1-p_q) ds_g^T (m_g * h), with h computed again

dh there is the gradient from the base product alone; dh' is not rounded. s and dA are in A's dtype, everything else in
gate's. Nothing is written to an input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .activation import activation
from .backend import OPS, define, exact, route
from .lora_linear import rows_of, shaped
from .products import _accumulator, shrink_backward_reference, shrink_reference

# Elements of gate up to which ordinary operators are faster than an autograd.Function.
NATIVE_ELEMENTS = 4096


def glu(gate: Tensor, up: Tensor | None = None, act: str = "silu") -> Tensor:
    """act(gate) * up, or act(gate) where up is None: shape (..., N) and dtype of the operands.

    gate, up: (..., N) of one shape, of any strides; of two dtypes the wider one is computed in, as in eager code.
    act: a name of `activation.ACTIVATIONS`. Under autocast nothing is cast, as with the eager operators.

    Raises ValueError on shapes that differ and on an unknown activation.
    """
    function, _ = activation(act)
    if up is not None:
        if gate.shape != up.shape:
            raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
        if gate.dtype != up.dtype:
            wider = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(wider), up.to(wider)
    if gate.numel() <= NATIVE_ELEMENTS or gate.dim() == 0:
        return function(gate) if up is None else function(gate) * up
    if native.transformed(gate, up):
        return glu_reference(gate, up, act)
    return _Glu.apply(gate, up, act, route(gate.device))


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, act: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.call = act, backend
        h = OPS[backend].glu(rows_of(gate), None if up is None else rows_of(up), act)
        return h if gate.dim() == 2 else shaped(h, gate.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        act, backend = ctx.call
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            with exact(dh.device):
                return *glu_backward_reference(dh, gate, up, act), None, None
        flat = None if up is None else rows_of(up)
        dgate, dup = OPS[backend].glu_backward(rows_of(dh), rows_of(gate), flat, act)
        return dgate.view(gate.shape), None if dup is None else dup.view(gate.shape), None, None


def glu_reference(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """h, of gate's shape and dtype."""
    acc = _accumulator(gate, *_given(up))
    h = activation(act)[0](gate.to(acc))
    return (h if up is None else h * up.to(acc)).to(gate.dtype)


def glu_backward_reference(dh: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor | None]:
    """dgate and, where there is an up, dup."""
    acc = _accumulator(dh, gate, *_given(up))
    function, derivative = activation(act)
    x, dh = gate.to(acc), dh.to(acc)
    if up is None:
        return (dh * derivative(x)).to(gate.dtype), None
    return (dh * up.to(acc) * derivative(x)).to(gate.dtype), (dh * function(x)).to(up.dtype)


def glu_shrink_reference(
    gate: Tensor, up: Tensor | None, act: str, A: Tensor, scaling: list[float], p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h (M, N) and s (M, G*r) in A's dtype."""
    h = glu_reference(gate, up, act)
    return h, shrink_reference(h, A, scaling, p, seed)


def glu_shrink_backward_reference(
    dh: Tensor | None,
    ds: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    need_input: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """dgate and dup, None unless need_input, and dA (G*r, N) in A's dtype. dh may be None unless need_input."""
    h = glu_reference(gate, up, act)
    if not need_input:
        return None, None, shrink_backward_reference(ds, h, A, scaling, p, seed, None)
    assert dh is not None
    total = dh.to(_accumulator(dh, ds, A), copy=True)
    dA = shrink_backward_reference(ds, h, A, scaling, p, seed, total)
    return *glu_backward_reference(total, gate, up, act), dA


def _given(t: Tensor | None) -> tuple[Tensor, ...]:
    return () if t is None else (t,)


def _fake(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(dh: Tensor, gate: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor | None]:
    return gate.new_empty(gate.shape), None if up is None else up.new_empty(up.shape)


def _shrink_fake(
    gate: Tensor, up: Tensor | None, act: str, A: Tensor, scaling: list[float], p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), A.new_empty(gate.shape[0], A.shape[0])


def _shrink_backward_fake(
    dh: Tensor | None,
    ds: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    need_input: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    dup = up.new_empty(up.shape) if need_input and up is not None else None
    return gate.new_empty(gate.shape) if need_input else None, dup, A.new_empty(A.shape)


# Results are all optional where one is: a C++ kernel that calls the reference gets the types of the results in reverse
# (torch_call_dispatcher of torch 2.10 to 2.13).
define("glu", "(Tensor gate, Tensor? up, str act) -> Tensor", reference=glu_reference, fake=_fake, kernels="glu")
define(
    "glu_backward",
    "(Tensor dh, Tensor gate, Tensor? up, str act) -> (Tensor? dgate, Tensor? dup)",
    reference=glu_backward_reference,
    fake=_backward_fake,
    kernels="glu",
)
define(
    "glu_shrink",
    "(Tensor gate, Tensor? up, str act, Tensor A, float[] scaling, float p, Tensor? seed) -> (Tensor h, Tensor s)",
    reference=glu_shrink_reference,
    fake=_shrink_fake,
    kernels="glu",
)
define(
    "glu_shrink_backward",
    "(Tensor? dh, Tensor ds, Tensor gate, Tensor? up, str act, Tensor A, float[] scaling, float p, Tensor? seed, "
    "bool need_input) -> (Tensor? dgate, Tensor? dup, Tensor? dA)",
    reference=glu_shrink_backward_reference,
    fake=_shrink_backward_fake,
    kernels="glu",
)
