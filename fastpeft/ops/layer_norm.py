"""LayerNorm, alone, with the residual addition before it, and with the narrow products of the projections it feeds.

    h = x + residual                                   rounded to x's dtype, as the model's own addition is
    y = (h - mean(h)) * rstd * (offset + weight) + bias          rstd = 1 / sqrt(var(h) + eps), var over K, one a row

Ba, Kiros, Hinton: "Layer Normalization" (2016), eq. 4; F.layer_norm. offset is 0 there and 1 in Nemotron; Cohere's has
no bias. With g = dy * (offset + weight) and h' = (h - mean) * rstd the gradients are

    dx = dresidual = rstd * (g - mean(g) - h' * mean(g * h')) + d_h      d_h: the gradient that arrives at h directly
    dweight = sum over rows of dy * h'                                   dbias = sum over rows of dy

Operators, on matrices x (M, K) of any row stride; weight (K,) or None (then the factor is 1), bias (K,) or None:

    layer_norm                  y, mean, rstd
    layer_norm_add              y, h, mean, rstd
    layer_norm_backward         dx, dweight, dbias
    layer_norm_shrink           y, mean, rstd, s
    layer_norm_shrink_backward  dx, dA, dweight, dbias

The last two, the roundings, the empty gradients and what moves are as in `rms_norm`; mean (M,) is kept beside rstd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native, products
from .backend import OPS, autocast_enabled, define, route
from .lora_linear import rows_of
from .norm_parts import (
    accumulator,
    check,
    differentiated,
    grad_or_empty,
    grad_or_empty_fake,
    graph_backward,
    shaped_like,
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """y (..., K) = (x - mean(x)) / sqrt(var(x) + eps) * (offset + weight) + bias; with `residual` (y, h).

    x: (..., K), any strides. weight, bias: (K,) of any floating dtype, or None. offset: added to weight. residual: of
    x's shape and dtype; h = x + residual. out_dtype: y's dtype; None is x's. Under autocast None is what F.layer_norm
    returns there: fp32 on every device but the CPU.

    Kept for the backward: x (h, with a residual), mean, rstd, weight.

    Raises ValueError on shapes or dtypes that do not fit.
    """
    check("layer_norm", x, {"weight": weight, "bias": bias}, residual, out_dtype)
    out = out_dtype or _default_dtype(x)
    if native.transformed(x, weight, bias, residual):
        h = x if residual is None else x + residual
        y = formula(h, weight, bias, eps, offset, out)
        return y if residual is None else (y, h)
    backend = route(x.device)
    if differentiated(x, weight, bias, residual):
        return _LayerNorm.apply(x, residual, weight, bias, float(eps), float(offset), out, backend)
    if residual is None:
        return shaped_like(OPS[backend].layer_norm(rows_of(x), weight, bias, eps, offset, out)[0], x)
    y, h, _, _ = OPS[backend].layer_norm_add(rows_of(x), rows_of(residual), weight, bias, eps, offset, out)
    return shaped_like(y, x), shaped_like(h, x)


def _default_dtype(x: Tensor) -> torch.dtype:
    if x.device.type != "cpu" and x.dtype != torch.float64 and autocast_enabled(x.device):
        return torch.float32
    return x.dtype


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> Tensor:
    """y in ordinary differentiable operators, for x of any shape."""
    h = x.to(accumulator(x, weight, bias))
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * (weight.to(h.dtype) + offset)
    return (y if bias is None else y + bias.to(h.dtype)).to(out_dtype)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, K), mean (M,) and rstd (M,)."""
    h = x.to(accumulator(x, weight, bias))
    mean = h.mean(1)
    rstd = torch.rsqrt((h - mean[:, None]).square().mean(1) + eps)
    return _normalised(h, mean, rstd, weight, bias, offset).to(out_dtype), mean, rstd


def add_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, K), h (M, K) in x's dtype, mean (M,), rstd (M,)."""
    h = x + residual
    y, mean, rstd = reference(h, weight, bias, eps, offset, out_dtype)
    return y, h, mean, rstd


def backward_reference(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: float,
    d_h: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (M, K) in x's dtype, dweight and dbias (K,) in weight's and bias's. Of bias only the dtype matters."""
    acc = accumulator(dy, x, weight)
    dy, h = dy.to(acc), (x.to(acc) - mean.to(acc)[:, None]) * rstd.to(acc)[:, None]
    g = dy if weight is None else dy * (weight.to(acc) + offset)
    dx = rstd.to(acc)[:, None] * (g - g.mean(1, keepdim=True) - h * (g * h).mean(1, keepdim=True))
    dx = dx if d_h is None else dx + d_h
    return (
        dx.to(x.dtype),
        grad_or_empty((dy * h).sum(0), weight, need_weight),
        grad_or_empty(dy.sum(0), bias, need_bias),
    )


def shrink_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, K), mean (M,), rstd (M,), s (M, G*r) in A's dtype."""
    y, mean, rstd = reference(x, weight, bias, eps, offset, out_dtype)
    return y, mean, rstd, products.shrink_reference(y, A, scaling, p, seed)


def shrink_backward_reference(
    dy: Tensor,
    ds: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (M, K), dA (G*r, K), dweight (K,), dbias (K,)."""
    acc = accumulator(dy, ds, x, weight, bias, A)
    y = _normalised(x.to(acc), mean.to(acc), rstd.to(acc), weight, bias, offset).to(out_dtype)
    total = dy.to(acc, copy=True)
    dA = products.shrink_backward_reference(ds, y, A, scaling, p, seed, total)
    dx, dweight, dbias = backward_reference(total, x, mean, rstd, weight, bias, offset, None, need_weight, need_bias)
    return dx if need_dx else x.new_empty(0), dA, dweight, dbias


def _normalised(
    h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float
) -> Tensor:
    y = (h - mean[:, None]) * rstd[:, None]
    y = y if weight is None else y * (weight.to(h.dtype) + offset)
    return y if bias is None else y + bias.to(h.dtype)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x, weight, bias)
    rows = x.shape[0]
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(rows, dtype=acc), x.new_empty(rows, dtype=acc)


def _add_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake(x, weight, bias, eps, offset, out_dtype)
    return y, x.new_empty(x.shape), mean, rstd


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: float,
    d_h: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(dy, x, weight)
    return (
        x.new_empty(x.shape),
        grad_or_empty_fake(x, acc, weight, need_weight),
        grad_or_empty_fake(x, acc, bias, need_bias),
    )


def _shrink_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake(x, weight, bias, eps, offset, out_dtype), A.new_empty(x.shape[0], A.shape[0])


def _shrink_backward_fake(
    dy: Tensor,
    ds: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: float,
    A: Tensor,
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(dy, ds, x, weight, bias, A)
    return (
        x.new_empty(x.shape if need_dx else 0),
        A.new_empty(A.shape),
        grad_or_empty_fake(x, acc, weight, need_weight),
        grad_or_empty_fake(x, acc, bias, need_bias),
    )


_NORM = "Tensor? weight, Tensor? bias, float eps, float offset"
define(
    "layer_norm",
    f"(Tensor x, {_NORM}, ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=reference,
    fake=_fake,
    kernels="layer_norm",
)
define(
    "layer_norm_add",
    f"(Tensor x, Tensor residual, {_NORM}, ScalarType out_dtype) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    reference=add_reference,
    fake=_add_fake,
    kernels="layer_norm",
)
define(
    "layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, float offset, Tensor? d_h, "
    "bool need_weight, bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=backward_reference,
    fake=_backward_fake,
    kernels="layer_norm",
)
define(
    "layer_norm_shrink",
    f"(Tensor x, {_NORM}, Tensor A, float[] scaling, float p, Tensor? seed, ScalarType out_dtype) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor s)",
    reference=shrink_reference,
    fake=_shrink_fake,
    kernels="layer_norm",
)
define(
    "layer_norm_shrink_backward",
    "(Tensor dy, Tensor ds, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, float offset, Tensor A, "
    "float[] scaling, float p, Tensor? seed, ScalarType out_dtype, bool need_dx, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dA, Tensor dweight, Tensor dbias)",
    reference=shrink_backward_reference,
    fake=_shrink_backward_fake,
    kernels="layer_norm",
)


class _LayerNorm(torch.autograd.Function):
    """y, or (y, h), from (x, residual, weight, bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: float,
        out_dtype: torch.dtype,
        backend: str,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call = eps, offset, out_dtype, backend
        call = (weight, bias, eps, offset, out_dtype)
        if residual is None:
            y, mean, rstd = OPS[backend].layer_norm(rows_of(x), *call)
            ctx.save_for_backward(x, mean, rstd, weight, bias)
            return shaped_like(y, x)
        y, h, mean, rstd = OPS[backend].layer_norm_add(rows_of(x), rows_of(residual), *call)
        h = shaped_like(h, x)
        ctx.save_for_backward(h, mean, rstd, weight, bias)
        return shaped_like(y, x), h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_h: Tensor | None = None) -> Any:
        h, mean, rstd, weight, bias = ctx.saved_tensors
        eps, offset, out_dtype, backend = ctx.call
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = d_h, None, None
        if dy is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, dweight, dbias = graph_backward(
                lambda h, w, b: formula(h, w, b, eps, offset, out_dtype), dy, (h, weight, bias)
            )
            dx = dx if dx is None or d_h is None else dx + d_h
        elif dy is not None:
            rows = None if d_h is None else rows_of(d_h)
            dx, dweight, dbias = OPS[backend].layer_norm_backward(
                rows_of(dy), rows_of(h), mean, rstd, weight, bias, offset, rows, need_weight, need_bias
            )
            dx = dx.view(h.shape)
        return (
            dx if need_x else None,
            dx if need_residual else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *(None,) * 4,
        )
