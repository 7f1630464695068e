"""Device functions the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter keeps bfloat16 as bare 16-bit integers: `tl.dot` multiplies those, and conversions to bfloat16
# truncate (both seen in Triton 3.9). Compiled kernels take neither detour.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _on_bf16_grid(b_v):
    """fp32 `b_v` rounded to the nearest bfloat16, still fp32."""
    bits = b_v.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _bf16(b_v):
    """fp32 `b_v` rounded to bfloat16; in the interpreter the value stays in fp32, which it multiplies in anyway."""
    if INTERPRETED:
        return _on_bf16_grid(b_v)
    return b_v.to(tl.bfloat16)


@triton.jit
def cast(b_v, dtype: tl.constexpr):
    """`b_v` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and b_v.dtype == tl.float32:
        b_v = _on_bf16_grid(b_v)
    return b_v.to(dtype)


@triton.jit
def _mma(b_a, b_b, b_acc):
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def _halves(b_v):
    """fp32 `b_v` as a sum of two bfloat16 blocks, right to 2^-17."""
    b_0 = _bf16(b_v)
    return b_0, _bf16(b_v - b_0.to(tl.float32))


@triton.jit
def _thirds(b_v):
    """fp32 `b_v` as a sum of three bfloat16 blocks, exact: 3 x 8 bits."""
    b_0 = _bf16(b_v)
    b_rest = b_v - b_0.to(tl.float32)
    b_1 = _bf16(b_rest)
    return b_0, b_1, _bf16(b_rest - b_1.to(tl.float32))


@triton.jit
def dot(b_a, b_b, b_acc):
    """b_acc + b_a @ b_b, for operands of any two of fp32, bf16 and fp16, with fp32 products and sums. Never tf32.

    fp32 operands go through the tensor cores as three bfloat16 parts: the products left out are below 2^-25 of the
    product, less than one fp32 rounding. (Multiplied as fp32, they would run on the ordinary units and wait for shared
    memory: an emulated 64 x 128 block took 2.4 wavefronts an element, three of four of them bank conflicts.) The parts'
    products are added up apart and then to `b_acc`, since tensor cores do not round their sums to nearest.
    """
    if b_a.dtype == b_b.dtype and b_a.dtype != tl.float32:
        return _mma(b_a, b_b, b_acc)
    b_zero = tl.zeros(b_acc.shape, tl.float32)
    if b_a.dtype == tl.bfloat16:
        b_b0, b_b1, b_b2 = _thirds(b_b.to(tl.float32))
        return b_acc + _mma(b_a, b_b0, _mma(b_a, b_b1, _mma(b_a, b_b2, b_zero)))
    if b_b.dtype == tl.bfloat16:
        b_a0, b_a1, b_a2 = _thirds(b_a.to(tl.float32))
        return b_acc + _mma(b_a0, b_b, _mma(b_a1, b_b, _mma(b_a2, b_b, b_zero)))
    b_a0, b_a1, b_a2 = _thirds(b_a.to(tl.float32))
    b_b0, b_b1, b_b2 = _thirds(b_b.to(tl.float32))
    b_sum = _mma(b_a2, b_b0, _mma(b_a0, b_b2, _mma(b_a1, b_b1, b_zero)))
    return b_acc + _mma(b_a0, b_b0, _mma(b_a1, b_b0, _mma(b_a0, b_b1, b_sum)))


@triton.jit
def operand(b_v, dtype: tl.constexpr):
    """`b_v` as a factor of a product in `dtype`: rounded to a 16-bit dtype, as it is for fp32."""
    if dtype != tl.float32:
        b_v = cast(b_v, dtype)
    return b_v


@triton.jit
def dot_rim(b_s, b_b, b_acc, wide: tl.constexpr):
    """b_acc + b_s @ b_b, the adapter's part of a result that is rounded to dtype `wide`.

    Beside 16-bit weights two bfloat16 parts of an fp32 adapter do: three products, right to 2^-16, where the result is
    rounded to 2^-9 (2^-11 for fp16) afterwards.
    """
    if b_s.dtype == b_b.dtype and b_s.dtype != tl.float32:
        return _mma(b_s, b_b, b_acc)
    if wide == tl.float32:
        return dot(b_s, b_b, b_acc)
    b_s0, b_s1 = _halves(b_s.to(tl.float32))
    b_b0, b_b1 = _halves(b_b.to(tl.float32))
    return _mma(b_s0, b_b0, _mma(b_s0, b_b1, _mma(b_s1, b_b0, b_acc)))


@triton.jit
def pick(i, v0, v1, v2, v3):
    """The i-th of four scalars."""
    return tl.where(i == 0, v0, tl.where(i == 1, v1, tl.where(i == 2, v2, v3)))


@triton.jit
def _sum_parts(i, p_parts, p_out, n, parts, VECTOR: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """out[i-th block] = Σ_p parts[p, i-th block] in a fixed order; parts (parts, n) fp32.

    VECTOR: n is a multiple of 16. Otherwise the mask allows no vectors, and a thread takes one element and not several
    neighbours, which it would store one by one, a sector each.
    """
    o_n = i.to(tl.int64) * BN + tl.arange(0, BN)
    if not VECTOR:
        o_n = tl.max_contiguous(o_n, 1)
    o_p = tl.arange(0, BP)
    m_n = o_n < n
    b_sum = tl.zeros((BN,), tl.float32)
    for i_p in range(0, parts, BP):
        m_p = i_p + o_p < parts
        p_block = p_parts + (i_p + o_p)[:, None].to(tl.int64) * n + o_n[None, :]
        b_sum += tl.sum(tl.load(p_block, mask=m_p[:, None] & m_n[None, :], other=0.0), axis=0)
    tl.store(p_out + o_n, cast(b_sum, p_out.dtype.element_ty), mask=m_n)


@triton.jit
def sum_parts_kernel(
    p_parts, p_out, n, parts, blocks, p_parts2, p_out2, n2, parts2,
    VECTOR: tl.constexpr, VECTOR2: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The second pass of one reduction, or of two in one launch: the programs from `blocks` on do the second."""
    i = tl.program_id(0)
    if i < blocks:
        _sum_parts(i, p_parts, p_out, n, parts, VECTOR, BP, BN)
    else:
        _sum_parts(i - blocks, p_parts2, p_out2, n2, parts2, VECTOR2, BP, BN)
