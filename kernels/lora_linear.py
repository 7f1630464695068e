"""The operators of `ops/lora_linear.py` on Triton, argument for argument; the formulas are there.

x (M, K), A (G·r, K), B (N, r), s and ds (M, G·r), G members with one scaling each; c_g = scaling_g / (1 - p).
Row strides are free, rows are contiguous (inputs that have none are copied). Any rank, any mixture of fp32, bf16 and
fp16; fp32 products are right to fp32 (see `_device.dot`), sums are fp32 and rounded once. `seed`: int64 tensor of one
element on x's device, read there. Nothing synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._launch import require_float, require_unit_columns, unit_columns
from .lora_backward import expand_backward, shrink_backward
from .lora_expand import add_product, expand_members
from .lora_outer import outer_product
from .lora_shrink import members_of, shrink_into
from .lora_wide import wide, wide_backward

__all__ = [
    "lora_expand_",
    "lora_expand_backward",
    "lora_linear_wide",
    "lora_linear_wide_backward",
    "lora_shrink",
    "lora_shrink_backward",
]


def lora_shrink(
    x: torch.Tensor, A: torch.Tensor, scaling: Sequence[float], p: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """s_g = c_g (mask_g ∘ x) A_gᵀ -> (M, G·r) in A's dtype. One pass over x."""
    require_float(x=x, A=A)
    out = torch.empty((x.shape[0], A.shape[0]), dtype=A.dtype, device=x.device)
    return shrink_into(out, x, A, scaling, p, seed)


def lora_expand_(y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, splits: Sequence[int]) -> None:
    """y_g += s_g B_gᵀ in place; y (M, sum(splits)) of any row stride. One pass over y."""
    require_float(y=y, s=s, B=B)
    require_unit_columns("y", y)
    if sum(splits) != B.shape[0] or y.shape[1] != B.shape[0]:
        raise ValueError(f"splits {list(splits)} must add up to y's columns and B's rows, got {y.shape} and {B.shape}")
    expand_members(y, s, B, splits)


def lora_expand_backward(dy: torch.Tensor, s: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ds = dy B in s's dtype, dB = dyᵀ s in B's dtype) of one member.

    One pass over dy up to rank 32 or so (see `expand_backward`); beyond, one for ds and one for dB.
    """
    require_float(dy=dy, s=s, B=B)
    M, N = dy.shape
    ds = torch.empty((M, B.shape[1]), dtype=s.dtype, device=dy.device)
    dB = torch.empty(B.shape, dtype=B.dtype, device=B.device)
    if M == 0 or N == 0:
        return ds.zero_(), dB.zero_()
    dy, s, B = unit_columns(dy), unit_columns(s), unit_columns(B)
    if not expand_backward(dy, s, B, ds, dB):
        shrink_into(ds, dy, B.t(), [1.0], 0.0, None)
        outer_product(dB.t(), s, dy, [1.0], 0.0, None)
    return ds, dB


def lora_shrink_backward(
    ds: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    dx: torch.Tensor | None = None,
) -> torch.Tensor:
    """dA_g = c_g ds_gᵀ (mask_g ∘ x) -> (G·r, K) in A's dtype; dx += Σ_g c_g mask_g ∘ (ds_g A_g) in place when given.

    One pass over x and dx with each mask made once, up to 64 columns of ds (16 in fp32); beyond, several.
    """
    require_float(ds=ds, x=x, A=A)
    M, K = x.shape
    if dx is not None:
        require_unit_columns("dx", dx)
    dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    if M == 0 or K == 0:
        return dA.zero_()
    x, ds, A = unit_columns(x), unit_columns(ds), unit_columns(A)
    c, R, drop = members_of(scaling, A.shape[0], p)
    p = p if drop else 0.0
    if not shrink_backward(dA, dx, ds, x, A, c, p, seed):
        outer_product(dA, ds, x, c, p, seed)
        if dx is not None:
            for g, c_g in enumerate(c):
                rank = slice(g * R, (g + 1) * R)
                add_product(dx, ds[:, rank], A[rank].t(), c_g, p, seed, g)
    return dA


def lora_linear_wide(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    B: torch.Tensor,
    splits: Sequence[int],
) -> torch.Tensor:
    """y_g = x W_gᵀ + b_g + s_g B_gᵀ -> (M, N) in x's dtype: base and adapter in one kernel, y written once."""
    require_float(x=x, weight=weight, s=s, B=B)
    if sum(splits) != weight.shape[0] or B.shape[0] != weight.shape[0]:
        raise ValueError(
            f"splits {list(splits)} must add up to weight's rows and B's, got {weight.shape} and {B.shape}"
        )
    return wide(unit_columns(x), weight, bias, unit_columns(s), B, splits)


def lora_linear_wide_backward(
    dy: torch.Tensor,
    weight: torch.Tensor,
    ds: torch.Tensor,
    A: torch.Tensor,
    scaling: Sequence[float],
    p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx = dy W + Σ_g c_g mask_g ∘ (ds_g A_g) -> (M, K) in dy's dtype, written once."""
    require_float(dy=dy, weight=weight, ds=ds, A=A)
    c, R, drop = members_of(scaling, A.shape[0], p)
    return wide_backward(unit_columns(dy), weight, unit_columns(ds), unit_columns(A), c, R, p if drop else 0.0, seed)
