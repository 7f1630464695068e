"""The operators of `ops/dora_products.py` on Triton, argument for argument; the formulas are there.

Row strides are free, rows are contiguous (inputs that have none are copied). Any rank, any mixture of fp32, bf16 and
fp16; gain, out_gain and the sums are fp32. Sums over rows go through an fp32 workspace and a second pass in a fixed
order: the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import cast, dot, operand
from ._launch import (
    config,
    limits,
    on_device,
    partials,
    power_of_two,
    products,
    require_float,
    require_unit_columns,
    splits_for,
    sum_partials,
    unit_columns,
)
from .lora_backward import _expand_backward_tile
from .lora_expand import _expand_tile, _rim_step
from .lora_outer import outer_product
from .lora_shrink import shrink_into
from .philox import keep_mask, kept_scale, threshold

__all__ = ["dora_expand_", "dora_expand_backward", "dora_gain", "dora_mix_", "dropout", "dropout_add_"]

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@triton.jit
def _gain_kernel(p_norm, p_m, p_gain, p_n, N, smallest, BN: tl.constexpr):
    """n = norm in m's precision; gain = m / n - 1, at least -1. NaN stays."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_n = cast(tl.load(p_norm + o_n, mask=m_n, other=1.0), p_m.dtype.element_ty).to(tl.float32)
    b_n = tl.where(b_n < smallest, smallest, b_n)
    b_gain = tl.div_rn(tl.load(p_m + o_n, mask=m_n, other=1.0).to(tl.float32) - b_n, b_n)
    tl.store(p_gain + o_n, tl.where(b_gain < -1.0, -1.0, b_gain), mask=m_n)
    tl.store(p_n + o_n, b_n, mask=m_n)


@triton.jit(do_not_specialize=["M"])
def _mix_kernel(
    p_y, p_u, p_s, p_b, p_gain, p_bias, M, N, R, stride_ym, stride_um, stride_sm, stride_bn, stride_br,
    HAS_U: tl.constexpr, HAS_BIAS: tl.constexpr, LOOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """v = y + s Bᵀ, y = v + gain (v - bias); with u: t = u + s Bᵀ replaces u, y = y + bias + s Bᵀ + gain t."""
    tiles = tl.cdiv(N, BN)
    o_n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    m_m = o_m < M
    m_n = o_n < N
    m_mn = m_m[:, None] & m_n[None, :]
    b_rim = tl.zeros((BM, BN), tl.float32)
    p_s += o_m[:, None].to(tl.int64) * stride_sm
    p_b += o_n[None, :].to(tl.int64) * stride_bn
    if LOOP:
        for i_r in range(0, R, BR):
            b_rim = _rim_step(p_s, p_b, i_r + tl.arange(0, BR), R, stride_br, m_m, m_n, b_rim, p_y.dtype.element_ty)
    else:
        b_rim = _rim_step(p_s, p_b, tl.arange(0, BR), R, stride_br, m_m, m_n, b_rim, p_y.dtype.element_ty)
    b_gain = tl.load(p_gain + o_n, mask=m_n, other=0.0)[None, :]
    p_block = p_y + o_m[:, None].to(tl.int64) * stride_ym + o_n[None, :]
    b_v = tl.load(p_block, mask=m_mn, other=0.0).to(tl.float32) + b_rim
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_U:
        p_other = p_u + o_m[:, None].to(tl.int64) * stride_um + o_n[None, :]
        b_t = tl.load(p_other, mask=m_mn, other=0.0).to(tl.float32) + b_rim
        tl.store(p_other, cast(b_t, p_u.dtype.element_ty), mask=m_mn)
        b_v += b_gain * b_t
        if HAS_BIAS:
            b_v += b_bias
    elif HAS_BIAS:
        b_v += b_gain * (b_v - b_bias)
    else:
        b_v += b_gain * b_v
    tl.store(p_block, cast(b_v, p_y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    p_dy, p_y, p_bias, p_s, p_b, p_gain, p_out_gain, p_dt, p_ds, p_db, p_sums, M, N, R, m_part,
    stride_dym, stride_ym, stride_sm, stride_bn, stride_dtm, stride_ds_part, stride_db_part,
    HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DT: tl.constexpr, RIM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dt, sums and, with RIM, ds and dB: BN columns over `m_part` rows. Whole rank: BR >= R."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    if RIM:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        m_nr = m_n[:, None] & m_r[None, :]
        b_gain = tl.load(p_gain + o_n, mask=m_n, other=0.0)
        b_b = tl.load(p_b + o_n[:, None].to(tl.int64) * stride_bn + o_r[None, :], mask=m_nr, other=0.0)
        b_b = cast(b_b.to(tl.float32) * b_gain[:, None], p_b.dtype.element_ty)
        p_ds += tl.program_id(0).to(tl.int64) * stride_ds_part
        b_acc = tl.zeros((BN, BR), tl.float32)
    if HAS_DT:
        b_out = tl.load(p_out_gain + o_n, mask=m_n, other=0.0)[None, :]
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_sums = tl.zeros((BN,), tl.float32)
    m_first = tl.program_id(1) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        m_m = o_m < M
        m_mn = m_m[:, None] & m_n[None, :]
        b_dy = tl.load(p_dy + o_m[:, None].to(tl.int64) * stride_dym + o_n[None, :], mask=m_mn, other=0.0)
        b_wide = b_dy.to(tl.float32)
        if HAS_Y:
            b_y = tl.load(p_y + o_m[:, None].to(tl.int64) * stride_ym + o_n[None, :], mask=m_mn, other=0.0)
            b_y = b_y.to(tl.float32)
            if HAS_BIAS:
                b_y -= b_bias
            b_sums += tl.sum(b_wide * b_y, axis=0)
        if HAS_DT:
            p_out = p_dt + o_m[:, None].to(tl.int64) * stride_dtm + o_n[None, :]
            tl.store(p_out, cast(b_wide * b_out, p_dt.dtype.element_ty), mask=m_mn)
        if RIM:
            m_mr = m_m[:, None] & m_r[None, :]
            b_dy = operand(b_dy, b_b.dtype)
            b_ds = dot(b_dy, b_b, tl.zeros((BM, BR), tl.float32))
            tl.store(p_ds + o_m[:, None].to(tl.int64) * R + o_r[None, :], cast(b_ds, p_ds.dtype.element_ty), mask=m_mr)
            b_s = tl.load(p_s + o_m[:, None].to(tl.int64) * stride_sm + o_r[None, :], mask=m_mr, other=0.0)
            b_acc = dot(tl.trans(b_dy), operand(b_s, b_b.dtype), b_acc)
    if HAS_Y:
        tl.store(p_sums + tl.program_id(1).to(tl.int64) * N + o_n, b_sums, mask=m_n)
    if RIM:
        p_block = p_db + tl.program_id(1).to(tl.int64) * stride_db_part + o_n[:, None].to(tl.int64) * R + o_r[None, :]
        tl.store(p_block, cast(b_acc * b_gain[:, None], p_db.dtype.element_ty), mask=m_nr)


@triton.jit(do_not_specialize=["threshold", "M", "i_member", "c"])
def _dropout_kernel(
    p_x, p_out, p_seed, c, threshold, M, K, i_member, stride_xm, stride_om,
    ADD: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = or += c mask x."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    o_c8 = tl.program_id(1) * (BC // 8) + tl.arange(0, BC // 8)
    b_keep = keep_mask(tl.load(p_seed), o_m, o_c8, i_member, threshold, BM, BC)
    m_mc = (o_m < M)[:, None] & (o_c < K)[None, :]
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * stride_xm + o_c[None, :], mask=m_mc, other=0.0).to(tl.float32)
    b_out = tl.where(b_keep, c * b_x, 0.0)
    p_block = p_out + o_m[:, None].to(tl.int64) * stride_om + o_c[None, :]
    if ADD:
        b_out += tl.load(p_block, mask=m_mc, other=0.0).to(tl.float32)
    tl.store(p_block, cast(b_out, p_out.dtype.element_ty), mask=m_mc)


def dora_gain(norm: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """(2, N) in fp32: magnitude / n - 1 and n, which is norm (N) in the magnitude's precision. One launch."""
    require_float(norm=norm, magnitude=magnitude)
    N = norm.shape[0]
    out = torch.empty((2, N), dtype=torch.float32, device=norm.device)
    if N:
        with on_device(norm):
            _gain_kernel[(triton.cdiv(N, 128),)](
                norm.contiguous(), magnitude.contiguous(), out[0], out[1], N, _SMALLEST_NORMAL, **config(4, 1, BN=128)
            )
    return out


def dora_expand_(
    y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """v = y + s Bᵀ, y = v + gain (v - bias), in place on y (M, N). One pass over y."""
    _mix(y, None, s, B, gain, bias)


def dora_mix_(
    y: torch.Tensor, u: torch.Tensor, s: torch.Tensor, B: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """t = u + s Bᵀ replaces u, and y becomes y + bias + s Bᵀ + gain t, in place on both (M, N). One pass over each."""
    _mix(y, u, s, B, gain, bias)


def _mix(
    y: torch.Tensor, u: torch.Tensor | None, s: torch.Tensor, B: torch.Tensor, gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:  # fmt: skip
    require_float(y=y, s=s, B=B)
    require_unit_columns("y", y)
    if u is not None:
        require_unit_columns("u", u)
    M, N = y.shape
    R = B.shape[1]
    if B.shape[0] != N or s.shape != (M, R):
        raise ValueError(f"for y {tuple(y.shape)} s must be (M, r) and B (N, r), got {s.shape} and {B.shape}")
    if y.numel() == 0:
        return
    s = unit_columns(s)
    tile = _expand_tile(R, M, products(y, B))
    with on_device(y):
        _mix_kernel[(triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),)](
            y, u, s, B, gain, bias, M, N, R,
            y.stride(0), 0 if u is None else u.stride(0), s.stride(0), B.stride(0), B.stride(1),
            HAS_U=u is not None, HAS_BIAS=bias is not None, **tile,
        )  # fmt: skip


def dora_expand_backward(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    B: torch.Tensor,
    gain: torch.Tensor,
    out_gain: torch.Tensor | None,
    dt: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ds (M, r), dB (N, r) and the sums (N); dt (M, N) is written where it is given.

    One pass over dy and y up to rank 32 or so; beyond, two more over dy.
    """
    require_float(dy=dy, s=s, B=B)
    M, N = dy.shape
    R = B.shape[1]
    ds = torch.empty((M, R), dtype=s.dtype, device=dy.device)
    dB = torch.empty(B.shape, dtype=B.dtype, device=B.device)
    sums = torch.zeros_like(gain)
    if M == 0 or N == 0:
        return ds.zero_(), dB.zero_(), sums
    dy, s, B = unit_columns(dy), unit_columns(s), unit_columns(B)
    y = None if y is None else unit_columns(y)
    if dt is not None:
        require_unit_columns("dt", dt)
    tile = _expand_backward_tile(R, M, products(dy, B))
    if tile is not None:
        # y stands in registers beside dy: with blocks of 32 x 128 and 256 the kernel spilled.
        tile = {**tile, "BM": 16, "BN": min(tile["BN"], 128)}
        panels = triton.cdiv(N, tile["BN"])
        sums_bytes, passes_bytes = 2 * 4 * R * panels * M, dy.element_size() * M * N * 2
        if sums_bytes > passes_bytes or (sums_bytes == passes_bytes and dy.dtype == torch.float32):
            tile = None  # partial sums would move more than two more passes; in fp32 as much, and spilled on sm_90
    rim = tile is not None
    tile = tile or config(4, 3, BM=power_of_two(M, 16, 32), BN=128, BR=16)
    panels = triton.cdiv(N, tile["BN"])
    steps = triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(panels, steps, 4, limits(dy.device).multiprocessors)
    ds_work, dB_work = (partials(panels, ds), partials(parts, dB)) if rim else (ds, dB)
    sums_work = partials(parts, sums)
    with on_device(dy):
        _backward_kernel[(panels, parts)](
            dy, y, bias, s, B, gain, out_gain, dt, ds_work, dB_work, sums_work, M, N, R, per_part * tile["BM"],
            dy.stride(0), 0 if y is None else y.stride(0), s.stride(0), B.stride(0), 0 if dt is None else dt.stride(0),
            ds.numel(), dB.numel(),
            HAS_Y=y is not None, HAS_BIAS=bias is not None, HAS_DT=dt is not None, RIM=rim, **tile,
        )  # fmt: skip
        sum_partials((ds_work, ds), (dB_work, dB))
        if y is not None:
            sum_partials((sums_work, sums))
    if not rim:
        scaled = (B.float() * gain[:, None]).to(B.dtype)
        shrink_into(ds, dy, scaled.t(), [1.0], 0.0, None)
        outer_product(dB.t(), s, dy, [1.0], 0.0, None)
        dB = (dB.float() * gain[:, None]).to(B.dtype)
    return ds, dB, sums


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor, member: int) -> torch.Tensor:
    """mask x / (1 - p), (M, K)."""
    require_float(x=x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _dropout(unit_columns(x), out, p, seed, member, add=False)
    return out


def dropout_add_(dx: torch.Tensor, v: torch.Tensor, p: float, seed: torch.Tensor, member: int) -> None:
    """dx += mask v / (1 - p), in place on dx (M, K)."""
    require_float(dx=dx, v=v)
    require_unit_columns("dx", dx)
    _dropout(unit_columns(v), dx, p, seed, member, add=True)


def _dropout(x: torch.Tensor, out: torch.Tensor, p: float, seed: torch.Tensor, member: int, add: bool) -> None:
    M, K = x.shape
    if x.numel() == 0:
        return
    with on_device(x):
        _dropout_kernel[(triton.cdiv(M, 16), triton.cdiv(K, 256))](
            x, out, seed, kept_scale(1.0, p), threshold(p), M, K, member, x.stride(0), out.stride(0),
            ADD=add, **config(4, 1, BM=16, BC=256),
        )  # fmt: skip
