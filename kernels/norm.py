"""RMSNorm and LayerNorm, forward and backward: the kernels behind `rms_norm` and `layer_norm`, where the operators are.

A program takes whole rows: they are read once and stay in registers (up to 16,384 columns; beyond, a row is walked
through piece by piece and read again from L2). The gradients of weight and bias are summed by programs that take many
rows each, and a second pass in a fixed order: the same bits every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast
from ._launch import config, limits, on_device, partials, power_of_two, require_float, sum_partials

WHOLE_COLUMNS = 16384  # of a row that stays in registers; half of it beside the sums for weight and bias
PIECE = 4096


@triton.jit
def load_parameters(p_w, p_b, offset, o_k, m_k, HAS_W: tl.constexpr, HAS_B: tl.constexpr):
    """offset + weight and bias of some columns, fp32; 1 and 0 where there is none."""
    b_w = tl.full(o_k.shape, 1.0, tl.float32)
    if HAS_W:
        b_w = tl.load(p_w + o_k, mask=m_k, other=0.0).to(tl.float32) + offset
    b_b = tl.zeros(o_k.shape, tl.float32)
    if HAS_B:
        b_b = tl.load(p_b + o_k, mask=m_k, other=0.0).to(tl.float32)
    return b_w, b_b


@triton.jit
def statistics(b_h, m_k, n, CENTRED: tl.constexpr):
    """Mean and sum of squared deviations of rows of `n` columns `b_h` (zero where masked).

    Not centred, 0 and the plain sum of squares.
    """
    b_mean = tl.zeros((b_h.shape[0],), tl.float32)
    b_d = b_h
    if CENTRED:
        b_mean = tl.sum(b_h, axis=1) / n
        b_d = tl.where(m_k[None, :], b_h - b_mean[:, None], 0.0)
    return b_mean, tl.sum(b_d * b_d, axis=1)


@triton.jit
def add_statistics(b_h, m_k, n_before, n, b_mean, b_square, CENTRED: tl.constexpr):
    """`statistics` of rows with `n` more columns `b_h` after `n_before`.

    Merging is Chan, Golub and LeVeque's (1979), which loses no digits where the mean is large.
    """
    b_new, b_more = statistics(b_h, m_k, n, CENTRED)
    b_square += b_more
    if CENTRED:
        b_delta = b_new - b_mean
        b_square += b_delta * b_delta * (n_before * n / (n_before + n))
        b_mean += b_delta * (n / (n_before + n))
    return b_mean, b_square


@triton.jit
def normalise(b_h, b_mean, b_rstd, b_w, b_b, CENTRED: tl.constexpr):
    """y, fp32."""
    if CENTRED:
        return (b_h - b_mean[:, None]) * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    return b_h * b_rstd[:, None] * b_w[None, :]


@triton.jit
def _load_h(p_x, p_r, m_mk, ADD: tl.constexpr):
    """x, or x + residual rounded to x's dtype."""
    b_x = tl.load(p_x, mask=m_mk, other=0.0)
    if ADD:
        b_r = tl.load(p_r, mask=m_mk, other=0.0)
        b_x = cast(b_x.to(tl.float32) + b_r.to(tl.float32), p_x.dtype.element_ty)
    return b_x


@triton.jit(do_not_specialize=["M"])
def _norm_kernel(
    p_x, p_r, p_w, p_b, p_y, p_h, p_mean, p_rstd, eps, offset, M, K, stride_xm, stride_rm, stride_ym,
    ADD: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, CENTRED: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y, the statistics and, with ADD, h of BM rows."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_m = o_m < M
    p_xm = p_x + o_m[:, None].to(tl.int64) * stride_xm
    p_rm = p_xm
    p_ym = p_y + o_m[:, None].to(tl.int64) * stride_ym
    p_hm = p_ym
    if ADD:
        p_rm = p_r + o_m[:, None].to(tl.int64) * stride_rm
        p_hm = p_h + o_m[:, None].to(tl.int64) * stride_ym
    if WHOLE:
        m_k = o_k < K
        m_mk = m_m[:, None] & m_k[None, :]
        b_x = _load_h(p_xm + o_k[None, :], p_rm + o_k[None, :], m_mk, ADD)
        if ADD:
            tl.store(p_hm + o_k[None, :], b_x, mask=m_mk)
        b_h = b_x.to(tl.float32)
        b_mean, b_square = statistics(b_h, m_k, tl.cast(K, tl.float32), CENTRED)
        b_rstd = tl.math.rsqrt(b_square / K + eps)
        b_w, b_b = load_parameters(p_w, p_b, offset, o_k, m_k, HAS_W, HAS_B)
        b_y = normalise(b_h, b_mean, b_rstd, b_w, b_b, CENTRED)
        tl.store(p_ym + o_k[None, :], cast(b_y, p_y.dtype.element_ty), mask=m_mk)
    else:
        b_mean = tl.zeros((BM,), tl.float32)
        b_square = tl.zeros((BM,), tl.float32)
        for k in range(0, K, BK):
            m_k = k + o_k < K
            b_x = _load_h(p_xm + (k + o_k)[None, :], p_rm + (k + o_k)[None, :], m_m[:, None] & m_k[None, :], ADD)
            n = tl.minimum(K - k, BK).to(tl.float32)
            n_before = tl.cast(k, tl.float32)
            b_mean, b_square = add_statistics(b_x.to(tl.float32), m_k, n_before, n, b_mean, b_square, CENTRED)
        b_rstd = tl.math.rsqrt(b_square / K + eps)
        for k in range(0, K, BK):
            m_k = k + o_k < K
            m_mk = m_m[:, None] & m_k[None, :]
            b_x = _load_h(p_xm + (k + o_k)[None, :], p_rm + (k + o_k)[None, :], m_mk, ADD)
            if ADD:
                tl.store(p_hm + (k + o_k)[None, :], b_x, mask=m_mk)
            b_w, b_b = load_parameters(p_w, p_b, offset, k + o_k, m_k, HAS_W, HAS_B)
            b_y = normalise(b_x.to(tl.float32), b_mean, b_rstd, b_w, b_b, CENTRED)
            tl.store(p_ym + (k + o_k)[None, :], cast(b_y, p_y.dtype.element_ty), mask=m_mk)
    tl.store(p_rstd + o_m, b_rstd, mask=m_m)
    if CENTRED:
        tl.store(p_mean + o_m, b_mean, mask=m_m)


@triton.jit
def load_statistics(p_mean, p_rstd, o_m, m_m, CENTRED: tl.constexpr):
    """mean (0 where not centred) and rstd of some rows."""
    b_rstd = tl.load(p_rstd + o_m, mask=m_m, other=0.0)
    b_mean = tl.zeros(o_m.shape, tl.float32)
    if CENTRED:
        b_mean = tl.load(p_mean + o_m, mask=m_m, other=0.0)
    return b_mean, b_rstd


@triton.jit
def statistics_of_rows(b_mean, b_rstd, o_rows, o_m, BM: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr):
    """mean and rstd of the rows `o_m` from those of ROWS rows, `o_rows`."""
    if BM == ROWS:
        return b_mean, b_rstd
    m_own = o_m[:, None] == o_rows[None, :]
    b_one = tl.zeros((BM,), tl.float32)
    if CENTRED:
        b_one = tl.sum(tl.where(m_own, b_mean[None, :], 0.0), axis=1)
    return b_one, tl.sum(tl.where(m_own, b_rstd[None, :], 0.0), axis=1)


@triton.jit
def centred(b_x, b_mean, b_rstd, m_mk, CENTRED: tl.constexpr):
    """h' = (x - mean) * rstd, zero where masked."""
    b_h = b_x.to(tl.float32)
    if CENTRED:
        b_h = tl.where(m_mk, b_h - b_mean[:, None], 0.0)
    return b_h * b_rstd[:, None]


@triton.jit
def row_gradient(b_g, b_h, b_rstd, b_sum, b_along, K, CENTRED: tl.constexpr):
    """dx = rstd * (g - mean(g) - h' * mean(g * h')) from the sums of g and of g * h'."""
    b_dx = b_g - b_h * (b_along / K)[:, None]
    if CENTRED:
        b_dx -= (b_sum / K)[:, None]
    return b_dx * b_rstd[:, None]


@triton.jit(do_not_specialize=["M"])
def _norm_backward_kernel(
    p_dy, p_x, p_dh, p_w, p_mean, p_rstd, p_dx, p_dw, p_db, offset, M, K, m_part,
    stride_dym, stride_xm, stride_dhm, stride_dxm,
    HAS_W: tl.constexpr, HAS_DH: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr, CENTRED: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx of `m_part` rows and, with DW and DB (then WHOLE), their part of dweight and dbias.

    The statistics of ROWS rows are loaded at once: those of BM rows would be read by as many warps, a sector each.
    """
    o_k = tl.arange(0, BK)
    if WHOLE:
        m_k = o_k < K
        b_w, _ = load_parameters(p_w, p_w, offset, o_k, m_k, HAS_W, False)
        b_dw = tl.zeros((BM, BK), tl.float32)
        b_db = tl.zeros((BM, BK), tl.float32)
    m_first = tl.program_id(0) * m_part
    m_last = tl.minimum(M, m_first + m_part)
    for m_rows in range(m_first, m_last, ROWS):
        o_rows = m_rows + tl.arange(0, ROWS)
        b_means, b_rstds = load_statistics(p_mean, p_rstd, o_rows, o_rows < m_last, CENTRED)
        for m in range(m_rows, tl.minimum(m_last, m_rows + ROWS), BM):
            o_m = m + tl.arange(0, BM)
            m_m = o_m < M
            b_mean, b_rstd = statistics_of_rows(b_means, b_rstds, o_rows, o_m, BM, ROWS, CENTRED)
            p_dym = p_dy + o_m[:, None].to(tl.int64) * stride_dym
            p_xm = p_x + o_m[:, None].to(tl.int64) * stride_xm
            if HAS_DH:
                p_dhm = p_dh + o_m[:, None].to(tl.int64) * stride_dhm
            p_dxm = p_dx + o_m[:, None].to(tl.int64) * stride_dxm
            if WHOLE:
                m_mk = m_m[:, None] & m_k[None, :]
                b_dy = tl.load(p_dym + o_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
                b_h = centred(tl.load(p_xm + o_k[None, :], mask=m_mk, other=0.0), b_mean, b_rstd, m_mk, CENTRED)
                b_g = b_dy * b_w[None, :]
                b_dx = row_gradient(b_g, b_h, b_rstd, tl.sum(b_g, axis=1), tl.sum(b_g * b_h, axis=1), K, CENTRED)
                if HAS_DH:
                    b_dx += tl.load(p_dhm + o_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
                tl.store(p_dxm + o_k[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m_mk)
                if DW:
                    b_dw += b_dy * b_h
                if DB:
                    b_db += b_dy
            else:
                b_sum = tl.zeros((BM,), tl.float32)
                b_along = tl.zeros((BM,), tl.float32)
                for k in range(0, K, BK):
                    o_c = k + o_k
                    m_mk = m_m[:, None] & (o_c < K)[None, :]
                    b_w, _ = load_parameters(p_w, p_w, offset, o_c, o_c < K, HAS_W, False)
                    b_g = tl.load(p_dym + o_c[None, :], mask=m_mk, other=0.0).to(tl.float32) * b_w[None, :]
                    b_h = centred(tl.load(p_xm + o_c[None, :], mask=m_mk, other=0.0), b_mean, b_rstd, m_mk, CENTRED)
                    b_sum += tl.sum(b_g, axis=1)
                    b_along += tl.sum(b_g * b_h, axis=1)
                for k in range(0, K, BK):
                    o_c = k + o_k
                    m_mk = m_m[:, None] & (o_c < K)[None, :]
                    b_w, _ = load_parameters(p_w, p_w, offset, o_c, o_c < K, HAS_W, False)
                    b_g = tl.load(p_dym + o_c[None, :], mask=m_mk, other=0.0).to(tl.float32) * b_w[None, :]
                    b_h = centred(tl.load(p_xm + o_c[None, :], mask=m_mk, other=0.0), b_mean, b_rstd, m_mk, CENTRED)
                    b_dx = row_gradient(b_g, b_h, b_rstd, b_sum, b_along, K, CENTRED)
                    if HAS_DH:
                        b_dx += tl.load(p_dhm + o_c[None, :], mask=m_mk, other=0.0).to(tl.float32)
                    tl.store(p_dxm + o_c[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m_mk)
    if DW:
        p_out = p_dw + tl.program_id(0).to(tl.int64) * K + o_k
        tl.store(p_out, cast(tl.sum(b_dw, axis=0), p_dw.dtype.element_ty), mask=m_k)
    if DB:
        p_out = p_db + tl.program_id(0).to(tl.int64) * K + o_k
        tl.store(p_out, cast(tl.sum(b_db, axis=0), p_db.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["M"])
def _parameters_kernel(
    p_dy, p_x, p_mean, p_rstd, p_dw, p_db, M, K, m_part, stride_dym, stride_xm,
    DW: tl.constexpr, DB: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of BK columns over `m_part` rows: for rows too long to stay in registers."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_dw = tl.zeros((BK,), tl.float32)
    b_db = tl.zeros((BK,), tl.float32)
    m_first = tl.program_id(1) * m_part
    m_last = tl.minimum(M, m_first + m_part)
    for m_rows in range(m_first, m_last, ROWS):
        o_rows = m_rows + tl.arange(0, ROWS)
        if DW:
            b_means, b_rstds = load_statistics(p_mean, p_rstd, o_rows, o_rows < m_last, CENTRED)
        for m in range(m_rows, tl.minimum(m_last, m_rows + ROWS), BM):
            o_m = m + tl.arange(0, BM)
            m_mk = (o_m < M)[:, None] & m_k[None, :]
            b_dy = tl.load(p_dy + o_m[:, None].to(tl.int64) * stride_dym + o_k[None, :], mask=m_mk, other=0.0)
            b_dy = b_dy.to(tl.float32)
            if DW:
                b_mean, b_rstd = statistics_of_rows(b_means, b_rstds, o_rows, o_m, BM, ROWS, CENTRED)
                b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :], mask=m_mk, other=0.0)
                b_dw += tl.sum(b_dy * centred(b_x, b_mean, b_rstd, m_mk, CENTRED), axis=0)
            if DB:
                b_db += tl.sum(b_dy, axis=0)
    if DW:
        p_out = p_dw + tl.program_id(1).to(tl.int64) * K + o_k
        tl.store(p_out, cast(b_dw, p_dw.dtype.element_ty), mask=m_k)
    if DB:
        p_out = p_db + tl.program_id(1).to(tl.int64) * K + o_k
        tl.store(p_out, cast(b_db, p_db.dtype.element_ty), mask=m_k)


def _row_tile(K: int, most: int, M: int) -> dict[str, Any]:
    """Whole rows of up to `most` columns, longer ones in pieces, several short ones at once. 16 elements a thread."""
    BK = power_of_two(K, 16, most)
    whole = BK >= K
    BK = BK if whole else PIECE
    BM = 1 if BK > 512 else power_of_two(M, 1, 2048 // BK)
    return config(warps=power_of_two(BM * BK // 512, 1, 16), stages=1, WHOLE=whole, BM=BM, BK=BK)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float, offset: float, y: torch.Tensor, h: torch.Tensor | None, mean: torch.Tensor | None, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y (M, K), with a residual h, and the statistics. LayerNorm where there is a mean. Rows are contiguous."""
    M, K = x.shape
    if x.numel() == 0:
        return
    tile = _row_tile(K, WHOLE_COLUMNS, M)
    with on_device(x):
        _norm_kernel[(triton.cdiv(M, tile["BM"]),)](
            x, residual, weight, bias, y, h, mean, rstd, float(eps), float(offset), M, K,
            x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
            ADD=residual is not None, HAS_W=weight is not None, HAS_B=bias is not None, CENTRED=mean is not None,
            **tile,
        )  # fmt: skip


def _parts(
    M: int, K: int, BM: int, operands: Sequence[torch.Tensor | None], reductions: int, multiprocessors: int
) -> int:
    """How many programs share the rows where each leaves partial sums.

    As many as there are multiprocessors, or as keep the sums' bytes (written and read once each) at a 25th of the
    operands'; not more than four to a multiprocessor.
    """
    row = sum(t.element_size() * K for t in operands if t is not None)
    cheap = M * row // (25 * 2 * 4 * K * reductions)
    return max(1, min(triton.cdiv(M, BM), 4 * multiprocessors, max(multiprocessors, cheap)))


def backward(
    dy: torch.Tensor, x: torch.Tensor, d_h: torch.Tensor | None, weight: torch.Tensor | None, offset: float,
    mean: torch.Tensor | None, rstd: torch.Tensor, dx: torch.Tensor,
    dweight: torch.Tensor | None, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    """dx (M, K) and those of dweight, dbias (K,) that are given. Rows are contiguous."""
    M, K = x.shape
    reductions = [t for t in (dweight, dbias) if t is not None]
    if x.numel() == 0:
        for t in reductions:
            t.zero_()
        return
    tile = _row_tile(K, WHOLE_COLUMNS if not reductions else WHOLE_COLUMNS // 2, M)
    if reductions and not tile["WHOLE"]:
        _parameters(dy, x, mean, rstd, dweight, dbias)
        tile, fused, parts = _row_tile(K, WHOLE_COLUMNS, M), False, triton.cdiv(M, tile["BM"])
    else:
        fused, parts = bool(reductions), triton.cdiv(M, tile["BM"])
    dw, db = (dweight, dbias) if fused else (None, None)
    if fused:
        multiprocessors = limits(x.device).multiprocessors
        parts = _parts(M, K, tile["BM"], (dy, x, d_h, dx), len(reductions), multiprocessors)
    per_part = triton.cdiv(triton.cdiv(M, parts), tile["BM"]) * tile["BM"]
    parts = triton.cdiv(M, per_part)
    work_w, work_b = (None if t is None else partials(parts, t) for t in (dw, db))
    with on_device(x):
        _norm_backward_kernel[(parts,)](
            dy, x, d_h, weight, mean, rstd, dx, work_w, work_b, float(offset), M, K, per_part,
            dy.stride(0), x.stride(0), 0 if d_h is None else d_h.stride(0), dx.stride(0),
            HAS_W=weight is not None, HAS_DH=d_h is not None, DW=dw is not None, DB=db is not None,
            CENTRED=mean is not None, ROWS=max(32, tile["BM"]), **tile,
        )  # fmt: skip
        sum_partials(*((work, out) for work, out in ((work_w, dw), (work_b, db)) if out is not None))


def _parameters(
    dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor | None, rstd: torch.Tensor,
    dweight: torch.Tensor | None, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    M, K = x.shape
    # The sums over rows need no shared memory where each warp has all rows.
    BM, BK = power_of_two(M, 1, 2), 2048
    panels, count = triton.cdiv(K, BK), sum(t is not None for t in (dweight, dbias))
    parts = _parts(M, K, BM, (dy, x), count, triton.cdiv(4 * limits(x.device).multiprocessors, panels))
    per_part = triton.cdiv(triton.cdiv(M, parts), BM) * BM
    parts = triton.cdiv(M, per_part)
    work_w, work_b = (None if t is None else partials(parts, t) for t in (dweight, dbias))
    with on_device(x):
        _parameters_kernel[(panels, parts)](
            dy, x, mean, rstd, work_w, work_b, M, K, per_part, dy.stride(0), x.stride(0),
            DW=dweight is not None, DB=dbias is not None, CENTRED=mean is not None, ROWS=32,
            **config(4, 2, BM=BM, BK=BK),
        )  # fmt: skip
        sum_partials(*((work, out) for work, out in ((work_w, dweight), (work_b, dbias)) if out is not None))


@triton.jit(do_not_specialize=["M"])
def _remake_kernel(
    p_x, p_w, p_b, p_y, p_mean, p_rstd, offset, M, K, stride_xm,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, CENTRED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y again, from x and the statistics that were kept."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_m = o_m < M
    m_k = o_k < K
    m_mk = m_m[:, None] & m_k[None, :]
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
    # An element a lane: each warp loads all rows' statistics, its own alone would leave most of a sector.
    o_rows = tl.program_id(0) * BM + tl.arange(0, 32)
    m_rows = o_rows < tl.minimum(M, tl.program_id(0) * BM + BM)
    b_means, b_rstds = load_statistics(p_mean, p_rstd, o_rows, m_rows, CENTRED)
    b_mean, b_rstd = statistics_of_rows(b_means, b_rstds, o_rows, o_m, BM, 32, CENTRED)
    b_w, b_b = load_parameters(p_w, p_b, offset, o_k, m_k, HAS_W, HAS_B)
    b_y = normalise(b_x, b_mean, b_rstd, b_w, b_b, CENTRED)
    tl.store(p_y + o_m[:, None].to(tl.int64) * K + o_k[None, :], cast(b_y, p_y.dtype.element_ty), mask=m_mk)


def remake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, offset: float, y: torch.Tensor,
    mean: torch.Tensor | None, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """y (M, K), contiguous, as `forward` made it."""
    M, K = x.shape
    grid = (triton.cdiv(M, 8), triton.cdiv(K, 256))
    with on_device(x):
        _remake_kernel[grid](
            x, weight, bias, y, mean, rstd, float(offset), M, K, x.stride(0),
            HAS_W=weight is not None, HAS_B=bias is not None, CENTRED=mean is not None, **config(4, 1, BM=8, BK=256),
        )  # fmt: skip


def require(**tensors: torch.Tensor | None) -> None:
    """Error for a dtype the kernels do not have."""
    require_float(**{name: t for name, t in tensors.items() if t is not None})


def vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """weight or bias, contiguous."""
    return None if parameter is None else parameter.contiguous()


def outputs(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for y in `dtype` and for a statistic."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def gradient(parameter: torch.Tensor | None, x: torch.Tensor, needed: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Room for a parameter's gradient and what the operator returns: the same, or nothing where it is not needed."""
    if parameter is None or not needed:
        return None, torch.empty(0, dtype=torch.float32, device=x.device)
    room = torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
    return room, room
