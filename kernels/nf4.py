"""Weights of 4 bits on Triton: the operators of `ops/nf4.py`, argument for argument; the formulas are there.

W is decoded where it is used: a tile of bytes becomes a tile of codes, the table's values in fp32, times the scales of
the tile's blocks, which are themselves decoded from 8 bits where scales are nested. `dequantize_4bit_` has
bitsandbytes' bits; in the products W is rounded to x's dtype (fp32: not at all, the products are exact to fp32).

The table is looked up with `tl.gather`, which goes through 64 bytes of shared memory: 16 words in 16 banks, no
conflict, one instruction a value, and the same source in the interpreter. It is run-time data, as bitsandbytes keeps
it, and its values are fp32: byte permutations would take four planes of three instructions a value, and joining them.

Any number of rows, any K; what is laid out for is K a multiple of the block size and rows by the dozen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._device import INTERPRETED, cast, dot, dot_rim
from ._launch import (
    config,
    limits,
    on_device,
    partials,
    power_of_two,
    require_float,
    require_unit_columns,
    splits_for,
    sum_partials,
    unit_columns,
)

__all__ = ["dequantize_4bit_", "linear_4bit", "linear_4bit_backward"]


@triton.jit
def _product(b_a, b_b):
    """b_a * b_b, rounded: what is added to it must not become one operation with it (1 * x + y would be)."""
    if INTERPRETED:
        return b_a * b_b
    return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [b_a, b_b], tl.float32, True, 1)


@triton.jit
def _tables(p_code, p_nested_code, p_offset, NESTED: tl.constexpr):
    """The table of the codes, that of the scales' 8 bits and the scales' offset: read once a program."""
    b_table = tl.load(p_code + tl.arange(0, 16))
    b_nested = b_table
    offset = 0.0
    if NESTED:
        b_nested = tl.load(p_nested_code + tl.arange(0, 256))
        offset = tl.load(p_offset)
    return b_table, b_nested, offset


@triton.jit
def _scales(
    p_absmax, p_nested_absmax, b_nested, offset, block_shift, nested_shift, o_n, i_k, m_n, K, k_end,
    NESTED: tl.constexpr, WHOLE: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """(BN, E): the fp32 scales of W[o_n, i_k : i_k + E G], one for G columns, zeros where `_decode` has them.

    WHOLE: G is the block size, so that a row's scales are neighbours in memory. Nested, the columns' scales are of one
    or two blocks.
    """
    o_first = o_n.to(tl.int64) * K + i_k
    o_g = tl.arange(0, E) * G
    m_g = m_n[:, None] & (i_k + o_g < k_end)[None, :]
    if WHOLE:
        o_block = (o_first >> block_shift)[:, None] + tl.arange(0, E)[None, :]
    else:
        o_block = (o_first[:, None] + o_g[None, :]) >> block_shift
    b_scale = tl.load(p_absmax + o_block, mask=m_g, other=0)
    if NESTED:
        b_code = tl.reshape(tl.gather(b_nested, tl.reshape(b_scale.to(tl.int32), (BN * E,)), 0), (BN, E))
        o_each = o_first >> block_shift >> nested_shift
        b_each = tl.load(p_nested_absmax + o_each, mask=m_n, other=0.0)[:, None]
        if E > 1:
            o_last = o_n.to(tl.int64) * K + tl.minimum(i_k + E * G, k_end) - 1
            b_last = tl.load(p_nested_absmax + (o_last >> block_shift >> nested_shift), mask=m_n, other=0.0)
            b_each = tl.where((o_block >> nested_shift) == o_each[:, None], b_each, b_last[:, None])
        b_scale = _product(b_code, b_each) + offset  # a product, then a sum
    return tl.where(m_g, b_scale, 0.0)


@triton.jit
def _scales_of_step(b_scales, i, STEPS: tl.constexpr, BN: tl.constexpr, E: tl.constexpr):
    """(BN, E): the i-th of STEPS times E scales of each row."""
    if STEPS == 1:
        return b_scales
    if E == 1:
        return tl.sum(tl.where((tl.arange(0, STEPS) == i)[None, :], b_scales, 0.0), axis=1)[:, None]
    b_all = tl.reshape(b_scales, (BN, STEPS, E))
    return tl.sum(tl.where((tl.arange(0, STEPS) == i)[None, :, None], b_all, 0.0), axis=1)


@triton.jit
def _decode(
    p_packed, b_table, b_s, o_n, i_k, m_n, K, k_end, G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """W[o_n, i_k : i_k + BK] in fp32 with the scales `b_s` (BN, BK / G), zeros beyond `k_end` and where not `m_n`.

    G: so many neighbouring columns are of one block, and lie in whole bytes where G > 1; K, `i_k` and `k_end` are
    multiples of it.
    """
    if G == 1:
        o_k = i_k + tl.arange(0, BK)
        m_k = m_n[:, None] & (o_k < k_end)[None, :]
        o_e = o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        b_q = tl.load(p_packed + (o_e >> 1), mask=m_k, other=0).to(tl.int32)
        b_q = (b_q >> ((o_e & 1) ^ 1).to(tl.int32) * 4) & 15
    else:
        half, i_half, end_half = K // 2, i_k // 2, k_end // 2
        if G >= 32:  # what the compiler does not see through the division, and needs for vector loads
            half, i_half, end_half = tl.multiple_of(half, 16), tl.multiple_of(i_half, 16), tl.multiple_of(end_half, 16)
        o_half = i_half + tl.arange(0, BK // 2)
        m_half = m_n[:, None] & (o_half < end_half)[None, :]
        b_two = tl.load(p_packed + o_n.to(tl.int64)[:, None] * half + o_half[None, :], mask=m_half, other=0).to(
            tl.int32
        )
        b_q = tl.reshape(tl.join(b_two >> 4, b_two & 15), (BN, BK))
    b_w = tl.reshape(tl.gather(b_table, tl.reshape(b_q, (BN * BK,)), 0), (BN, BK))
    if G > 1 and G < BK:
        b_s = tl.reshape(tl.broadcast_to(tl.expand_dims(b_s, 2), (BN, BK // G, G)), (BN, BK))
    return b_w * b_s


@triton.jit
def _dequantize_4bit_kernel(
    p_out, p_packed, p_absmax, p_code, p_nested_code, p_nested_absmax, p_offset, block_shift, nested_shift,
    row, column, rows, columns, K, stride,
    NESTED: tl.constexpr, WHOLE: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A BN x BK tile of out = W[row : row + rows, column : column + columns]."""
    n_k = tl.cdiv(columns, BK)
    i_k = tl.program_id(0) % n_k * BK
    o_n = tl.program_id(0) // n_k * BN + tl.arange(0, BN)
    o_k = i_k + tl.arange(0, BK)
    m_n = o_n < rows
    b_table, b_nested, offset = _tables(p_code, p_nested_code, p_offset, NESTED)
    b_s = _scales(
        p_absmax, p_nested_absmax, b_nested, offset, block_shift, nested_shift, row + o_n, column + i_k, m_n, K,
        column + columns, NESTED, WHOLE, G, BN, BK // G,
    )  # fmt: skip
    b_w = _decode(p_packed, b_table, b_s, row + o_n, column + i_k, m_n, K, column + columns, G, BN, BK)
    p_tile = p_out + o_n.to(tl.int64)[:, None] * stride + o_k[None, :]
    tl.store(p_tile, cast(b_w, p_out.dtype.element_ty), mask=m_n[:, None] & (o_k < columns)[None, :])


@triton.jit(do_not_specialize=["M", "per_part"])
def _linear_4bit_kernel(
    p_x, p_packed, p_absmax, p_code, p_nested_code, p_nested_absmax, p_offset, block_shift, nested_shift,
    p_bias, p_s, p_b, p_y, M, N, K, R, per_part, stride_xm, stride_sm, stride_bn, stride_br, stride_ym, stride_part,
    NESTED: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, STEPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A BM x BN tile of y = x Wᵀ + bias + s Bᵀ, over `per_part` of K; bias and rim in the first part.

    The scales of STEPS times BK columns are loaded at once: those of a row are neighbours, a step's alone would leave
    most of each sector.
    """
    n_n = tl.cdiv(N, BN)
    o_m = tl.program_id(0) // n_n * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) % n_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_m64, o_n64 = o_m[:, None].to(tl.int64), o_n[None, :].to(tl.int64)
    b_table, b_nested, offset = _tables(p_code, p_nested_code, p_offset, NESTED)
    b_acc = tl.zeros((BM, BN), tl.float32)
    k_first = tl.multiple_of(tl.program_id(1) * per_part, BK)  # which vector loads of x take
    k_last = tl.minimum(K, k_first + per_part)
    for i_s in range(k_first, k_last, STEPS * BK):
        b_scales = _scales(
            p_absmax, p_nested_absmax, b_nested, offset, block_shift, nested_shift, o_n, i_s, m_n, K, K,
            NESTED, WHOLE, G, BN, STEPS * BK // G,
        )  # fmt: skip
        for i_k in range(i_s, tl.minimum(k_last, i_s + STEPS * BK), BK):
            o_k = i_k + tl.arange(0, BK)
            b_x = tl.load(p_x + o_m64 * stride_xm + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
            b_s = _scales_of_step(b_scales, (i_k - i_s) // BK, STEPS, BN, BK // G)
            b_w = _decode(p_packed, b_table, b_s, o_n, i_k, m_n, K, K, G, BN, BK)
            b_acc = dot(b_x, tl.trans(cast(b_w, b_x.dtype)), b_acc)
    m_y = m_m[:, None] & m_n[None, :]
    if tl.program_id(1) == 0:
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            b_s = tl.load(p_s + o_m64 * stride_sm + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
            p_rim = p_b + o_n64 * stride_bn + o_r[:, None].to(tl.int64) * stride_br
            b_b = tl.load(p_rim, mask=m_r[:, None] & m_n[None, :], other=0.0)
            b_acc = dot_rim(b_s, b_b, b_acc, p_x.dtype.element_ty)
        if HAS_BIAS:
            b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_tile = p_y + tl.program_id(1).to(tl.int64) * stride_part + o_m64 * stride_ym + o_n64
    tl.store(p_tile, cast(b_acc, p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["M", "per_part"])
def _linear_4bit_backward_kernel(
    p_dy, p_packed, p_absmax, p_code, p_nested_code, p_nested_absmax, p_offset, block_shift, nested_shift,
    p_ds, p_a, p_dx, M, N, K, R, per_part, stride_dym, stride_dsm, stride_ar, stride_ak, stride_dxm, stride_part,
    NESTED: tl.constexpr, WHOLE: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A BM x BK tile of dx = dy W + ds A, over `per_part` of N; the rim in the first part."""
    n_k = tl.cdiv(K, BK)
    o_m = tl.program_id(0) // n_k * BM + tl.arange(0, BM)
    i_k = tl.program_id(0) % n_k * BK
    o_k = i_k + tl.arange(0, BK)
    m_m, m_k = o_m < M, o_k < K
    o_m64, o_k64 = o_m[:, None].to(tl.int64), o_k[None, :].to(tl.int64)
    b_table, b_nested, offset = _tables(p_code, p_nested_code, p_offset, NESTED)
    b_acc = tl.zeros((BM, BK), tl.float32)
    n_first = tl.multiple_of(tl.program_id(1) * per_part, BN)  # which vector loads of dy take
    for i_n in range(n_first, tl.minimum(N, n_first + per_part), BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        b_dy = tl.load(p_dy + o_m64 * stride_dym + o_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_s = _scales(
            p_absmax, p_nested_absmax, b_nested, offset, block_shift, nested_shift, o_n, i_k, m_n, K, K,
            NESTED, WHOLE, G, BN, BK // G,
        )  # fmt: skip
        b_w = _decode(p_packed, b_table, b_s, o_n, i_k, m_n, K, K, G, BN, BK)
        b_acc = dot(b_dy, cast(b_w, b_dy.dtype), b_acc)
    if tl.program_id(1) == 0:
        for i_r in range(0, R, BR):
            o_r = i_r + tl.arange(0, BR)
            m_r = o_r < R
            b_ds = tl.load(p_ds + o_m64 * stride_dsm + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
            p_rim = p_a + o_r[:, None].to(tl.int64) * stride_ar + o_k64 * stride_ak
            b_a = tl.load(p_rim, mask=m_r[:, None] & m_k[None, :], other=0.0)
            b_acc = dot_rim(b_ds, b_a, b_acc, p_dy.dtype.element_ty)
    p_tile = p_dx + tl.program_id(1).to(tl.int64) * stride_part + o_m64 * stride_dxm + o_k64
    tl.store(p_tile, cast(b_acc, p_dx.dtype.element_ty), mask=m_m[:, None] & m_k[None, :])


def _shift(n: int, what: str) -> int:
    if n < 1 or n & (n - 1):
        raise ValueError(f"{what} must be a power of two, got {n}")
    return n.bit_length() - 1


def _storage(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, nested_code: torch.Tensor | None,
    nested_absmax: torch.Tensor | None, offset: torch.Tensor | None, blocksize: int, nested_blocksize: int,
) -> tuple[tuple[Any, ...], bool]:  # fmt: skip
    """(a kernel's arguments for the weight, nested?)."""
    nested = nested_code is not None
    shifts = _shift(blocksize, "blocksize"), _shift(nested_blocksize, "nested_blocksize") if nested else 0
    return (packed, absmax, code, nested_code, nested_absmax, offset, *shifts), nested


def _group(blocksize: int, *columns: int) -> int:
    """The largest power of two that divides the block size and all of `columns`: see `_decode`."""
    group = blocksize
    for n in columns:
        while n % group:
            group //= 2
    return group


class _Tile(NamedTuple):
    """BM rows of x and BN x BK of W a step; programs of a part, parts, a part's steps, and warps."""

    BM: int
    BN: int
    BK: int
    programs: int
    parts: int
    steps: int
    warps: int

    def config(self) -> dict[str, Any]:
        """As a launch takes it."""
        return config(self.warps, 3, BM=self.BM, BN=self.BN, BK=self.BK)


def _reach(blocksize: int, nested_blocksize: int, nested: bool) -> int:
    """So many columns have scales of at most two blocks of scales: see `_scales`."""
    return blocksize * nested_blocksize if nested else 1 << 20


def dequantize_4bit_(
    out: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor,
    nested_code: torch.Tensor | None, nested_absmax: torch.Tensor | None, offset: torch.Tensor | None,
    blocksize: int, nested_blocksize: int, columns: int, row: int, column: int,
) -> None:  # fmt: skip
    """out (n, k) = W[row : row + n, column : column + k]; out may have any row stride."""
    require_float(out=out)
    require_unit_columns("out", out)
    if out.numel() == 0:
        return
    storage, nested = _storage(
        packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize
    )  # fmt: skip
    n, k = out.shape
    # The scales of 2048 columns in blocks of 64 are a sector; less where too many lanes would idle at a row's end.
    wide = [2048 >> i for i in range(4) if triton.cdiv(k, 2048 >> i) * (2048 >> i) <= 1.25 * k]
    BK = min(wide[0] if wide else power_of_two(k, 32, 256), _reach(blocksize, nested_blocksize, nested))
    BN = 4096 // BK
    G = min(_group(blocksize, columns, column, k), BK)
    with on_device(out):
        _dequantize_4bit_kernel[(triton.cdiv(n, BN) * triton.cdiv(k, BK),)](
            out, *storage, row, column, n, k, columns, out.stride(0),
            NESTED=nested, WHOLE=blocksize == G, G=G, **config(4, 1, BN=BN, BK=BK),
        )  # fmt: skip


def _tile(M: int, across: int, along: int, backward: bool, bits32: bool, most: int, device: torch.device) -> _Tile:
    """Tiles of W of 64 columns, whole sectors of codes in any dtype. dx in 16 bit takes 128: dy, and a sector of scales
    for each row of W, are read again for each tile (of 16 rows a sixth less is loaded than with 64, of 64 a third).

    At most 64 fp32 sums a thread, in fp32 16, beside which the parts of both operands lie. Sums are split where tiles
    would leave most multiprocessors idle: a few dozen rows of x make few tiles.
    """
    wide = backward and not bits32
    BM, BN, BK = power_of_two(M, 16, 32 if bits32 else 64), 32 if bits32 or wide else 64, min(128 if wide else 64, most)
    programs = triton.cdiv(M, BM) * triton.cdiv(across, BK if backward else BN)
    steps = triton.cdiv(along, BN if backward else BK)
    parts = splits_for(programs, steps, 8, limits(device).multiprocessors)
    return _Tile(BM, BN, BK, programs, *parts, 8 if bits32 else 4)


def linear_4bit(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor,
    nested_code: torch.Tensor | None, nested_absmax: torch.Tensor | None, offset: torch.Tensor | None,
    blocksize: int, nested_blocksize: int, rows: int,
    bias: torch.Tensor | None, s: torch.Tensor | None, B: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """y (M, N) in x's dtype = x Wᵀ + bias + s Bᵀ, N = rows."""
    rim = s is not None and B is not None
    require_float(x=x, **({"s": s, "B": B} if rim else {}))
    storage, nested = _storage(
        packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize
    )  # fmt: skip
    x = unit_columns(x)
    (M, K), R = x.shape, s.shape[1] if rim else 0
    y = torch.empty((M, rows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    s, B = (unit_columns(s), B) if rim else (x, x)  # without a rim, any pointer: it is not read
    reach = _reach(blocksize, nested_blocksize, nested)
    tile = _tile(M, rows, K, False, x.dtype == torch.float32, reach, x.device)
    G = min(_group(blocksize, K), tile.BK)
    # 32 scales of a row are a sector in 8 bits; not beyond a part's end, and not for odd blocks.
    STEPS = power_of_two(tile.steps // 2 + 1, 1, min(32 * G, reach) // tile.BK) if G >= 32 else 1
    work = partials(tile.parts, y)
    with on_device(x):
        _linear_4bit_kernel[(tile.programs, tile.parts)](
            x, *storage, bias, s, B, work, M, rows, K, R, tile.steps * tile.BK,
            x.stride(0), s.stride(0), B.stride(0), B.stride(1), y.stride(0), y.numel(),
            NESTED=nested, WHOLE=blocksize == G, HAS_BIAS=bias is not None, G=G, STEPS=STEPS,
            BR=power_of_two(R, 16, 32), **tile.config(),
        )  # fmt: skip
        sum_partials((work, y))
    return y


def linear_4bit_backward(
    dy: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor,
    nested_code: torch.Tensor | None, nested_absmax: torch.Tensor | None, offset: torch.Tensor | None,
    blocksize: int, nested_blocksize: int, columns: int, ds: torch.Tensor | None, A: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """dx (M, K) in dy's dtype = dy W + ds A, K = columns."""
    rim = ds is not None and A is not None
    require_float(dy=dy, **({"ds": ds, "A": A} if rim else {}))
    storage, nested = _storage(
        packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize
    )  # fmt: skip
    dy = unit_columns(dy)
    (M, N), R = dy.shape, ds.shape[1] if rim else 0
    dx = torch.empty((M, columns), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    ds, A = (unit_columns(ds), A) if rim else (dy, dy)
    reach = _reach(blocksize, nested_blocksize, nested)
    tile = _tile(M, columns, N, True, dy.dtype == torch.float32, reach, dy.device)
    G = min(_group(blocksize, columns), tile.BK)
    work = partials(tile.parts, dx)
    with on_device(dy):
        _linear_4bit_backward_kernel[(tile.programs, tile.parts)](
            dy, *storage, ds, A, work, M, N, columns, R, tile.steps * tile.BN,
            dy.stride(0), ds.stride(0), A.stride(0), A.stride(1), dx.stride(0), dx.numel(),
            NESTED=nested, WHOLE=blocksize == G, G=G, BR=power_of_two(R, 16, 32),
            **tile.config(),
        )  # fmt: skip
        sum_partials((work, dx))
    return dx
