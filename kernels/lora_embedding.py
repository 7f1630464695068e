"""The operators of `ops/lora_embedding.py` on Triton: y = W[i] + c A[:, i]ᵀ Bᵀ and its backward.

i (M,), W (V, D), A (r, V), B (D, r). The columns A[:, i] are gathered once into e (M, r): a column's elements lie V
apart, a memory sector each. In the backward the tokens are sorted by index, and one program adds up all tokens of an
index in their order: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import cast, dot_rim
from ._launch import config, on_device, power_of_two, products, require_float, unit_columns
from .lora_backward import expand_backward
from .lora_outer import outer_product
from .lora_shrink import shrink_into

__all__ = ["lora_embedding", "lora_embedding_backward"]


# debug: device_assert is on, as PyTorch's own embedding has it; without it, an index out of range would read at random.
@triton.jit(debug=True, do_not_specialize=["M"])
def _gather_kernel(
    p_i, p_a, p_e, M, R, V, stride_ar, stride_av, BM: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """e[m, :] = A[:, i[m]]."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_m = o_m < M
    b_i = tl.load(p_i + o_m, mask=m_m, other=0).to(tl.int64)
    tl.device_assert((b_i >= 0) & (b_i < V), "lora_embedding: index out of range")
    m_mr = m_m[:, None] & (o_r < R)[None, :]
    b_e = tl.load(p_a + o_r[None, :].to(tl.int64) * stride_ar + b_i[:, None] * stride_av, mask=m_mr, other=0.0)
    tl.store(p_e + o_m[:, None].to(tl.int64) * R + o_r[None, :], b_e, mask=m_mr)


@triton.jit(do_not_specialize=["M"])
def _embedding_kernel(
    p_i, p_w, p_e, p_b, p_y, c, M, N, R, stride_wv, stride_bn, stride_ym,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[m, n] = W[i[m], n] + c Σ_j e[m, j] B[n, j]."""
    n_n = tl.cdiv(N, BN)
    o_m = tl.program_id(0) // n_n * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) % n_n * BN + tl.arange(0, BN)
    m_m = o_m < M
    m_n = o_n < N
    m_mn = m_m[:, None] & m_n[None, :]
    b_i = tl.load(p_i + o_m, mask=m_m, other=0).to(tl.int64)
    b_w = tl.load(p_w + b_i[:, None] * stride_wv + o_n[None, :], mask=m_mn, other=0.0)
    b_acc = tl.zeros((BM, BN), tl.float32)
    for i_r in range(0, R, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        p_block = p_e + o_m[:, None].to(tl.int64) * R + o_r[None, :]
        b_e = tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0)
        p_block = p_b + o_n[None, :].to(tl.int64) * stride_bn + o_r[:, None]
        b_b = tl.load(p_block, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_acc = dot_rim(b_e, b_b, b_acc, p_y.dtype.element_ty)
    b_y = b_w.to(tl.float32) + b_acc * c
    tl.store(p_y + o_m[:, None].to(tl.int64) * stride_ym + o_n[None, :], cast(b_y, p_y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=["M", "padding"])
def _scatter_kernel(
    p_sorted, p_order, p_de, p_da, c, padding, M, R, stride_dar, BM: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """dA[:, v] = c Σ de[order[m], :] over the run of v in the sorted indices; the program at the run's head does it."""
    i_m = tl.program_id(0)
    v = tl.load(p_sorted + i_m)
    before = tl.load(p_sorted + tl.maximum(i_m - 1, 0))
    if ((i_m == 0) | (before != v)) & (v != padding):
        o_r = tl.arange(0, BR)
        b_sum = tl.zeros((BR,), tl.float32)
        i = i_m // BM * BM  # in whole sectors of indices from here on
        goes_on = True
        while goes_on:
            o_m = tl.max_contiguous(i + tl.arange(0, BM), 1)  # the masks allow no vectors: an index a thread
            m_m = tl.load(p_sorted + o_m, mask=(o_m >= i_m) & (o_m < M), other=-1) == v
            b_m = tl.load(p_order + o_m, mask=m_m, other=0)
            p_block = p_de + b_m[:, None].to(tl.int64) * R + o_r[None, :]
            b_sum += tl.sum(tl.load(p_block, mask=m_m[:, None] & (o_r < R)[None, :], other=0.0), axis=0)
            i += BM
            goes_on = tl.sum((m_m & (o_m == i - 1)).to(tl.int32), axis=0) > 0
        p_block = p_da + o_r.to(tl.int64) * stride_dar + v.to(tl.int64)
        tl.store(p_block, cast(b_sum * c, p_da.dtype.element_ty), mask=o_r < R)


def _gather(indices: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """e (M, r) = A[:, indices]ᵀ."""
    M, R = indices.shape[0], A.shape[0]
    e = torch.empty((M, R), dtype=A.dtype, device=A.device)
    BR = power_of_two(R, 1, 64)
    BM = 1024 // BR
    _gather_kernel[(triton.cdiv(M, BM), triton.cdiv(R, BR))](
        indices, A, e, M, R, A.shape[1], A.stride(0), A.stride(1), **config(4, 1, BM=BM, BR=BR)
    )
    return e


def lora_embedding(
    indices: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, padding_idx: int = -1
) -> torch.Tensor:
    """y (M, D) in W's dtype for indices (M,), int64 or int32. `padding_idx` matters to the backward only."""
    require_float(weight=weight, A=A, B=B)
    M, N = indices.shape[0], weight.shape[1]
    y = torch.empty((M, N), dtype=weight.dtype, device=weight.device)
    if y.numel() == 0:
        return y
    indices, weight, B = indices.contiguous(), unit_columns(weight), unit_columns(B)
    most = 32 if products(weight, B) == 6 else 64
    BM, BN = power_of_two(M, 16, most), 128
    with on_device(weight):
        e = _gather(indices, A)
        _embedding_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            indices, weight, e, B, y, float(scaling), M, N, A.shape[0], weight.stride(0), B.stride(0), N,
            **config(BM // 8, 2, BM=BM, BN=BN, BR=power_of_two(A.shape[0], 16, most)),
        )  # fmt: skip
    return y


def lora_embedding_backward(
    dy: torch.Tensor, indices: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, padding_idx: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA (r, V) in A's dtype and dB (D, r) in B's from dy (M, D). Column `padding_idx` of dA stays 0; -1 for none."""
    require_float(dy=dy, A=A, B=B)
    M, R = dy.shape[0], A.shape[0]
    dA = torch.zeros(A.shape, dtype=A.dtype, device=A.device)
    dB = torch.empty(B.shape, dtype=B.dtype, device=B.device)
    if dy.numel() == 0:
        return dA, dB.zero_()
    dy, indices, B = unit_columns(dy), indices.contiguous(), unit_columns(B)
    with on_device(dy):
        e = _gather(indices, A)
        de = torch.empty((M, R), dtype=torch.float32, device=dy.device)  # dy B, before tokens of one index are added up
        if not expand_backward(dy, e, B, de, dB, float(scaling)):
            shrink_into(de, dy, B.t(), [1.0], 0.0, None)
            outer_product(dB.t(), e, dy, [scaling], 0.0, None)
        ordered, order = torch.sort(indices, stable=True)
        BR = power_of_two(R, 1, 512)
        _scatter_kernel[(M,)](
            ordered, order, de, dA, float(scaling), padding_idx, M, R, dA.stride(0),
            **config(1, 1, BM=32 if BR <= 64 else max(2, 2048 // BR), BR=BR),  # 32: an index a lane
        )  # fmt: skip
    return dA, dB
