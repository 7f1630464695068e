"""The product that widens a LoRA's s again, added in place: y_g += s_g B_gᵀ, or dx += c · mask ∘ (ds A)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast, dot_rim, pick
from ._launch import MEMBERS, chunks, config, on_device, power_of_two, products, unit_columns
from .philox import keep_mask, threshold


@triton.jit
def member_of_tile(i_t, t1, t2, t3, n1, n2, n3, n4, BN: tl.constexpr):
    """(member, first column, end of the member) of tile `i_t`; member g has columns n_g … n_(g+1), tiles from t_g."""
    i_g = (i_t >= t1).to(tl.int32) + (i_t >= t2).to(tl.int32) + (i_t >= t3).to(tl.int32)
    return i_g, pick(i_g, 0, n1, n2, n3) + (i_t - pick(i_g, 0, t1, t2, t3)) * BN, pick(i_g, n1, n2, n3, n4)


def tiles_of_members(splits: Sequence[int], BN: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(tiles, (t1, t2, t3), (n1, n2, n3, n4)) for `member_of_tile`: no tile straddles two members. At most 4 splits."""
    sizes = [*splits, *[0] * (MEMBERS - len(splits))]
    tiles = list(accumulate(triton.cdiv(n, BN) for n in sizes))
    return tiles[-1], tuple(tiles[:3]), tuple(accumulate(sizes))


@triton.jit
def _rim_step(p_s, p_b, o_r, R, stride_br, m_m, m_n, b_acc, wide: tl.constexpr):
    """b_acc + s[:, o_r] B[:, o_r]ᵀ."""
    m_r = o_r < R
    b_s = tl.load(p_s + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
    b_b = tl.load(p_b + o_r[:, None].to(tl.int64) * stride_br, mask=m_r[:, None] & m_n[None, :], other=0.0)
    return dot_rim(b_s, b_b, b_acc, wide)


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "t1", "t2", "t3", "tiles"])
def _expand_kernel(
    p_y, p_s, p_b, p_seed, c, threshold, M, R, i_first, tiles, t1, t2, t3, n1, n2, n3, n4,
    stride_ym, stride_sm, stride_bn, stride_br,
    DROP: tl.constexpr, LOOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[m, n] += c · mask · Σ_j s[m, gR + j] B[n, j] for a BM x BN tile of member g."""
    i_t = tl.program_id(0) % tiles
    i_g, i_n, n_end = member_of_tile(i_t, t1, t2, t3, n1, n2, n3, n4, BN)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_n = i_n + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < n_end
    b_acc = tl.zeros((BM, BN), tl.float32)
    p_s += o_m[:, None].to(tl.int64) * stride_sm + i_g * R
    p_b += o_n[None, :].to(tl.int64) * stride_bn
    if LOOP:
        for i_r in range(0, R, BR):
            b_acc = _rim_step(p_s, p_b, i_r + tl.arange(0, BR), R, stride_br, m_m, m_n, b_acc, p_y.dtype.element_ty)
    else:
        b_acc = _rim_step(p_s, p_b, tl.arange(0, BR), R, stride_br, m_m, m_n, b_acc, p_y.dtype.element_ty)
    b_acc *= c
    if DROP:
        o_c8 = i_n // 8 + tl.arange(0, BN // 8)
        b_keep = keep_mask(tl.load(p_seed), o_m, o_c8, i_first + i_g, threshold, BM, BN)
        b_acc = tl.where(b_keep, b_acc, 0.0)
    p_block = p_y + o_m[:, None].to(tl.int64) * stride_ym + o_n[None, :]
    m_mn = m_m[:, None] & m_n[None, :]
    b_y = tl.load(p_block, mask=m_mn, other=0.0).to(tl.float32) + b_acc
    tl.store(p_block, cast(b_y, p_y.dtype.element_ty), mask=m_mn)


def _expand_tile(R: int, M: int, n: int) -> dict[str, Any]:
    """32 fp32 sums a thread, and as many elements of y."""
    BM = power_of_two(M, 16, 32 if n == 6 else 64)
    BR = power_of_two(R, 16, {1: 64, 3: 32, 6: 16}[n])
    return config(warps=BM // 8, stages=2, BM=BM, BN=128, BR=BR, LOOP=R > BR)


def _launch(
    y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, splits: Sequence[int], first: int, R: int,
    c: float, p: float, seed: torch.Tensor | None,
) -> None:  # fmt: skip
    M = y.shape[0]
    tile = _expand_tile(R, M, products(y, B))
    tiles, t, n = tiles_of_members(splits, tile["BN"])
    drop = threshold(p) > 0
    with on_device(y):
        _expand_kernel[(triton.cdiv(M, tile["BM"]) * tiles,)](
            y, s, B, seed if drop else None, c, threshold(p), M, R, first, tiles, *t, *n,
            y.stride(0), s.stride(0), B.stride(0), B.stride(1), DROP=drop, **tile,
        )  # fmt: skip


def expand_members(y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, splits: Sequence[int]) -> None:
    """y[:, columns of g] += s_g B_gᵀ: y (M, N) with contiguous rows, s (M, G·r), B (N, r), sum(splits) = N."""
    if y.numel() == 0:
        return
    s = unit_columns(s)
    R = B.shape[1]
    column = 0
    for first, last in chunks(len(splits)):
        part = list(splits[first:last])
        end = column + sum(part)
        if end > column:
            _launch(y[:, column:], s[:, first * R :], B[column:end], part, 0, R, 1.0, 0.0, None)
        column = end


def add_product(
    dx: torch.Tensor, ds: torch.Tensor, B: torch.Tensor, c: float, p: float, seed: torch.Tensor | None, member: int
) -> None:
    """dx += c · mask_member ∘ (ds Bᵀ): dx (M, N) with contiguous rows, ds (M, r), B (N, r) of any strides."""
    if dx.numel():
        _launch(dx, unit_columns(ds), B, [dx.shape[1]], member, B.shape[1], c, p, seed)
