"""A norm and the narrow products of what it feeds: s with the forward, the rim's part of dy and dA with the backward.

    forward    y of the norm, s_g = c_g (mask_g ∘ y) A_gᵀ of the rounded y      two passes over BM rows, one from L2
    backward   dx of dy + Σ_g c_g mask_g ∘ (ds_g A_g)                           likewise
               dA_g = c_g ds_gᵀ (mask_g ∘ y), y made again from x               a second kernel, by columns

c_g = scaling_g / (1 - p). Sums that cross programs go through an fp32 workspace and a second pass in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import norm
from ._device import cast, dot, dot_rim, operand, pick
from ._launch import (
    MEMBERS,
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
)
from .lora_backward import _shrink_backward_tile, shrink_backward
from .lora_expand import add_product
from .lora_outer import outer_product
from .lora_shrink import _shrink_tile, members_of
from .norm import add_statistics, centred, load_parameters, load_statistics, normalise, row_gradient
from .philox import keep_mask, threshold


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "members"])
def _norm_shrink_kernel(
    p_x, p_w, p_b, p_a, p_y, p_s, p_mean, p_rstd, p_seed, c0, c1, c2, c3, threshold, eps, offset, M, K, R, i_first,
    members, stride_xm, stride_ar, stride_ym, stride_sm,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, CENTRED: tl.constexpr, STORE: tl.constexpr, DROP: tl.constexpr,
    G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """s of G members and BR of their R columns; the first such program of a block of rows stores y and statistics."""
    n_c = tl.cdiv(R, BR)
    n_g = tl.cdiv(members, G)
    i_c = tl.program_id(0) % n_c
    i_g = tl.program_id(0) // n_c % n_g * G
    i_m = tl.program_id(0) // (n_c * n_g)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = i_c * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    o_c8 = tl.arange(0, BK // 8)
    m_m = o_m < M
    m_first = o_m < tl.where(i_c + i_g == 0, M, 0)
    p_xm = p_x + o_m[:, None].to(tl.int64) * stride_xm
    p_ym = p_y + o_m[:, None].to(tl.int64) * stride_ym
    if DROP:
        seed = tl.load(p_seed)

    b_mean = tl.zeros((BM,), tl.float32)
    b_square = tl.zeros((BM,), tl.float32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_x = tl.load(p_xm + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        n = tl.cast(tl.minimum(K - k, BK), tl.float32)
        b_mean, b_square = add_statistics(b_x, m_k, tl.cast(k, tl.float32), n, b_mean, b_square, CENTRED)
    b_rstd = tl.math.rsqrt(b_square / K + eps)
    if STORE:
        tl.store(p_rstd + o_m, b_rstd, mask=m_first)
        if CENTRED:
            tl.store(p_mean + o_m, b_mean, mask=m_first)

    accs = (tl.zeros((BM, BR), tl.float32),) * G
    for k in range(0, K, BK):
        m_k = k + o_k < K
        m_mk = m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_xm + (k + o_k)[None, :], mask=m_mk, other=0.0).to(tl.float32)
        b_w, b_b = load_parameters(p_w, p_b, offset, k + o_k, m_k, HAS_W, HAS_B)
        b_y = cast(normalise(b_x, b_mean, b_rstd, b_w, b_b, CENTRED), p_y.dtype.element_ty)
        if STORE:
            tl.store(p_ym + (k + o_k)[None, :], b_y, mask=m_first[:, None] & m_k[None, :])
        b_z = operand(tl.where(m_mk, b_y, 0.0).to(b_y.dtype), p_a.dtype.element_ty)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & ((i_g + g) * R + o_r < members * R)
            o_ar = ((i_g + g) * R + o_r).to(tl.int64) * stride_ar
            b_a = tl.load(p_a + o_ar[None, :] + (k + o_k)[:, None], mask=m_k[:, None] & m_r[None, :], other=0.0)
            b_zg = b_z
            if DROP:
                b_keep = keep_mask(seed, o_m, k // 8 + o_c8, i_first + i_g + g, threshold, BM, BK)
                b_zg = tl.where(b_keep, b_z, 0.0).to(b_z.dtype)
            new = new + (dot(b_zg, b_a, accs[g]),)
        accs = new
    for g in tl.static_range(G):
        m_r = (o_r < R) & ((i_g + g) * R + o_r < members * R)
        p_out = p_s + o_m[:, None].to(tl.int64) * stride_sm + ((i_g + g) * R + o_r)[None, :]
        b_s = accs[g] * pick(i_g + g, c0, c1, c2, c3)
        tl.store(p_out, cast(b_s, p_s.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


@triton.jit
def _with_rim(
    b_dy, p_ds, p_a, o_m, o_k, m_m, m_k, i_c8, seed, c0, c1, c2, c3, threshold, R, members, stride_dsm, stride_ar,
    dtype: tl.constexpr, DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dy + Σ_g c_g mask_g ∘ (ds_g A_g) of a block, fp32: G members of any rank."""
    o_c8 = i_c8 + tl.arange(0, BK // 8)
    for g in tl.static_range(G):
        b_rim = tl.zeros((BM, BK), tl.float32)
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            p_block = p_ds + o_m[:, None].to(tl.int64) * stride_dsm + (g * R + o_r)[None, :]
            b_ds = operand(tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0), p_a.dtype.element_ty)
            p_block = p_a + (g * R + o_r)[:, None].to(tl.int64) * stride_ar + o_k[None, :]
            b_a = tl.load(p_block, mask=m_r[:, None] & m_k[None, :], other=0.0)
            b_rim = dot_rim(b_ds, b_a, b_rim, dtype)
        b_rim *= pick(g, c0, c1, c2, c3)
        if DROP:
            b_rim = tl.where(keep_mask(seed, o_m, o_c8, g, threshold, BM, BK), b_rim, 0.0)
        b_dy += b_rim
    return b_dy


@triton.jit(do_not_specialize=["threshold", "M"])
def _norm_shrink_backward_kernel(
    p_dy, p_ds, p_x, p_w, p_a, p_mean, p_rstd, p_dx, p_dw, p_db, p_seed, c0, c1, c2, c3, threshold, offset, M, K, R,
    stride_dym, stride_dsm, stride_xm, stride_ar, stride_dxm,
    HAS_W: tl.constexpr, CENTRED: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx of BM rows and their part of dweight and dbias."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    p_dym = p_dy + o_m[:, None].to(tl.int64) * stride_dym
    p_xm = p_x + o_m[:, None].to(tl.int64) * stride_xm
    b_mean, b_rstd = load_statistics(p_mean, p_rstd, o_m, m_m, CENTRED)
    seed = 0
    if DROP:
        seed = tl.load(p_seed)
    b_sum = tl.zeros((BM,), tl.float32)
    b_along = tl.zeros((BM,), tl.float32)
    if DX:
        for k in range(0, K, BK):
            m_k = k + o_k < K
            m_mk = m_m[:, None] & m_k[None, :]
            b_dy = tl.load(p_dym + (k + o_k)[None, :], mask=m_mk, other=0.0).to(tl.float32)
            b_dy = _with_rim(
                b_dy, p_ds, p_a, o_m, k + o_k, m_m, m_k, k // 8, seed, c0, c1, c2, c3, threshold, R, G, stride_dsm,
                stride_ar, p_dx.dtype.element_ty, DROP, G, BM, BK, BR,
            )  # fmt: skip
            b_w, _ = load_parameters(p_w, p_w, offset, k + o_k, m_k, HAS_W, False)
            b_h = centred(tl.load(p_xm + (k + o_k)[None, :], mask=m_mk, other=0.0), b_mean, b_rstd, m_mk, CENTRED)
            b_g = b_dy * b_w[None, :]
            b_sum += tl.sum(b_g, axis=1)
            b_along += tl.sum(b_g * b_h, axis=1)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        m_mk = m_m[:, None] & m_k[None, :]
        b_dy = tl.load(p_dym + (k + o_k)[None, :], mask=m_mk, other=0.0).to(tl.float32)
        b_dy = _with_rim(
            b_dy, p_ds, p_a, o_m, k + o_k, m_m, m_k, k // 8, seed, c0, c1, c2, c3, threshold, R, G, stride_dsm,
            stride_ar, p_x.dtype.element_ty, DROP, G, BM, BK, BR,
        )  # fmt: skip
        b_h = centred(tl.load(p_xm + (k + o_k)[None, :], mask=m_mk, other=0.0), b_mean, b_rstd, m_mk, CENTRED)
        if DX:
            b_w, _ = load_parameters(p_w, p_w, offset, k + o_k, m_k, HAS_W, False)
            b_dx = row_gradient(b_dy * b_w[None, :], b_h, b_rstd, b_sum, b_along, K, CENTRED)
            p_out = p_dx + o_m[:, None].to(tl.int64) * stride_dxm + (k + o_k)[None, :]
            tl.store(p_out, cast(b_dx, p_dx.dtype.element_ty), mask=m_mk)
        o_part = tl.program_id(0).to(tl.int64) * K + k + o_k
        if DW:
            tl.store(p_dw + o_part, cast(tl.sum(b_dy * b_h, axis=0), p_dw.dtype.element_ty), mask=m_k)
        if DB:
            tl.store(p_db + o_part, cast(tl.sum(tl.where(m_mk, b_dy, 0.0), axis=0), p_db.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "members"])
def _norm_outer_kernel(
    p_ds, p_x, p_w, p_b, p_mean, p_rstd, p_da, p_seed, c0, c1, c2, c3, threshold, offset, M, K, R, i_first, members,
    m_part, stride_dsm, stride_xm, stride_dar, stride_part,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, CENTRED: tl.constexpr, y_dtype: tl.constexpr, a_dtype: tl.constexpr,
    DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dA of G members for BK columns and `m_part` rows, of y made again from x. Whole rank: BR >= R."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_c8 = tl.program_id(0) * (BK // 8) + tl.arange(0, BK // 8)
    o_r = tl.arange(0, BR)
    m_k = o_k < K
    if DROP:
        seed = tl.load(p_seed)
    b_w, b_b = load_parameters(p_w, p_b, offset, o_k, m_k, HAS_W, HAS_B)
    accs = (tl.zeros((BR, BK), tl.float32),) * G
    m_first = tl.program_id(1) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        m_mk = m_m[:, None] & m_k[None, :]
        b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, o_m, m_m, CENTRED)
        b_y = cast(normalise(b_x, b_mean, b_rstd, b_w, b_b, CENTRED), y_dtype)
        b_y = operand(b_y, a_dtype)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_block = p_ds + o_m[:, None].to(tl.int64) * stride_dsm + (g * R + o_r)[None, :]
            b_ds = operand(tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0), a_dtype)
            b_yg = b_y
            if DROP:
                b_keep = keep_mask(seed, o_m, o_c8, i_first + g, threshold, BM, BK)
                b_yg = tl.where(b_keep, b_y, 0.0).to(b_y.dtype)
            new = new + (dot(tl.trans(b_ds), b_yg, accs[g]),)
        accs = new
    p_da += tl.program_id(1).to(tl.int64) * stride_part
    for g in tl.static_range(G):
        m_r = (o_r < R) & (g * R + o_r < members * R)
        p_out = p_da + (g * R + o_r)[:, None].to(tl.int64) * stride_dar + o_k[None, :]
        b_da = accs[g] * pick(g, c0, c1, c2, c3)
        tl.store(p_out, cast(b_da, p_da.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


def shrink_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, offset: float,
    A: torch.Tensor, scaling: Sequence[float], p: float, seed: torch.Tensor | None,
    y: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor, s: torch.Tensor,
) -> None:  # fmt: skip
    """y (M, K), the statistics and s (M, G·r), all contiguous. x and A have contiguous rows."""
    M, K = x.shape
    if x.numel() == 0:
        s.zero_()
        return
    c, R, drop = members_of(scaling, A.shape[0], p)
    n = products(y, A)
    tile = _shrink_tile(R, min(len(c), 4), M, n, drop, limits(x.device).multiprocessors)
    if n == 6:
        tile["BK"] = 16  # y is one tile more than the plain product has: with 32 columns it spilled on sm_90 and 100
    with on_device(x):
        for first, last in chunks(len(c)):
            programs = triton.cdiv(M, tile["BM"]) * triton.cdiv(R, tile["BR"]) * triton.cdiv(last - first, tile["G"])
            _norm_shrink_kernel[(programs,)](
                x, weight, bias, A[first * R :], y, s[:, first * R :], mean, rstd, seed if drop else None,
                *padded(c[first:last]), threshold(p), float(eps), float(offset), M, K, R, first, last - first,
                x.stride(0), A.stride(0), y.stride(0), s.stride(0),
                HAS_W=weight is not None, HAS_B=bias is not None, CENTRED=mean is not None, STORE=first == 0,
                DROP=drop, **tile,
            )  # fmt: skip


def _rim_tile(R: int, M: int, K: int, n: int, drop: bool, multiprocessors: int) -> dict[str, Any]:
    """BM rows, four warps to 32 of them: fp32 tiles of dy, h' and the rim are three times 16 values a thread."""
    BM = power_of_two(M, 16, 32 if triton.cdiv(M, 32) >= multiprocessors else 16)
    return config(warps=BM // 8, stages=1, BM=BM, BK=32 if n == 6 else 64, BR=power_of_two(R, 16, 16 if n == 6 else 64))


def shrink_backward_fused(
    dy: torch.Tensor, ds: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor,
    weight: torch.Tensor | None, bias: torch.Tensor | None, offset: float, A: torch.Tensor, scaling: Sequence[float],
    p: float, seed: torch.Tensor | None, y_dtype: torch.dtype, dx: torch.Tensor | None, dA: torch.Tensor,
    dweight: torch.Tensor | None, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    """dA (G·r, K) and those of dx (M, K), dweight, dbias (K,) that are given. Rows are contiguous."""
    M, K = x.shape
    given = [t for t in (dx, dweight, dbias) if t is not None]
    if x.numel() == 0:
        for t in (dA, *given):
            t.zero_()
        return
    c, R, drop = members_of(scaling, A.shape[0], p)
    p, seed = (p, seed) if drop else (0.0, None)
    if given and len(c) > MEMBERS:
        # The rims of all members must be in a row's sums before its gradient is known: they are gathered in memory.
        total = dy.to(torch.float32, copy=True)
        y = torch.empty((M, K), dtype=y_dtype, device=x.device)
        norm.remake(x, weight, bias, offset, y, mean, rstd)
        if not shrink_backward(dA, total, ds, y, A, c, p, seed):
            outer_product(dA, ds, y, c, p, seed)
            for g, c_g in enumerate(c):
                rank = slice(g * R, (g + 1) * R)
                add_product(total, ds[:, rank], A[rank].t(), c_g, p, seed, g)
        norm.backward(total, x, None, weight, offset, mean, rstd, dx, dweight, dbias)
        return
    _outer(dA, ds, x, mean, rstd, weight, bias, offset, A, c, R, p, seed, y_dtype)
    if not given:
        return
    multiprocessors = limits(x.device).multiprocessors
    tile = _rim_tile(R, M, K, products(x, A), drop, multiprocessors)
    parts = triton.cdiv(M, tile["BM"])
    work_w, work_b = (None if t is None else partials(parts, t) for t in (dweight, dbias))
    with on_device(x):
        _norm_shrink_backward_kernel[(parts,)](
            dy, ds, x, weight, A, mean, rstd, dx, work_w, work_b, seed, *padded(c), threshold(p), float(offset),
            M, K, R, dy.stride(0), ds.stride(0), x.stride(0), A.stride(0), 0 if dx is None else dx.stride(0),
            HAS_W=weight is not None, CENTRED=mean is not None, DX=dx is not None, DW=dweight is not None,
            DB=dbias is not None, DROP=drop, G=len(c), **tile,
        )  # fmt: skip
        sum_partials(*((work, out) for work, out in ((work_w, dweight), (work_b, dbias)) if out is not None))


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _outer(
    dA: torch.Tensor, ds: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor,
    weight: torch.Tensor | None, bias: torch.Tensor | None, offset: float, A: torch.Tensor, c: Sequence[float], R: int,
    p: float, seed: torch.Tensor | None, y_dtype: torch.dtype,
) -> None:  # fmt: skip
    """dA: in one pass over x where its sums stay in registers, else of y in memory."""
    M, K = x.shape
    fp32 = 3 if A.dtype == torch.float32 and y_dtype == torch.bfloat16 else 6
    tile = _shrink_backward_tile(R, min(len(c), 4), M, fp32 if A.dtype == torch.float32 else 1)
    if tile is None:
        y = torch.empty((M, K), dtype=y_dtype, device=x.device)
        norm.remake(x, weight, bias, offset, y, mean, rstd)
        outer_product(dA, ds, y, c, p, seed)
        return
    programs, steps = triton.cdiv(K, tile["BK"]), triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(programs, steps, 4, limits(x.device).multiprocessors)
    work = partials(parts, dA)
    with on_device(x):
        for first, last in chunks(len(c), tile["G"]):
            _norm_outer_kernel[(programs, parts)](
                ds[:, first * R :], x, weight, bias, mean, rstd, work[..., first * R :, :], seed,
                *padded(c[first:last]), threshold(p), float(offset), M, K, R, first, last - first,
                per_part * tile["BM"], ds.stride(0), x.stride(0), dA.stride(0), dA.numel(),
                HAS_W=weight is not None, HAS_B=bias is not None, CENTRED=mean is not None,
                y_dtype=_TYPES[y_dtype], a_dtype=_TYPES[A.dtype], DROP=seed is not None, **tile,
            )  # fmt: skip
        sum_partials((work, dA))
