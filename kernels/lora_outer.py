"""The reduction over tokens for ranks too large to ride along in a fused pass: out_g = c_g · t_gᵀ (mask_g ∘ x)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._device import cast, dot, operand, pick
from ._launch import (
    chunks,
    config,
    limits,
    on_device,
    padded,
    partials,
    power_of_two,
    products,
    splits_for,
    sum_partials,
    unit_columns,
)
from .philox import keep_mask, threshold


@triton.jit(do_not_specialize=["threshold", "M", "i_first"])
def _outer_kernel(
    p_t, p_x, p_out, p_seed, c0, c1, c2, c3, threshold, M, K, R, i_first, m_part,
    stride_tm, stride_xm, stride_or, stride_ok, stride_part,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[gR + j, k] = c_g Σ_m t[m, gR + j] mask_g(m, k) x[m, k] for BR rows of one member and BK columns."""
    n_r = tl.cdiv(R, BR)
    i_g = tl.program_id(1) // n_r
    o_j = tl.program_id(1) % n_r * BR + tl.arange(0, BR)
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_c8 = tl.program_id(0) * (BK // 8) + tl.arange(0, BK // 8)
    m_r = o_j < R
    m_k = o_k < K
    o_r = i_g * R + o_j
    if DROP:
        seed = tl.load(p_seed)

    b_acc = tl.zeros((BR, BK), tl.float32)
    m_first = tl.program_id(2) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        p_block = p_t + o_m[:, None].to(tl.int64) * stride_tm + o_r[None, :]
        b_t = tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0)
        p_block = p_x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :]
        b_x = operand(tl.load(p_block, mask=m_m[:, None] & m_k[None, :], other=0.0), p_t.dtype.element_ty)
        if DROP:
            b_keep = keep_mask(seed, o_m, o_c8, i_first + i_g, threshold, BM, BK)
            b_x = tl.where(b_keep, b_x, 0.0).to(b_x.dtype)
        b_acc = dot(tl.trans(b_t), b_x, b_acc)

    p_block = p_out + tl.program_id(2).to(tl.int64) * stride_part + o_r[:, None].to(tl.int64) * stride_or
    p_block += o_k[None, :].to(tl.int64) * stride_ok
    b_acc *= pick(i_g, c0, c1, c2, c3)
    tl.store(p_block, cast(b_acc, p_out.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


def outer_product(
    out: torch.Tensor, t: torch.Tensor, x: torch.Tensor, c: Sequence[float], p: float, seed: torch.Tensor | None
) -> None:
    """out (G·r, K), or the transpose of a contiguous matrix, = c_g t_gᵀ (mask_g ∘ x): t (M, G·r), x (M, K), len(c) = G.

    x is read once for every 64 (fp32: 32) columns of t.
    """
    M, K = x.shape
    t, x = unit_columns(t), unit_columns(x)
    R = t.shape[1] // len(c)
    n = products(x, t)
    BR = power_of_two(R, 16, 32 if n == 6 else 64)
    tile = config(warps=4, stages=2 if n == 6 else 3, BM=64 if n == 1 else 32, BK=128 if n == 1 else 64, BR=BR)
    programs = triton.cdiv(K, tile["BK"]) * triton.cdiv(R, BR) * len(c)
    steps = triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(programs, steps, 4, limits(x.device).multiprocessors)
    work = out
    if parts > 1:  # laid out as `out` is, so that the second pass is a plain sum
        flat = out if out.is_contiguous() else out.t()
        work = partials(parts, flat)
        work = work if out.is_contiguous() else work.transpose(-1, -2)
    with on_device(x):
        for first, last in chunks(len(c)):
            _outer_kernel[(triton.cdiv(K, tile["BK"]), triton.cdiv(R, BR) * (last - first), parts)](
                t[:, first * R :], x, work[..., first * R :, :], seed if threshold(p) else None,
                *padded(c[first:last]), threshold(p), M, K, R, first, per_part * tile["BM"],
                t.stride(0), x.stride(0), work.stride(-2), work.stride(-1), out.numel(),
                DROP=threshold(p) > 0, **tile,
            )  # fmt: skip
        if parts > 1:
            flat = out if out.is_contiguous() else out.t()
            sum_partials((work if out.is_contiguous() else work.transpose(-1, -2), flat))
