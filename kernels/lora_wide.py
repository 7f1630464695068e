"""Base product and adapter in one matrix product; the adapter is a K step more.

    y_g = x W_gᵀ + b_g + s_g B_gᵀ
    dx  = dy W + Σ_g c_g · mask_g ∘ (ds_g A_g)

The rim comes last in the forward: where it is larger than the base, adding the base's many terms to it would round each
of them at the rim's size. In the backward c_g and the mask fall on the rim alone, which takes a second accumulator;
with one member and no mask in 16 bit, where fp32 sums are exact enough in any order, the rim comes first instead, and
the main loop continues on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast, dot, dot_rim, pick
from ._launch import MEMBERS, aligned, config, limits, on_device, padded, power_of_two
from .lora_expand import add_product, member_of_tile, tiles_of_members
from .philox import keep_mask, threshold


@triton.jit
def _tile_of_program(M, tiles, BM: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles share their columns' weights in L2."""
    i = tl.program_id(0)
    i_first = i // (GROUP * tiles) * GROUP
    size = tl.minimum(tl.cdiv(M, BM) - i_first, GROUP)
    i = i % (GROUP * tiles)
    return i_first + i % size, i // size


@triton.jit
def _add_product(
    b_acc, p_a, p_b, K, stride_ak, stride_bk, m_a, m_b, EVEN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """b_acc + a @ b over K: `p_a` (BM, 1) and `p_b` (1, BN) point at the first element of each row and column."""
    o_k = tl.arange(0, BK)
    for k in range(0, K, BK):
        o_ak = (k + o_k)[None, :].to(tl.int64) * stride_ak
        o_bk = (k + o_k)[:, None].to(tl.int64) * stride_bk
        if EVEN:
            b_a = tl.load(p_a + o_ak, mask=m_a, other=0.0)
            b_b = tl.load(p_b + o_bk, mask=m_b, other=0.0)
        else:
            m_k = k + o_k < K
            b_a = tl.load(p_a + o_ak, mask=m_a & m_k[None, :], other=0.0)
            b_b = tl.load(p_b + o_bk, mask=m_b & m_k[:, None], other=0.0)
        b_acc = dot(b_a, cast(b_b, b_a.dtype), b_acc)
    return b_acc


@triton.jit(do_not_specialize=["M", "t1", "t2", "t3", "tiles"])
def _wide_kernel(
    p_x, p_w, p_bias, p_s, p_b, p_y, M, K, R, tiles, t1, t2, t3, n1, n2, n3, n4,
    stride_xm, stride_wn, stride_wk, stride_sm, stride_bn, stride_br, stride_ym,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A BM x BN tile of y, the columns of one member."""
    i_m, i_t = _tile_of_program(M, tiles, BM, GROUP)
    i_g, i_n, n_end = member_of_tile(i_t, t1, t2, t3, n1, n2, n3, n4, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n + tl.arange(0, BN)
    m_m = (o_m < M)[:, None]
    m_n = (o_n < n_end)[None, :]
    o_m64 = o_m[:, None].to(tl.int64)
    o_n64 = o_n[None, :].to(tl.int64)

    b_acc = tl.zeros((BM, BN), tl.float32)
    b_acc = _add_product(b_acc, p_x + o_m64 * stride_xm, p_w + o_n64 * stride_wn, K, 1, stride_wk, m_m, m_n, EVEN, BK)
    for i_r in range(0, R, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        b_s = tl.load(p_s + o_m64 * stride_sm + (i_g * R + o_r)[None, :], mask=m_m & m_r[None, :], other=0.0)
        b_b = tl.load(p_b + o_n64 * stride_bn + o_r[:, None] * stride_br, mask=m_r[:, None] & m_n, other=0.0)
        b_acc = dot_rim(b_s, b_b, b_acc, p_x.dtype.element_ty)
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n, mask=o_n < n_end, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_m64 * stride_ym + o_n64, cast(b_acc, p_y.dtype.element_ty), mask=m_m & m_n)


@triton.jit
def _add_rim(
    b_acc, p_ds, p_a, i_first, R, stride_ar, m_m, m_n, wide: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """b_acc + ds A of the member whose R columns of ds begin at `i_first`."""
    for i_r in range(0, R, BR):
        m_r = i_r + tl.arange(0, BR) < R
        o_r = i_first + i_r + tl.arange(0, BR)
        b_ds = tl.load(p_ds + o_r[None, :], mask=m_m & m_r[None, :], other=0.0)
        b_a = tl.load(p_a + o_r[:, None].to(tl.int64) * stride_ar, mask=m_r[:, None] & m_n, other=0.0)
        b_acc = dot_rim(b_ds, b_a, b_acc, wide)
    return b_acc


@triton.jit(do_not_specialize=["threshold", "M", "members", "tiles"])
def _wide_backward_kernel(
    p_dy, p_w, p_ds, p_a, p_dx, p_seed, c0, c1, c2, c3, threshold, M, N, K, R, members, tiles,
    stride_dym, stride_wn, stride_wk, stride_dsm, stride_ar, stride_dxm,
    DROP: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A BM x BN tile of dx (BN of its K columns), summed over N in steps of BK. ONE: one member and no mask."""
    i_m, i_t = _tile_of_program(M, tiles, BM, GROUP)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_t * BN + tl.arange(0, BN)
    m_m = (o_m < M)[:, None]
    m_n = (o_n < K)[None, :]
    o_m64 = o_m[:, None].to(tl.int64)
    o_n64 = o_n[None, :].to(tl.int64)
    p_ds += o_m64 * stride_dsm
    p_a += o_n64
    b_acc = tl.zeros((BM, BN), tl.float32)
    if ONE:
        b_acc = _add_rim(b_acc, p_ds, p_a, 0, R, stride_ar, m_m, m_n, p_dy.dtype.element_ty, BR) * c0
    b_acc = _add_product(b_acc, p_dy + o_m64 * stride_dym, p_w + o_n64 * stride_wk, N, 1, stride_wn, m_m, m_n, EVEN, BK)
    if not ONE:
        for i_g in range(0, members):
            b_rim = tl.zeros((BM, BN), tl.float32)
            b_rim = _add_rim(b_rim, p_ds, p_a, i_g * R, R, stride_ar, m_m, m_n, p_dy.dtype.element_ty, BR)
            b_rim *= pick(i_g, c0, c1, c2, c3)
            if DROP:
                o_c8 = i_t * (BN // 8) + tl.arange(0, BN // 8)
                b_rim = tl.where(keep_mask(tl.load(p_seed), o_m, o_c8, i_g, threshold, BM, BN), b_rim, 0.0)
            b_acc += b_rim
    tl.store(p_dx + o_m64 * stride_dxm + o_n64, cast(b_acc, p_dx.dtype.element_ty), mask=m_m & m_n)


# (BM, BN, BK, warps, stages, rate): rate is the share of the tensor cores' speed that a tile's operand reuse allows,
# a rough figure that only ranks the tiles against each other.
_TILES_16 = (
    (128, 256, 64, 8, 3, 1.0),
    (128, 128, 64, 8, 3, 0.85),
    (64, 128, 64, 4, 3, 0.65),
    (64, 128, 64, 8, 3, 0.6),
    (64, 64, 64, 4, 3, 0.45),
    (16, 128, 64, 4, 3, 0.15),
)
_TILES_32 = ((64, 64, 32, 4, 2, 1.0), (32, 64, 32, 4, 2, 0.8), (16, 64, 32, 4, 2, 0.5))


def wide_tile(M: int, N: int, sums: int, bits32: bool, device: torch.device) -> dict[str, Any]:
    """The tile of least estimated time, waves * work / rate, among those whose stages fit in shared memory.

    `sums`: fp32 sums that a thread may keep, the rest of its registers being taken.
    """
    limit = limits(device)
    size = 4 if bits32 else 2
    best, least = None, float("inf")
    for BM, BN, BK, warps, stages, rate in _TILES_32 if bits32 else _TILES_16:
        if (BM + BN) * BK * size * stages > limit.shared_bytes or BM * BN / (32 * warps) > sums:
            continue
        waves = triton.cdiv(triton.cdiv(M, BM) * triton.cdiv(N, BN), limit.multiprocessors)
        if waves * BM * BN / rate < least:
            best, least = (BM, BN, BK, warps, stages), waves * BM * BN / rate
    if best is None:
        raise RuntimeError(f"no tile of the fused LoRA product fits in {limit.shared_bytes} bytes of shared memory")
    BM, BN, BK, warps, stages = best
    return config(warps=warps, stages=stages, BM=BM, BN=BN, BK=BK)


def _sums(operand: torch.Tensor, weight: torch.Tensor, adapter: torch.Tensor, apart: bool) -> int:
    """How many sums a thread may keep.

    Half where the rim is `apart`, which takes a second accumulator and perhaps the mask, or where the adapter is split
    in parts; a quarter for both, or where rows are not aligned: only vector loads go past the registers.
    """
    if operand.dtype == torch.float32:
        return 16 if apart else 32
    split = adapter.dtype == torch.float32
    if not aligned(operand, weight) or (apart and split):
        return 32
    return 64 if apart or split else 128


def _rank_step(R: int, adapter: torch.Tensor, tile: dict[str, Any]) -> int:
    """BR: the rim's operands are loaded beside the accumulator, so they are kept small where that is large."""
    return power_of_two(R, 16, 16 if adapter.dtype == torch.float32 or tile["BN"] == 256 else 32)


def wide(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, s: torch.Tensor, B: torch.Tensor,
    splits: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """y (M, N) of x (M, K), weight (N, K) of any strides, s (M, G·r), B (N, r)."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if len(splits) > MEMBERS:  # the kernel takes four members; the others' columns are a product of their own
        n, R = sum(splits[:MEMBERS]), B.shape[1] * MEMBERS
        y[:, :n] = wide(x, weight[:n], None if bias is None else bias[:n], s[:, :R], B[:n], splits[:MEMBERS])
        y[:, n:] = wide(x, weight[n:], None if bias is None else bias[n:], s[:, R:], B[n:], splits[MEMBERS:])
        return y
    R = B.shape[1]
    tile = wide_tile(M, N, _sums(x, weight, B, False), x.dtype == torch.float32, x.device)
    tiles, t, n = tiles_of_members(splits, tile["BN"])
    with on_device(x):
        _wide_kernel[(triton.cdiv(M, tile["BM"]) * tiles,)](
            x, weight, bias, s, B, y, M, K, R, tiles, *t, *n,
            x.stride(0), weight.stride(0), weight.stride(1), s.stride(0), B.stride(0), B.stride(1), y.stride(0),
            HAS_BIAS=bias is not None, EVEN=K % tile["BK"] == 0, GROUP=8, BR=_rank_step(R, B, tile), **tile,
        )  # fmt: skip
    return y


def wide_backward(
    dy: torch.Tensor, weight: torch.Tensor, ds: torch.Tensor, A: torch.Tensor,
    c: Sequence[float], R: int, p: float, seed: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """dx (M, K) of dy (M, N), weight (N, K) of any strides, ds (M, G·R), A (G·R, K), len(c) = G."""
    (M, N), K = dy.shape, weight.shape[1]
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    drop, n = threshold(p) > 0, min(len(c), MEMBERS)
    one = n == 1 and not drop and dy.dtype != torch.float32
    tile = wide_tile(M, K, _sums(dy, weight, A, not one), dy.dtype == torch.float32, dy.device)
    tiles = triton.cdiv(K, tile["BN"])
    with on_device(dy):
        _wide_backward_kernel[(triton.cdiv(M, tile["BM"]) * tiles,)](
            dy, weight, ds, A, dx, seed if drop else None, *padded(c[:n]), threshold(p), M, N, K, R, n, tiles,
            dy.stride(0), weight.stride(0), weight.stride(1), ds.stride(0), A.stride(0), dx.stride(0),
            DROP=drop, ONE=one, EVEN=N % tile["BK"] == 0, GROUP=8, BR=_rank_step(R, A, tile), **tile,
        )  # fmt: skip
    for g in range(n, len(c)):
        rank = slice(g * R, (g + 1) * R)
        add_product(dx, ds[:, rank], A[rank].t(), c[g], p, seed, g)
    return dx
