"""The norms of the rows of W + c B A in one pass over W (see `ops/weight_norm.py`).

    |W_n|² + 2c B_n · (W Aᵀ)_n + c² B_n (A Aᵀ) B_nᵀ

The first kernel makes the three terms for a block of rows, a chunk of the rank a program; the second adds the chunks
and takes the root. Rows whose terms cancel it computes from W + c B A itself, in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import dot
from ._launch import config, on_device, power_of_two, require_float, unit_columns
from .lora_shrink import shrink_into


@triton.jit
def _terms_kernel(
    p_w, p_a, p_b, p_gram, p_terms, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_bn,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """terms[chunk] = |W|², B · W Aᵀ, B (A Aᵀ) Bᵀ and B² diag(A Aᵀ) by row, what BR columns of B give to them."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    m_n = o_n < N
    m_r = o_r < R
    p_rows = p_w + o_n[:, None].to(tl.int64) * stride_wn
    p_cols = p_a + o_r[None, :].to(tl.int64) * stride_ar
    b_cross = tl.zeros((BN, BR), tl.float32)
    b_own = tl.zeros((BN,), tl.float32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_w = tl.load(p_rows + (k + o_k)[None, :].to(tl.int64) * stride_wk, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_cols + (k + o_k)[:, None], mask=m_k[:, None] & m_r[None, :], other=0.0)
        # Each block's products are added up apart: tensor cores do not round their sums to nearest.
        b_cross += dot(b_w, b_a, tl.zeros((BN, BR), tl.float32))
        b_wide = b_w.to(tl.float32)
        b_own += tl.sum(b_wide * b_wide, axis=1)

    p_brow = p_b + o_n[:, None].to(tl.int64) * stride_bn
    b_b = tl.load(p_brow + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
    b_added = tl.zeros((BN, BR), tl.float32)
    for r in range(0, R, BR):
        o_c = r + tl.arange(0, BR)
        b_c = tl.load(p_brow + o_c[None, :], mask=m_n[:, None] & (o_c < R)[None, :], other=0.0).to(tl.float32)
        p_g = p_gram + o_c[:, None] * R + o_r[None, :]
        b_g = tl.load(p_g, mask=(o_c < R)[:, None] & m_r[None, :], other=0.0)
        b_added = dot(b_c, b_g, b_added)
    b_diagonal = tl.load(p_gram + o_r * (R + 1), mask=m_r, other=0.0)
    p_out = p_terms + tl.program_id(1).to(tl.int64) * 4 * N + o_n
    tl.store(p_out, b_own, mask=m_n)
    tl.store(p_out + N, tl.sum(b_cross * b_b, axis=1), mask=m_n)
    tl.store(p_out + 2 * N, tl.sum(b_added * b_b, axis=1), mask=m_n)
    tl.store(p_out + 3 * N, tl.sum(b_b * b_b * b_diagonal[None, :], axis=1), mask=m_n)


@triton.jit(do_not_specialize=["chunks", "R"])
def _root_kernel(
    p_terms, p_w, p_a, p_b, p_out, c_high, c_low, N, K, R, chunks,
    stride_wn, stride_wk, stride_ar, stride_bn,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = the root of the sum of the terms, or where they cancel |W + c B A| by row; c = c_high + c_low."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    c = tl.zeros((BN,), tl.float64) + c_high + c_low
    b_own = tl.load(p_terms + o_n, mask=m_n, other=0.0).to(tl.float64)
    b_cross = tl.zeros((BN,), tl.float64)
    b_added = tl.zeros((BN,), tl.float64)
    b_sizes = tl.zeros((BN,), tl.float64)
    for i in range(0, chunks):
        p_chunk = p_terms + i * 4 * N + o_n
        b_cross += tl.load(p_chunk + N, mask=m_n, other=0.0).to(tl.float64)
        b_added += tl.load(p_chunk + 2 * N, mask=m_n, other=0.0).to(tl.float64)
        b_sizes += tl.load(p_chunk + 3 * N, mask=m_n, other=0.0).to(tl.float64)
    b_total = b_own + 2 * c * b_cross + c * c * b_added
    b_gone = b_total < 0.25 * (b_own + c * c * (tl.abs(b_added) + b_sizes))
    if tl.max(b_gone.to(tl.int32), axis=0) > 0:
        b_square = tl.zeros((BN,), tl.float64)
        o_k = tl.arange(0, BK)
        for k in range(0, K, BK):
            m_k = k + o_k < K
            b_sum = tl.zeros((BN, BK), tl.float64)
            for i in range(0, R, 16):  # a sector of each row of B
                o_r = tl.max_contiguous(i + tl.arange(0, 16), 1)  # an element a thread: the mask allows no vectors
                p_block = p_b + o_n[:, None].to(tl.int64) * stride_bn + o_r[None, :]
                b_b = tl.load(p_block, mask=m_n[:, None] & (o_r < R)[None, :], other=0.0).to(tl.float64)
                for j in range(i, tl.minimum(R, i + 16)):
                    b_bj = tl.sum(tl.where((o_r == j)[None, :], b_b, 0.0), axis=1)
                    b_aj = tl.load(p_a + j * stride_ar + k + o_k, mask=m_k, other=0.0).to(tl.float64)
                    b_sum += b_bj[:, None] * b_aj[None, :]
            p_block = p_w + o_n[:, None].to(tl.int64) * stride_wn + (k + o_k)[None, :].to(tl.int64) * stride_wk
            b_w = tl.load(p_block, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float64)
            b_row = b_w + c[:, None] * b_sum
            b_square += tl.sum(b_row * b_row, axis=1)
        b_total = tl.where(b_gone, b_square, b_total)
    tl.store(p_out + o_n, tl.sqrt(tl.where(b_total < 0, 0.0, b_total)).to(tl.float32), mask=m_n)


def weight_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The norms (N,) in fp32 for W (N, K) of any strides, A (r, K) and B (N, r). Memory O(N + r²) besides."""
    require_float(weight=weight, A=A, B=B)
    N, K = weight.shape
    R = A.shape[0]
    out = torch.empty(N, dtype=torch.float32, device=weight.device)
    if N == 0 or K == 0:
        return out.zero_()
    A, B = unit_columns(A), unit_columns(B)
    gram = shrink_into(torch.empty((R, R), dtype=torch.float32, device=A.device), A, A, [1.0], 0.0, None)
    narrow = weight.dtype == A.dtype != torch.float32
    BR = power_of_two(R, 16, 64 if narrow else 32)
    chunks = triton.cdiv(R, BR)
    terms = torch.empty((chunks, 4, N), dtype=torch.float32, device=weight.device)
    high = torch.tensor(scaling, dtype=torch.float64).float().item()
    BN = 32
    with on_device(weight):
        _terms_kernel[(triton.cdiv(N, BN), chunks)](
            weight, A, B, gram, terms, N, K, R,
            weight.stride(0), weight.stride(1), A.stride(0), B.stride(0),
            **config(8 if BR == 64 else 4, 2, BN=BN, BK=64 if narrow else 32, BR=BR),
        )  # fmt: skip
        _root_kernel[(triton.cdiv(N, 16),)](
            terms, weight, A, B, out, high, scaling - high, N, K, R, chunks,
            weight.stride(0), weight.stride(1), A.stride(0), B.stride(0),
            **config(4, 1, BN=16, BK=64),
        )  # fmt: skip
    return out
