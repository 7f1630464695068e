"""Dropout masks as a pure function of (seed, member, row, column).

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), key = the seed's low and
high 32 bits, counter = (column // 8, row, member, 0). The four words give eight 16-bit values: the value of column c is
the half (c % 2) of word (c % 8) // 2, low half first. An element is kept if its value >= round(p * 65536).

One call serves eight columns, so the words are computed on a block eight times narrower than the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import config, on_device

STEPS = 65536  # p is realised in steps of 1 / 65536


def threshold(p: float) -> int:
    """Values below this are dropped."""
    return round(p * STEPS)


def kept_scale(scaling: float, p: float) -> float:
    """scaling / (1 - p) for the p realised; 0 where everything is dropped."""
    t = threshold(p)
    return scaling * STEPS / (STEPS - t) if t < STEPS else 0.0


@triton.jit
def keep_mask(seed, o_m, o_c8, i_member, threshold, BM: tl.constexpr, BC: tl.constexpr):
    """(BM, BC) booleans, True = kept, of rows `o_m` (BM) and the 8-column chunks `o_c8` (BC // 8)."""
    w0, w1, w2, w3 = tl.philox(seed, o_c8[None, :], o_m[:, None], i_member, 0, 7)
    # Each join appends an axis: [.., c & 4, c & 2, c & 1], which reshape flattens into columns in order.
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    # The comparison is made in the upper 16 bits, which spares the high half a shift.
    t = threshold.to(tl.uint32) << 16
    return tl.reshape(tl.join((b_words << 16) >= t, b_words >= t), (BM, BC))


@triton.jit(do_not_specialize=["threshold", "M", "i_member"])
def _mask_kernel(p_mask, p_seed, threshold, M, K, i_member, BM: tl.constexpr, BC: tl.constexpr):
    """mask[m, k] = 1 if (member, m, k) is kept."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    o_c8 = tl.program_id(1) * (BC // 8) + tl.arange(0, BC // 8)
    b_keep = keep_mask(tl.load(p_seed), o_m, o_c8, i_member, threshold, BM, BC)
    p_out = p_mask + o_m[:, None].to(tl.int64) * K + o_c[None, :]
    tl.store(p_out, b_keep.to(tl.int8), mask=(o_m < M)[:, None] & (o_c < K)[None, :])


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, member: int, p: float) -> torch.Tensor:
    """The (rows, columns) bool mask of one member, True = kept. `seed`: int64 tensor of one element."""
    mask = torch.empty((rows, columns), dtype=torch.int8, device=seed.device)
    if mask.numel() == 0:
        return mask.bool()
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 256))
    with on_device(seed):
        _mask_kernel[grid](mask, seed, threshold(p), rows, columns, member, **config(4, 1, BM=16, BC=256))
    return mask.bool()
