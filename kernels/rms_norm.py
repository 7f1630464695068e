"""The operators of `ops/rms_norm.py` on Triton, argument for argument; the formulas are there, the kernels in `norm`
and `norm_shrink`.

Any row stride, any mixture of fp32, bf16 and fp16; sums are fp32 and rounded once. Nothing synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import norm
from ._launch import unit_columns
from .norm_shrink import shrink_backward_fused, shrink_forward

__all__ = ["rms_norm", "rms_norm_add", "rms_norm_backward", "rms_norm_shrink", "rms_norm_shrink_backward"]

Maybe = torch.Tensor | None


def rms_norm(
    x: torch.Tensor, weight: Maybe, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd). One pass over x."""
    norm.require(x=x, weight=weight)
    y, rstd = norm.outputs(x, out_dtype)
    norm.forward(unit_columns(x), None, norm.vector(weight), None, eps, offset, y, None, None, rstd)
    return y, rstd


def rms_norm_add(
    x: torch.Tensor, residual: torch.Tensor, weight: Maybe, eps: float, offset: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd). One pass over x and residual."""
    norm.require(x=x, residual=residual, weight=weight)
    y, rstd = norm.outputs(x, out_dtype)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    operands = unit_columns(x), unit_columns(residual), norm.vector(weight)
    norm.forward(*operands, None, eps, offset, y, h, None, rstd)
    return y, h, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    offset: float,
    d_h: Maybe,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight). One pass over dy, x and d_h; dweight's partial sums are a few rows more."""
    norm.require(dy=dy, x=x, weight=weight, d_h=d_h)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight, returned = norm.gradient(weight, x, need_weight)
    d_h = None if d_h is None else unit_columns(d_h)
    norm.backward(unit_columns(dy), unit_columns(x), d_h, norm.vector(weight), offset, None, rstd, dx, d_weight, None)
    return dx, returned


def rms_norm_shrink(
    x: torch.Tensor,
    weight: Maybe,
    eps: float,
    offset: float,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float,
    seed: Maybe,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, rstd, s). x is read from memory once and once from L2."""
    norm.require(x=x, weight=weight, A=A)
    y, rstd = norm.outputs(x, out_dtype)
    s = torch.empty((x.shape[0], A.shape[0]), dtype=A.dtype, device=A.device)
    dropout = unit_columns(A), scaling, p, seed
    shrink_forward(unit_columns(x), norm.vector(weight), None, eps, offset, *dropout, y, None, rstd, s)
    return y, rstd, s


def rms_norm_shrink_backward(
    dy: torch.Tensor,
    ds: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: Maybe,
    offset: float,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float,
    seed: Maybe,
    out_dtype: torch.dtype,
    need_dx: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dA, dweight). dy and x are read from memory once, and once from L2, for dx; x once more for dA."""
    norm.require(dy=dy, ds=ds, x=x, weight=weight, A=A)
    dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=x.dtype, device=x.device)
    d_weight, returned = norm.gradient(weight, x, need_weight)
    shrink_backward_fused(
        unit_columns(dy), unit_columns(ds), unit_columns(x), None, rstd, norm.vector(weight), None, offset,
        unit_columns(A), scaling, p, seed, out_dtype, dx if need_dx else None, dA, d_weight, None,
    )  # fmt: skip
    return dx, dA, returned
