"""The operators of `ops/layer_norm.py` on Triton, argument for argument; the formulas are there, the kernels in `norm`
and `norm_shrink`. What `rms_norm` says of strides, dtypes and passes holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import norm
from ._launch import unit_columns
from .norm_shrink import shrink_backward_fused, shrink_forward

__all__ = ["layer_norm", "layer_norm_add", "layer_norm_backward", "layer_norm_shrink", "layer_norm_shrink_backward"]

Maybe = torch.Tensor | None


def layer_norm(
    x: torch.Tensor, weight: Maybe, bias: Maybe, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd)."""
    norm.require(x=x, weight=weight, bias=bias)
    y, mean = norm.outputs(x, out_dtype)
    rstd = torch.empty_like(mean)
    parameters = norm.vector(weight), norm.vector(bias)
    norm.forward(unit_columns(x), None, *parameters, eps, offset, y, None, mean, rstd)
    return y, mean, rstd


def layer_norm_add(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    offset: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, mean, rstd)."""
    norm.require(x=x, residual=residual, weight=weight, bias=bias)
    y, mean = norm.outputs(x, out_dtype)
    rstd = torch.empty_like(mean)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    operands = unit_columns(x), unit_columns(residual), norm.vector(weight), norm.vector(bias)
    norm.forward(*operands, eps, offset, y, h, mean, rstd)
    return y, h, mean, rstd


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    offset: float,
    d_h: Maybe,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias)."""
    norm.require(dy=dy, x=x, weight=weight, bias=bias, d_h=d_h)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight, weight_out = norm.gradient(weight, x, need_weight)
    d_bias, bias_out = norm.gradient(bias, x, need_bias)
    d_h = None if d_h is None else unit_columns(d_h)
    rows = unit_columns(dy), unit_columns(x), d_h
    norm.backward(*rows, norm.vector(weight), offset, mean, rstd, dx, d_weight, d_bias)
    return dx, weight_out, bias_out


def layer_norm_shrink(
    x: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    offset: float,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float,
    seed: Maybe,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, rstd, s)."""
    norm.require(x=x, weight=weight, bias=bias, A=A)
    y, mean = norm.outputs(x, out_dtype)
    rstd = torch.empty_like(mean)
    s = torch.empty((x.shape[0], A.shape[0]), dtype=A.dtype, device=A.device)
    parameters, dropout = (norm.vector(weight), norm.vector(bias)), (unit_columns(A), scaling, p, seed)
    shrink_forward(unit_columns(x), *parameters, eps, offset, *dropout, y, mean, rstd, s)
    return y, mean, rstd, s


def layer_norm_shrink_backward(
    dy: torch.Tensor,
    ds: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    offset: float,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float,
    seed: Maybe,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dA, dweight, dbias)."""
    norm.require(dy=dy, ds=ds, x=x, weight=weight, bias=bias, A=A)
    dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    d_weight, weight_out = norm.gradient(weight, x, need_weight)
    d_bias, bias_out = norm.gradient(bias, x, need_bias)
    shrink_backward_fused(
        unit_columns(dy), unit_columns(ds), unit_columns(x), mean, rstd, norm.vector(weight), norm.vector(bias), offset,
        unit_columns(A), scaling, p, seed, out_dtype, dx if need_dx else None, dA, d_weight, d_bias,
    )  # fmt: skip
    return dx, dA, weight_out, bias_out
