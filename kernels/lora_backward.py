"""The two fused backwards of a LoRA's narrow products: one pass over the big operand gives both results.

    expand:  ds_g = dy_g B_g                            dB_g = dy_gᵀ s_g
    shrink:  dA_g = c_g · ds_gᵀ (mask_g ∘ x)            dx  += Σ_g c_g · mask_g ∘ (ds_g A_g)

A program keeps the sums over tokens (dB, dA) of its columns in registers while it walks down the rows. Sums that cross
programs go through an fp32 workspace and a second pass in a fixed order: the same bits every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast, dot, dot_rim, operand, pick
from ._launch import (
    aligned,
    chunks,
    config,
    limits,
    on_device,
    padded,
    partials,
    per_pass,
    power_of_two,
    products,
    splits_for,
    sum_partials,
)
from .philox import keep_mask, threshold


@triton.jit(do_not_specialize=["M"])
def _expand_backward_kernel(
    p_dy, p_s, p_b, p_ds, p_db, c, M, N, R, m_part,
    stride_dym, stride_sm, stride_bn, stride_ds_part, stride_db_part,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """ds = dy B over BN columns and dB = c dyᵀ s over `m_part` rows. Whole rank: BR >= R."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    m_r = o_r < R
    m_nr = m_n[:, None] & m_r[None, :]
    b_b = tl.load(p_b + o_n[:, None].to(tl.int64) * stride_bn + o_r[None, :], mask=m_nr, other=0.0)
    p_ds += tl.program_id(0).to(tl.int64) * stride_ds_part
    b_acc = tl.zeros((BN, BR), tl.float32)
    m_first = tl.program_id(1) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        m_mr = m_m[:, None] & m_r[None, :]
        p_block = p_dy + o_m[:, None].to(tl.int64) * stride_dym + o_n[None, :]
        b_dy = operand(tl.load(p_block, mask=m_m[:, None] & m_n[None, :], other=0.0), b_b.dtype)
        b_ds = dot(b_dy, b_b, tl.zeros((BM, BR), tl.float32))
        tl.store(p_ds + o_m[:, None].to(tl.int64) * R + o_r[None, :], cast(b_ds, p_ds.dtype.element_ty), mask=m_mr)
        b_s = tl.load(p_s + o_m[:, None].to(tl.int64) * stride_sm + o_r[None, :], mask=m_mr, other=0.0)
        b_acc = dot(tl.trans(b_dy), operand(b_s, b_b.dtype), b_acc)
    p_block = p_db + tl.program_id(1).to(tl.int64) * stride_db_part + o_n[:, None].to(tl.int64) * R + o_r[None, :]
    tl.store(p_block, cast(b_acc * c, p_db.dtype.element_ty), mask=m_nr)


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "members"])
def _shrink_backward_kernel(
    p_ds, p_x, p_a, p_da, p_dx, p_seed, c0, c1, c2, c3, threshold, M, K, R, i_first, members, m_part,
    stride_dsm, stride_xm, stride_ar, stride_dar, stride_dxm, stride_part,
    HAS_DX: tl.constexpr, DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dA of G members and, with HAS_DX, dx += the rim, for BK columns and `m_part` rows. Whole rank: BR >= R."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_c8 = tl.program_id(0) * (BK // 8) + tl.arange(0, BK // 8)
    o_r = tl.arange(0, BR)
    m_k = o_k < K
    if DROP:
        seed = tl.load(p_seed)

    accs = (tl.zeros((BR, BK), tl.float32),) * G
    rims = ()
    if HAS_DX:
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_rim = p_a + (g * R + o_r)[:, None].to(tl.int64) * stride_ar + o_k[None, :]
            rims = rims + (tl.load(p_rim, mask=m_r[:, None] & m_k[None, :], other=0.0),)

    m_first = tl.program_id(1) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        m_mk = m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :], mask=m_mk, other=0.0)
        b_x = operand(b_x, p_a.dtype.element_ty)
        if HAS_DX:
            p_out = p_dx + o_m[:, None].to(tl.int64) * stride_dxm + o_k[None, :]
            b_dx = tl.load(p_out, mask=m_mk, other=0.0).to(tl.float32)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_block = p_ds + o_m[:, None].to(tl.int64) * stride_dsm + (g * R + o_r)[None, :]
            b_ds = operand(tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0), p_a.dtype.element_ty)
            b_xg = b_x
            if DROP:
                b_keep = keep_mask(seed, o_m, o_c8, i_first + g, threshold, BM, BK)
                b_xg = tl.where(b_keep, b_x, 0.0).to(b_x.dtype)
            new = new + (dot(tl.trans(b_ds), b_xg, accs[g]),)
            if HAS_DX:
                b_rim = dot_rim(b_ds, rims[g], tl.zeros((BM, BK), tl.float32), p_dx.dtype.element_ty)
                b_rim *= pick(g, c0, c1, c2, c3)
                if DROP:
                    b_rim = tl.where(b_keep, b_rim, 0.0)
                b_dx += b_rim
        accs = new
        if HAS_DX:
            tl.store(p_out, cast(b_dx, p_dx.dtype.element_ty), mask=m_mk)

    p_da += tl.program_id(1).to(tl.int64) * stride_part
    for g in tl.static_range(G):
        m_r = (o_r < R) & (g * R + o_r < members * R)
        p_out = p_da + (g * R + o_r)[:, None].to(tl.int64) * stride_dar + o_k[None, :]
        b_da = accs[g] * pick(g, c0, c1, c2, c3)
        tl.store(p_out, cast(b_da, p_da.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


def _expand_backward_tile(R: int, M: int, n: int) -> dict[str, Any] | None:
    """The tile; None where dB's sums would not stay in registers.

    Up to 64 sums a thread, fewer beside those of `n` > 1 products: the wider the panel, the fewer partial sums of
    ds (N / BN of them).
    """
    BR = power_of_two(R, 16, 1024)
    most = {1: 128, 3: 64, 6: 32}[n]
    if most < BR:
        return None
    BN = min(256, {1: 8192, 3: 4096, 6: 1024}[n] // BR)
    return config(warps=4, stages=2 if n == 6 else 3, BM=power_of_two(M, 16, 32), BN=BN, BR=BR)


def expand_backward(
    dy: torch.Tensor, s: torch.Tensor, B: torch.Tensor, ds: torch.Tensor, dB: torch.Tensor, c: float = 1.0
) -> bool:
    """ds (M, r) = dy B and dB (N, r) = c dyᵀ s, both contiguous, from one pass over dy (M, N).

    False, and nothing is done, where the rank is too large for that: where writing and reading the partial sums would
    move more than a second pass over dy does.

    All operands have contiguous rows and M, N > 0.
    """
    M, N = dy.shape
    R = B.shape[1]
    tile = _expand_backward_tile(R, M, products(dy, B))
    if tile is None:
        return False
    panels = triton.cdiv(N, tile["BN"])
    steps = triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(panels, steps, 4, limits(dy.device).multiprocessors)
    sums = (panels * M if panels > 1 else 0) + (parts * N if parts > 1 else 0)
    if 2 * 4 * R * sums > dy.element_size() * M * N:
        return False
    ds_work, dB_work = partials(panels, ds), partials(parts, dB)
    with on_device(dy):
        _expand_backward_kernel[(panels, parts)](
            dy, s, B, ds_work, dB_work, c, M, N, R, per_part * tile["BM"],
            dy.stride(0), s.stride(0), B.stride(0), ds.numel(), dB.numel(), **tile,
        )  # fmt: skip
        sum_partials((ds_work, ds), (dB_work, dB))
    return True


def _shrink_backward_tile(R: int, members: int, M: int, n: int, vector: bool = True) -> dict[str, Any] | None:
    """The tile; None where the sums of one member (BR x BK) would not stay in registers.

    BK = 64 columns are one 128-byte line of a 16-bit x, and give enough programs that dA rarely needs a second pass.
    """
    BR = power_of_two(R, 16, 1024)
    if {1: 64, 3: 32, 6: 16}[n] < BR:
        return None
    G = per_pass(members, ({1: 48, 3: 32, 6: 16}[n] if vector else 16) // BR)
    BM = power_of_two(M, 16, 16 if n == 6 else 32)
    return config(warps=4, stages=2, G=G, BM=BM, BK=64, BR=BR)


def shrink_backward(
    dA: torch.Tensor, dx: torch.Tensor | None, ds: torch.Tensor, x: torch.Tensor, A: torch.Tensor,
    c: Sequence[float], p: float, seed: torch.Tensor | None,
) -> bool:  # fmt: skip
    """dA (G·r, K), contiguous, and dx += rim from one pass over x (M, K). False, nothing done: the rank is too large.

    All operands have contiguous rows and M, K > 0; len(c) = G.
    """
    M, K = x.shape
    R = A.shape[0] // len(c)
    tile = _shrink_backward_tile(R, min(len(c), 4), M, products(x, A), aligned(x))
    if tile is None:
        return False
    programs = triton.cdiv(K, tile["BK"])
    steps = triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(programs, steps, 4, limits(x.device).multiprocessors)
    work = partials(parts, dA)
    drop = threshold(p) > 0
    with on_device(x):
        for first, last in chunks(len(c), tile["G"]):
            _shrink_backward_kernel[(programs, parts)](
                ds[:, first * R :], x, A[first * R :], work[..., first * R :, :], dx, seed if drop else None,
                *padded(c[first:last]), threshold(p), M, K, R, first, last - first, per_part * tile["BM"],
                ds.stride(0), x.stride(0), A.stride(0), dA.stride(0), 0 if dx is None else dx.stride(0), dA.numel(),
                HAS_DX=dx is not None, DROP=drop, **tile,
            )  # fmt: skip
        sum_partials((work, dA))
    return True
