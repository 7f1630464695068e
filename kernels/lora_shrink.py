"""The narrow product on the input's side of a LoRA: s_g = c_g · (mask_g ∘ x) A_gᵀ, with c_g = scaling_g / (1 - p).

x (M, K) is read once for all members of a group; A stacks the members' rows (G·r, K). The same kernel makes
ds = dy B, with A = Bᵀ, where the rank is too large to ride along in the fused backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast, dot, operand, pick
from ._launch import (
    aligned,
    chunks,
    config,
    limits,
    on_device,
    padded,
    partials,
    per_pass,
    power_of_two,
    products,
    splits_for,
    sum_partials,
    unit_columns,
)
from .philox import keep_mask, kept_scale, threshold


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "members"])
def _shrink_kernel(
    p_x, p_a, p_s, p_seed, c0, c1, c2, c3, threshold, M, K, R, i_first, members, k_part,
    stride_xm, stride_ar, stride_ak, stride_sm, stride_part,
    DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """s[:, gR:(g+1)R] = c_g (mask_g ∘ x) A_gᵀ for G members a program, BR of their R columns, over `k_part` of K."""
    n_c = tl.cdiv(R, BR)
    n_g = tl.cdiv(members, G)
    # Programs that share a row block are neighbours, so that x comes from L2 for all but the first.
    i_c = tl.program_id(0) % n_c
    i_g = tl.program_id(0) // n_c % n_g * G
    i_m = tl.program_id(0) // (n_c * n_g)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = i_c * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    o_c8 = tl.arange(0, BK // 8)
    m_m = o_m < M
    p_rows = p_x + o_m[:, None].to(tl.int64) * stride_xm
    if DROP:
        seed = tl.load(p_seed)

    accs = (tl.zeros((BM, BR), tl.float32),) * G
    k_first = tl.program_id(1) * k_part
    for k in range(k_first, tl.minimum(K, k_first + k_part), BK):
        m_k = k + o_k < K
        b_x = tl.load(p_rows + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_x = operand(b_x, p_a.dtype.element_ty)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & ((i_g + g) * R + o_r < members * R)
            o_ar = ((i_g + g) * R + o_r).to(tl.int64) * stride_ar
            b_a = tl.load(
                p_a + o_ar[None, :] + (k + o_k)[:, None].to(tl.int64) * stride_ak,
                mask=m_k[:, None] & m_r[None, :],
                other=0.0,
            )
            b_xg = b_x
            if DROP:
                b_keep = keep_mask(seed, o_m, k // 8 + o_c8, i_first + i_g + g, threshold, BM, BK)
                b_xg = tl.where(b_keep, b_x, 0.0).to(b_x.dtype)
            new = new + (dot(b_xg, b_a, accs[g]),)
        accs = new

    p_s += tl.program_id(1).to(tl.int64) * stride_part
    for g in tl.static_range(G):
        m_r = (o_r < R) & ((i_g + g) * R + o_r < members * R)
        p_out = p_s + o_m[:, None].to(tl.int64) * stride_sm + ((i_g + g) * R + o_r)[None, :]
        b_s = accs[g] * pick(i_g + g, c0, c1, c2, c3)
        tl.store(p_out, cast(b_s, p_s.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


def members_of(scaling: Sequence[float], rows: int, p: float) -> tuple[list[float], int, bool]:
    """(c per member, rank of a member, dropout?) for A with `rows` rows.

    Without dropout, members of one scaling are one member of rank G·r: one product over the stacked A.
    """
    if rows % len(scaling):
        raise ValueError(f"A has {rows} rows, not a multiple of the {len(scaling)} members that scaling names")
    drop = threshold(p) > 0
    if not drop and all(c == scaling[0] for c in scaling):
        return [float(scaling[0])], rows, False
    return [kept_scale(c, p) for c in scaling], rows // len(scaling), drop


def _shrink_tile(
    R: int, members: int, M: int, n: int, drop: bool, multiprocessors: int, vector: bool = True
) -> dict[str, Any]:
    """At most 64 fp32 sums a thread, and a stage of x of 8 KiB; of less where the registers go to masks, to the parts
    of `n` > 1 products, or to loads that are not `vector` loads. (Stages of 16 KiB spilled four registers on sm_90.)

    A warp to 16 rows: more would make each mask more than once. 64 rows, unless that leaves multiprocessors idle.
    """
    most = {1: 128, 3: 64, 6: 32}[n] if vector else 32
    BR = power_of_two(R, 16, most)
    BM = power_of_two(M, 16, 32 if n == 6 or triton.cdiv(M, 64) * triton.cdiv(R, BR) < multiprocessors else 64)
    G = per_pass(members, most // BR)
    if n == 6 and BR > 16:
        BK = 16
    else:
        BK = 32 if n == 6 or not vector or (drop and G > 1) or (n == 3 and BR > 32) else 64
    return config(warps=BM // 16, stages=3, G=G, BM=BM, BK=BK, BR=BR)


def shrink_into(
    out: torch.Tensor, x: torch.Tensor, A: torch.Tensor, scaling: Sequence[float], p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """`lora_shrink` into `out` (M, G·r), contiguous. A may have any strides."""
    M, K = x.shape
    if out.numel() == 0:
        return out
    x = unit_columns(x)
    c, R, drop = members_of(scaling, A.shape[0], p)
    multiprocessors = limits(x.device).multiprocessors
    tile = _shrink_tile(R, min(len(c), 4), M, products(x, A), drop, multiprocessors, aligned(x, A))
    programs = triton.cdiv(M, tile["BM"]) * triton.cdiv(R, tile["BR"]) * triton.cdiv(len(c), tile["G"])
    # A second launch pays only where most multiprocessors would be idle, and for parts of 1024 columns or more.
    steps = triton.cdiv(K, tile["BK"])
    parts, per_part = splits_for(programs, steps, triton.cdiv(1024, tile["BK"]), multiprocessors // 2)
    work = partials(parts, out)
    with on_device(x):
        for first, last in chunks(len(c)):
            n = last - first
            rows = triton.cdiv(M, tile["BM"]) * triton.cdiv(R, tile["BR"]) * triton.cdiv(n, tile["G"])
            _shrink_kernel[(rows, parts)](
                x, A[first * R :], work[..., first * R :], seed if drop else None, *padded(c[first:last]), threshold(p),
                M, K, R, first, n, per_part * tile["BK"],
                x.stride(0), A.stride(0), A.stride(1), out.stride(0), out.numel(),
                DROP=drop, **tile,
            )  # fmt: skip
        sum_partials((work, out))
    return out
