"""The operators of `ops/cross_entropy.py` on Triton: the softmax on a tile of logits, one program a row.

The row is read twice, the second time from the cache, and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import cast
from ._launch import config, on_device, power_of_two, require_float, require_unit_columns

__all__ = ["cross_entropy_accumulate_", "cross_entropy_gradient_"]

SLACK = 8.0  # as in ops/cross_entropy.py


@triton.jit
def _tanh(b_x):
    """A polynomial near 0, 1 - 2/(1 + e^2|x|) beyond; right to 3e-7."""
    b_z = b_x * b_x
    b_p = -0.005905868485569954 * b_z + 0.02080538496375084
    b_p = b_p * b_z - 0.053786683827638626
    b_p = b_p * b_z + 0.13331958651542664
    b_p = b_p * b_z - 0.33333298563957214
    b_a = tl.abs(b_x)
    b_large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(b_a, 40.0)) + 1.0)
    return tl.where(b_a < 0.6, b_p * b_z * b_x + b_x, tl.where(b_x < 0.0, -b_large, b_large))


@triton.jit
def _logits(p_block, m_n, scale, cap, CAPPED: tl.constexpr):
    """x and t = x / cap (0 without a cap)."""
    b_x = tl.load(p_block, mask=m_n, other=0.0).to(tl.float32) * scale
    b_t = tl.zeros(b_x.shape, tl.float32)
    if CAPPED:
        b_t = _tanh(b_x / cap)
        b_x = cap * b_t
    return b_x, b_t


@triton.jit(do_not_specialize=["first", "M"])
def _cross_entropy_accumulate_kernel(
    p_z, p_labels, p_state, p_acc, first, scale, cap, slack, M, N, K, stride_zm, stride_am,
    CAPPED: tl.constexpr, WRITE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_m * stride_zm
    y = tl.load(p_labels + i_m) - first  # no column of the tile for a label elsewhere, or none
    o_n = tl.arange(0, BN)
    b_top = tl.full((BN,), float("-inf"), tl.float32)
    b_total = tl.zeros((BN,), tl.float32)
    b_label = tl.zeros((BN,), tl.float32)
    for j in range(0, N, BN):
        m_n = j + o_n < N
        m_y = (j + o_n == y) & m_n
        b_x, _ = _logits(p_row + j + o_n, m_n, scale, cap, CAPPED)
        b_total += b_x
        b_label += tl.where(m_y, b_x, 0.0)
        b_top = tl.maximum(b_top, tl.where(m_n & (j + o_n != y), b_x, float("-inf")))
    top = tl.max(b_top, axis=0)
    m = tl.load(p_state + i_m)
    factor = 1.0
    if top > m + slack:
        factor = tl.exp(m - top)
        m = top
        if WRITE:
            for k in range(0, K, BK):
                o_k = k + tl.arange(0, BK)
                p_block = p_acc + i_m * stride_am + o_k
                tl.store(p_block, tl.load(p_block, mask=o_k < K, other=0.0) * factor, mask=o_k < K)
    base = tl.where(m == float("-inf"), 0.0, m)
    b_sum = tl.zeros((BN,), tl.float32)
    for j in range(0, N, BN):
        m_n = j + o_n < N
        b_x, b_t = _logits(p_row + j + o_n, m_n, scale, cap, CAPPED)
        b_e = tl.where(m_n & (j + o_n != y), tl.exp(b_x - base), 0.0)
        b_sum += b_e
        if WRITE:
            tl.store(p_row + j + o_n, cast(b_e * (1.0 - b_t * b_t), p_z.dtype.element_ty), mask=m_n)
    p_sum = p_state + M + i_m
    tl.store(p_state + i_m, m)
    tl.store(p_sum, tl.load(p_sum) * factor + tl.sum(b_sum, axis=0))
    if (y >= 0) & (y < N):
        tl.store(p_sum + M, tl.sum(b_label, axis=0))
    tl.store(p_sum + 2 * M, tl.load(p_sum + 2 * M) + tl.sum(b_total, axis=0))


@triton.jit(do_not_specialize=["first", "M"])
def _cross_entropy_gradient_kernel(
    p_z, p_labels, p_rows, first, scale, cap, M, N, stride_zm, CAPPED: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    p_row = p_z + i_m * stride_zm
    y = tl.load(p_labels + i_m) - first
    log_sum = tl.load(p_rows + i_m)
    a = tl.load(p_rows + M + i_m)
    b = tl.load(p_rows + 2 * M + i_m)
    c = tl.load(p_rows + 3 * M + i_m)
    for j in range(0, N, BN):
        o_n = j + tl.arange(0, BN)
        m_n = o_n < N
        b_x, b_t = _logits(p_row + o_n, m_n, scale, cap, CAPPED)
        b_g = tl.where(o_n == y, c, a * tl.exp(b_x - log_sum) - b)
        tl.store(p_row + o_n, cast(b_g * scale * (1.0 - b_t * b_t), p_z.dtype.element_ty), mask=m_n)


def _checked(z: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> None:
    require_float(z=z)
    require_unit_columns("z", z)
    if rows.shape != (4, z.shape[0]) or rows.dtype != torch.float32 or not rows.is_contiguous():
        raise ValueError(f"what is known of the rows must be contiguous fp32 (4, {z.shape[0]})")
    if labels.shape != z.shape[:1] or labels.dtype != torch.int64:
        raise ValueError("labels must be one int64 a row of z")


def _block(columns: int) -> int:
    """For four warps, 8 elements a thread: with 16 one value was spilled on sm_90. Each warp loads a row's scalars, a
    sector each: with eight warps and 4,096 columns only 94 % of the loaded sectors' bytes were used."""
    return power_of_two(columns, 16, 1024)


def cross_entropy_accumulate_(
    z: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    scale: float,
    cap: float,
    state: torch.Tensor,
    acc: torch.Tensor | None,
) -> None:
    """state (4, M) is brought up to date; with acc (M, K), fp32, z (M, n) becomes the exponentials. In place."""
    _checked(z, labels, state)
    if z.numel() == 0:
        return
    if acc is not None:
        require_unit_columns("acc", acc)
    K = 0 if acc is None else acc.shape[1]
    BK = power_of_two(K, 16, 512)  # 16 bytes a thread: with 32 each warp's load would touch the sectors of two
    with on_device(z):
        _cross_entropy_accumulate_kernel[(z.shape[0],)](
            z, labels.contiguous(), state, acc, first, float(scale), float(cap), SLACK, z.shape[0], z.shape[1], K,
            z.stride(0), 0 if acc is None else acc.stride(0),
            CAPPED=cap > 0, WRITE=acc is not None, **config(4, 1, BN=_block(z.shape[1]), BK=BK),
        )  # fmt: skip


def cross_entropy_gradient_(
    z: torch.Tensor, labels: torch.Tensor, first: int, scale: float, cap: float, rows: torch.Tensor
) -> None:
    """z (M, n) becomes the gradient, in place; rows (4, M)."""
    _checked(z, labels, rows)
    if z.numel() == 0:
        return
    with on_device(z):
        _cross_entropy_gradient_kernel[(z.shape[0],)](
            z, labels.contiguous(), rows, first, float(scale), float(cap), z.shape[0], z.shape[1], z.stride(0),
            CAPPED=cap > 0, **config(4, 1, BN=_block(z.shape[1])),
        )  # fmt: skip
