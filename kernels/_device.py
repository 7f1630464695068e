"""Device functions the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bare 16-bit integers: `tl.dot` multiplies those, and conversions to bfloat16
# truncate (both seen in Triton 3.9). Compiled kernels take neither detour.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(b_v, dtype: tl.constexpr):
    """`b_v` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and b_v.dtype == tl.float32:
        bits = b_v.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        b_v = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_v.to(dtype)


@triton.jit
def dot(b_a, b_b, b_acc):
    """b_acc + b_a @ b_b in fp32; fp32 operands are multiplied as fp32, never as tf32."""
    if INTERPRETED and b_a.dtype == tl.bfloat16:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def dot_mixed(b_a, b_b, b_acc):
    """`dot` of operands that may differ in dtype: in fp32 if they do."""
    if b_a.dtype == b_b.dtype:
        return dot(b_a, b_b, b_acc)
    return dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc)


@triton.jit
def split_bf16(b_v):
    """fp32 `b_v` as a sum of two bfloat16 blocks, right to 16 bits."""
    b_high = cast(b_v, tl.bfloat16)
    return b_high, cast(b_v - b_high.to(tl.float32), tl.bfloat16)


@triton.jit
def dot_rim(b_s, b_b, b_acc, wide: tl.constexpr):
    """b_acc + b_s @ b_b for an accumulator shared with a product of dtype `wide`.

    Adapters in fp32 beside 16-bit weights are split in two bfloat16 parts each: three tensor-core products, right to
    2^-16, where the sum is rounded to 2^-9 (2^-11 for fp16) afterwards. A true fp32 product would take the accumulator
    through another register layout, and spill.
    """
    if wide == tl.float32:
        return dot(b_s.to(tl.float32), b_b.to(tl.float32), b_acc)
    if b_s.dtype == tl.float32 or b_b.dtype == tl.float32:
        b_s0, b_s1 = split_bf16(b_s.to(tl.float32))
        b_b0, b_b1 = split_bf16(b_b.to(tl.float32))
        b_acc = dot(b_s1, b_b0, b_acc)
        b_acc = dot(b_s0, b_b1, b_acc)
        return dot(b_s0, b_b0, b_acc)
    return dot(b_s, cast(b_b, b_s.dtype), b_acc)


@triton.jit
def pick(i, v0, v1, v2, v3):
    """The i-th of four scalars."""
    return tl.where(i == 0, v0, tl.where(i == 1, v1, tl.where(i == 2, v2, v3)))


@triton.jit
def sum_parts_kernel(p_parts, p_out, n, parts, BP: tl.constexpr, BN: tl.constexpr):
    """out[i] = sum of parts[:, i] in a fixed order: the second pass of a reduction, the same bits every run.

    parts (parts, n) fp32, out n values of any dtype.
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, BP)
    m_n = o_n < n
    b_sum = tl.zeros((BN,), tl.float32)
    for i_p in range(0, parts, BP):
        m_p = i_p + o_p < parts
        p_block = p_parts + (i_p + o_p)[:, None].to(tl.int64) * n + o_n[None, :]
        b_sum += tl.sum(tl.load(p_block, mask=m_p[:, None] & m_n[None, :], other=0.0), axis=0)
    tl.store(p_out + o_n, cast(b_sum, p_out.dtype.element_ty), mask=m_n)
