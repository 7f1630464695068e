"""RMSNorm, alone, with the residual addition before it, and with the narrow products of the projections it feeds.

    h = x + residual                                   rounded to x's dtype, as the model's own addition is
    y = h * rstd * (offset + weight)                   rstd = 1 / sqrt(mean(h²) + eps), one a row

Zhang, Sennrich: "Root Mean Square Layer Normalization" (2019), eq. 4. offset 0 is Llama's (and T5's), 1 Gemma's. With
g = dy * (offset + weight) and h' = h * rstd the gradients are

    dx = dresidual = rstd * (g - h' * mean(g * h')) + d_h          d_h: the gradient that arrives at h directly
    dweight = sum over rows of dy * h'

Operators, on matrices x (M, K) of any row stride; weight (K,) or None (then y = h * rstd):

    rms_norm                  y, rstd
    rms_norm_add              y, h, rstd
    rms_norm_backward         dx, dweight
    rms_norm_shrink           y, rstd, and s_g = c_g/(1-p_q) (m_g * y) A_g^T as `products.lora_shrink` has it, of the
                              rounded y, while the rows of y are at hand
    rms_norm_shrink_backward  dx, dA, dweight: dy is the gradient of y from the base products alone, to which
                              sum_g c_g/(1-p_q) m_g * (ds_g A_g) is added on the way; dA_g is c_g/(1-p_q) ds_g^T
                              (m_g * y), with y formed again from x and rstd, rounded as the forward rounded it

Sums are in fp32 (float64 if an operand is float64) and rounded once: y to out_dtype, dx to x's dtype, dweight to
weight's, s to A's, dA to A's. rstd (M,) stays in fp32 (float64). A gradient that is not asked for (need_…) is empty.

What moves: on the CPU every operator reads x (and residual, d_h, dy) and writes y (h, dx) once. In Triton the same, but
for rms_norm_shrink_backward: x and dy once for dx, and x once more for dA; its second pass over a row is read from L2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native, products
from .backend import OPS, define, route
from .lora_linear import rows_of
from .norm_parts import (
    accumulator,
    check,
    differentiated,
    grad_or_empty,
    grad_or_empty_fake,
    graph_backward,
    result_dtype,
    shaped_like,
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """y (..., K) = x / sqrt(mean(x²) + eps) * (offset + weight); with `residual` (y, h) for h = x + residual.

    x: (..., K), any strides. weight: (K,) of any floating dtype, or None. offset: added to weight (Gemma's 1).
    residual: of x's shape and dtype. out_dtype: y's dtype; None is the promotion of x and weight, which is what
    Llama's norm returns; Gemma's returns x.dtype. Autocast leaves it alone, as it leaves the models' own norms.

    Kept for the backward: x (h, with a residual), rstd, weight.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    check("rms_norm", x, {"weight": weight}, residual, out_dtype)
    out = out_dtype or result_dtype(x, weight)
    if native.transformed(x, weight, residual):
        h = x if residual is None else x + residual
        y = formula(h, weight, eps, offset, out)
        return y if residual is None else (y, h)
    backend = route(x.device)
    if differentiated(x, weight, residual):
        return _RMSNorm.apply(x, residual, weight, float(eps), float(offset), out, backend)
    if residual is None:
        return shaped_like(OPS[backend].rms_norm(rows_of(x), weight, eps, offset, out)[0], x)
    y, h, _ = OPS[backend].rms_norm_add(rows_of(x), rows_of(residual), weight, eps, offset, out)
    return shaped_like(y, x), shaped_like(h, x)


def formula(x: Tensor, weight: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype) -> Tensor:
    """y in ordinary differentiable operators, for x of any shape."""
    h = x.to(accumulator(x, weight))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * (weight.to(h.dtype) + offset)).to(out_dtype)


def reference(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y (M, K) and rstd (M,)."""
    h = x.to(accumulator(x, weight))
    rstd = torch.rsqrt(h.square().mean(1) + eps)
    return _normalised(h, rstd, weight, offset).to(out_dtype), rstd


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, K), h (M, K) in x's dtype, rstd (M,)."""
    h = x + residual
    y, rstd = reference(h, weight, eps, offset, out_dtype)
    return y, h, rstd


def backward_reference(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, d_h: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx (M, K) in x's dtype and dweight (K,) in weight's, of h = x."""
    acc = accumulator(dy, x, weight)
    dy, h = dy.to(acc), x.to(acc) * rstd.to(acc)[:, None]
    g = dy if weight is None else dy * (weight.to(acc) + offset)
    dx = rstd.to(acc)[:, None] * (g - h * (g * h).mean(1, keepdim=True))
    dx = dx if d_h is None else dx + d_h
    return dx.to(x.dtype), grad_or_empty((dy * h).sum(0), weight, need_weight)


def shrink_reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, K), rstd (M,), s (M, G*r) in A's dtype."""
    y, rstd = reference(x, weight, eps, offset, out_dtype)
    return y, rstd, products.shrink_reference(y, A, scaling, p, seed)


def shrink_backward_reference(
    dy: Tensor,
    ds: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K), dA (G*r, K), dweight (K,)."""
    acc = accumulator(dy, ds, x, weight, A)
    y = _normalised(x.to(acc), rstd.to(acc), weight, offset).to(out_dtype)
    total = dy.to(acc, copy=True)
    dA = products.shrink_backward_reference(ds, y, A, scaling, p, seed, total)
    dx, dweight = backward_reference(total, x, rstd, weight, offset, None, need_weight)
    return dx if need_dx else x.new_empty(0), dA, dweight


def _normalised(h: Tensor, rstd: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    y = h * rstd[:, None]
    return y if weight is None else y * (weight.to(h.dtype) + offset)


def _fake(x: Tensor, weight: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[0], dtype=accumulator(x, weight))


def _add_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake(x, weight, eps, offset, out_dtype)
    return y, x.new_empty(x.shape), rstd


def _backward_fake(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, d_h: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), grad_or_empty_fake(x, accumulator(dy, x, weight), weight, need_weight)


def _shrink_fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake(x, weight, eps, offset, out_dtype)
    return y, rstd, A.new_empty(x.shape[0], A.shape[0])


def _shrink_backward_fake(
    dy: Tensor,
    ds: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else 0)
    acc = accumulator(dy, ds, x, weight, A)
    return dx, A.new_empty(A.shape), grad_or_empty_fake(x, acc, weight, need_weight)


define(
    "rms_norm",
    "(Tensor x, Tensor? weight, float eps, float offset, ScalarType out_dtype) -> (Tensor y, Tensor rstd)",
    reference=reference,
    fake=_fake,
    kernels="rms_norm",
)
define(
    "rms_norm_add",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, ScalarType out_dtype) "
    "-> (Tensor y, Tensor h, Tensor rstd)",
    reference=add_reference,
    fake=_add_fake,
    kernels="rms_norm",
)
define(
    "rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, float offset, Tensor? d_h, bool need_weight) "
    "-> (Tensor dx, Tensor dweight)",
    reference=backward_reference,
    fake=_backward_fake,
    kernels="rms_norm",
)
define(
    "rms_norm_shrink",
    "(Tensor x, Tensor? weight, float eps, float offset, Tensor A, float[] scaling, float p, Tensor? seed, "
    "ScalarType out_dtype) -> (Tensor y, Tensor rstd, Tensor s)",
    reference=shrink_reference,
    fake=_shrink_fake,
    kernels="rms_norm",
)
define(
    "rms_norm_shrink_backward",
    "(Tensor dy, Tensor ds, Tensor x, Tensor rstd, Tensor? weight, float offset, Tensor A, float[] scaling, float p, "
    "Tensor? seed, ScalarType out_dtype, bool need_dx, bool need_weight) -> (Tensor dx, Tensor dA, Tensor dweight)",
    reference=shrink_backward_reference,
    fake=_shrink_backward_fake,
    kernels="rms_norm",
)


class _RMSNorm(torch.autograd.Function):
    """y, or (y, h), from (x, residual, weight)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype,
        backend: str,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call = eps, offset, out_dtype, backend
        if residual is None:
            y, rstd = OPS[backend].rms_norm(rows_of(x), weight, eps, offset, out_dtype)
            ctx.save_for_backward(x, rstd, weight)
            return shaped_like(y, x)
        y, h, rstd = OPS[backend].rms_norm_add(rows_of(x), rows_of(residual), weight, eps, offset, out_dtype)
        h = shaped_like(h, x)
        ctx.save_for_backward(h, rstd, weight)
        return shaped_like(y, x), h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_h: Tensor | None = None) -> Any:
        h, rstd, weight = ctx.saved_tensors
        eps, offset, out_dtype, backend = ctx.call
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        dx, dweight = d_h, None
        if dy is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, dweight = graph_backward(lambda h, w: formula(h, w, eps, offset, out_dtype), dy, (h, weight))
            dx = dx if dx is None or d_h is None else dx + d_h
        elif dy is not None:
            rows = None if d_h is None else rows_of(d_h)
            dx, dweight = OPS[backend].rms_norm_backward(
                rows_of(dy), rows_of(h), rstd, weight, offset, rows, need_weight
            )
            dx = dx.view(h.shape)
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_weight else None,
            *(None,) * 4,
        )
