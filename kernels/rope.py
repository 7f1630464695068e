"""The operator of `ops/rope.py` on Triton, argument for argument; the formula is there.

A program has some tokens of a sequence: it reads their rows of cos and sin once and turns all heads of q, then of k.
Where there are few tokens the heads are dealt out to several programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import cast
from ._launch import config, limits, on_device, power_of_two, require_float, unit_columns

__all__ = ["rope"]


@triton.jit
def _turn(
    p_x, p_y, o_x, o_y, b_c1, b_c2, b_t1, b_t2, m_t, columns, width,
    INTERLEAVED: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """One head of BT tokens, whose rows begin at `o_x` and `o_y`."""
    o_p = tl.arange(0, BP)
    half = columns // 2
    if INTERLEAVED:
        o_c = tl.arange(0, 2 * BP)[None, :]
        mask = m_t[:, None] & (o_c < columns)
        b_x = tl.load(p_x + o_x[:, None] + o_c, mask=mask, other=0.0).to(tl.float32)
        b_1, b_2 = tl.split(tl.reshape(b_x, (BT, BP, 2)))
        b_y = tl.join(b_1 * b_c1 + b_2 * b_t1, b_2 * b_c2 + b_1 * b_t2)
        tl.store(p_y + o_y[:, None] + o_c, cast(tl.reshape(b_y, (BT, 2 * BP)), p_y.dtype.element_ty), mask=mask)
    else:
        mask = m_t[:, None] & (o_p < half)[None, :]
        p_low = p_x + o_x[:, None] + o_p[None, :]
        b_1 = tl.load(p_low, mask=mask, other=0.0).to(tl.float32)
        b_2 = tl.load(p_low + half, mask=mask, other=0.0).to(tl.float32)
        p_low = p_y + o_y[:, None] + o_p[None, :]
        tl.store(p_low, cast(b_1 * b_c1 + b_2 * b_t1, p_y.dtype.element_ty), mask=mask)
        tl.store(p_low + half, cast(b_2 * b_c2 + b_1 * b_t2, p_y.dtype.element_ty), mask=mask)
    if BREST > 0:
        o_rest = columns + tl.arange(0, BREST)[None, :]
        mask = m_t[:, None] & (o_rest < width)
        tl.store(p_y + o_y[:, None] + o_rest, tl.load(p_x + o_x[:, None] + o_rest, mask=mask), mask=mask)


@triton.jit
def _table(p_row, m_t, columns, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
    """A table's values for the first and for the second of each pair."""
    o_p = tl.arange(0, BP)[None, :]
    half = columns // 2
    if (
        INTERLEAVED and not PAIRS
    ):  # whole rows, taken apart in registers: every second column would be half of each line
        o_c = tl.arange(0, 2 * BP)[None, :]
        b_v = tl.load(p_row + o_c, mask=m_t[:, None] & (o_c < columns), other=0.0).to(tl.float32)
        b_1, b_2 = tl.split(tl.reshape(b_v, (BT, BP, 2)))
    else:
        mask = m_t[:, None] & (o_p < half)
        b_1 = tl.load(p_row + o_p, mask=mask, other=0.0).to(tl.float32)
        b_2 = b_1
        if not PAIRS:
            b_2 = tl.load(p_row + o_p + half, mask=mask, other=0.0).to(tl.float32)
    return b_1, b_2


@triton.jit(do_not_specialize=["T", "heads_q", "heads_k", "heads_each"])
def _rope_kernel(
    p_q, p_k, p_qo, p_ko, p_cos, p_sin, T, heads_q, heads_k, heads_each, columns, width,
    qb, qh, qt, kb, kh, kt, qob, qoh, qot, kob, koh, kot, cb, ct, sb, st,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr, HAS_K: tl.constexpr, BT: tl.constexpr,
    BP: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """y = x cos + turned(x) sin for BT tokens of one sequence and `heads_each` heads of q and of k."""
    i_b = (tl.program_id(0) // tl.cdiv(T, BT)).to(tl.int64)
    o_t = (tl.program_id(0) % tl.cdiv(T, BT) * BT + tl.arange(0, BT)).to(tl.int64)
    m_t = o_t < T
    b_c1, b_c2 = _table(p_cos + i_b * cb + o_t[:, None] * ct, m_t, columns, INTERLEAVED, PAIRS, BT, BP)
    b_s1, b_s2 = _table(p_sin + i_b * sb + o_t[:, None] * st, m_t, columns, INTERLEAVED, PAIRS, BT, BP)
    if INVERSE:
        b_t1 = b_s2
        b_t2 = -b_s1
    else:
        b_t1 = -b_s1
        b_t2 = b_s2
    first = tl.program_id(1) * heads_each
    i_h = first.to(tl.int64)
    o_x = i_b * qb + i_h * qh + o_t * qt
    o_y = i_b * qob + i_h * qoh + o_t * qot
    for _h in range(first, tl.minimum(first + heads_each, heads_q)):
        _turn(p_q, p_qo, o_x, o_y, b_c1, b_c2, b_t1, b_t2, m_t, columns, width, INTERLEAVED, BT, BP, BREST)
        o_x += qh
        o_y += qoh
    if HAS_K:
        o_x = i_b * kb + i_h * kh + o_t * kt
        o_y = i_b * kob + i_h * koh + o_t * kot
        for _h in range(first, tl.minimum(first + heads_each, heads_k)):
            _turn(p_k, p_ko, o_x, o_y, b_c1, b_c2, b_t1, b_t2, m_t, columns, width, INTERLEAVED, BT, BP, BREST)
            o_x += kh
            o_y += koh


def rope(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, pairs: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """q and k turned, laid out as q and k are."""
    require_float(q=q, cos=cos, sin=sin, **({} if k is None else {"k": k}))
    out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    B, heads, T, width = q.shape
    if q.numel() == 0:
        return out
    # Results are written as they lie; where that has no contiguous rows, by way of a copy.
    into = tuple(t if t is None or t.stride(-1) == 1 or width == 1 else t.contiguous() for t in out)
    q, cos, sin, k = unit_columns(q), unit_columns(cos), unit_columns(sin), k if k is None else unit_columns(k)
    columns = cos.shape[-1] * (2 if pairs else 1)
    BP = power_of_two(columns // 2, 1, 1024)
    # 512 pairs a program at most, so that the four tables stay in registers: 16 a thread.
    BT = power_of_two(T, 1, max(1, 512 // BP))
    rest = width - columns
    programs = B * triton.cdiv(T, BT)
    most = max(heads, 0 if k is None else k.shape[1])
    deal = min(most, max(1, limits(q.device).multiprocessors // programs))
    each = triton.cdiv(most, deal)
    strides_k = (0,) * 3 if k is None else k.stride()[:3]
    strides_ko = (0,) * 3 if into[1] is None else into[1].stride()[:3]
    table = [t.stride(i) if i or t.shape[0] > 1 else 0 for t in (cos, sin) for i in (0, 1)]
    with on_device(q):
        _rope_kernel[(programs, triton.cdiv(most, each))](
            q, k, into[0], into[1], cos, sin, T, heads, 0 if k is None else k.shape[1], each, columns, width,
            *q.stride()[:3], *strides_k, *into[0].stride()[:3], *strides_ko, *table,
            INTERLEAVED=interleaved, PAIRS=pairs, INVERSE=inverse, HAS_K=k is not None,
            **config(4, 1, BT=BT, BP=BP, BREST=power_of_two(rest, 1, 4096) if rest else 0),
        )  # fmt: skip
    for result, written in zip(out, into):
        if result is not None and written is not result:
            result.copy_(written)
    return out
