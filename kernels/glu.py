"""The operators of `ops/glu.py` on Triton, argument for argument; the formulas are there.

gate, up, dh (M, N) with contiguous rows of any stride (inputs that have none are copied), A (G·r, N). One read of each
input and one write of each result; s and dA of long reductions go through an fp32 workspace and a second pass in a
fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._device import cast, dot, dot_rim, operand, pick
from ._launch import (
    config,
    limits,
    on_device,
    padded,
    partials,
    power_of_two,
    products,
    require_float,
    splits_for,
    sum_partials,
    unit_columns,
)
from .activation import NAMES, both, value
from .lora_expand import add_product
from .lora_outer import outer_product
from .lora_shrink import members_of, shrink_into
from .philox import keep_mask, threshold

__all__ = ["glu", "glu_backward", "glu_shrink", "glu_shrink_backward"]


@triton.jit(do_not_specialize=["M"])
def _glu_kernel(
    p_gate, p_up, p_h, M, N, stride_g, stride_u,
    ACT: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h = act(gate) up, a block of BM rows and BN columns a program."""
    o_m = (tl.program_id(0) // tl.cdiv(N, BN) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
    o_n = (tl.program_id(0) % tl.cdiv(N, BN) * BN + tl.arange(0, BN))[None, :]
    mask = (o_m < M) & (o_n < N)
    b_h = value(tl.load(p_gate + o_m * stride_g + o_n, mask=mask, other=0.0).to(tl.float32), ACT)
    if GATED:
        b_h *= tl.load(p_up + o_m * stride_u + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_h + o_m * N + o_n, cast(b_h, p_h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _glu_backward_kernel(
    p_dh, p_gate, p_up, p_dgate, p_dup, M, N, stride_dh, stride_g, stride_u,
    ACT: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dgate = dh up act'(gate), dup = dh act(gate)."""
    o_m = (tl.program_id(0) // tl.cdiv(N, BN) * BM + tl.arange(0, BM))[:, None].to(tl.int64)
    o_n = (tl.program_id(0) % tl.cdiv(N, BN) * BN + tl.arange(0, BN))[None, :]
    mask = (o_m < M) & (o_n < N)
    b_dh = tl.load(p_dh + o_m * stride_dh + o_n, mask=mask, other=0.0).to(tl.float32)
    b_f, b_d = both(tl.load(p_gate + o_m * stride_g + o_n, mask=mask, other=0.0).to(tl.float32), ACT)
    if GATED:
        b_d *= tl.load(p_up + o_m * stride_u + o_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_dup + o_m * N + o_n, cast(b_dh * b_f, p_dup.dtype.element_ty), mask=mask)
    tl.store(p_dgate + o_m * N + o_n, cast(b_dh * b_d, p_dgate.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["threshold", "M", "i_first", "members"])
def _glu_shrink_kernel(
    p_gate, p_up, p_a, p_h, p_s, p_seed, c0, c1, c2, c3, threshold, M, N, R, i_first, members, n_part,
    stride_g, stride_u, stride_ar, stride_sm, stride_part,
    ACT: tl.constexpr, GATED: tl.constexpr, DROP: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """h, and s of all members (G >= members, BR >= R), over `n_part` columns."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = o_m[:, None].to(tl.int64)
    o_r = tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    o_c8 = tl.arange(0, BK // 8)
    m_m = o_m < M
    if DROP:
        seed = tl.load(p_seed)

    accs = (tl.zeros((BM, BR), tl.float32),) * G
    first = tl.program_id(1) * n_part
    for k in range(first, tl.minimum(N, first + n_part), BK):
        m_k = k + o_k < N
        mask = m_m[:, None] & m_k[None, :]
        o_n = (k + o_k)[None, :]
        b_h = value(tl.load(p_gate + o_row * stride_g + o_n, mask=mask, other=0.0).to(tl.float32), ACT)
        if GATED:
            b_h *= tl.load(p_up + o_row * stride_u + o_n, mask=mask, other=0.0).to(tl.float32)
        b_h = tl.where(mask, cast(b_h, p_h.dtype.element_ty), 0.0).to(p_h.dtype.element_ty)
        tl.store(p_h + o_row * N + o_n, b_h, mask=mask)
        b_h = operand(b_h, p_a.dtype.element_ty)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_block = p_a + (g * R + o_r).to(tl.int64)[None, :] * stride_ar + (k + o_k)[:, None]
            b_a = tl.load(p_block, mask=m_k[:, None] & m_r[None, :], other=0.0)
            b_hg = b_h
            if DROP:
                b_keep = keep_mask(seed, o_m, k // 8 + o_c8, i_first + g, threshold, BM, BK)
                b_hg = tl.where(b_keep, b_h, 0.0).to(b_h.dtype)
            new = new + (dot(b_hg, b_a, accs[g]),)
        accs = new

    p_s += tl.program_id(1).to(tl.int64) * stride_part
    for g in tl.static_range(G):
        m_r = (o_r < R) & (g * R + o_r < members * R)
        b_s = accs[g] * pick(g, c0, c1, c2, c3)
        p_out = p_s + o_row * stride_sm + (g * R + o_r)[None, :]
        tl.store(p_out, cast(b_s, p_s.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["threshold", "M", "members"])
def _glu_shrink_backward_kernel(
    p_dh, p_ds, p_gate, p_up, p_a, p_dgate, p_dup, p_da, p_seed, c0, c1, c2, c3, threshold, M, N, R, members, m_part,
    stride_dh, stride_dsm, stride_g, stride_u, stride_ar, stride_part,
    ACT: tl.constexpr, GATED: tl.constexpr, NEED: tl.constexpr, DROP: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dA and, with NEED, dgate and dup, for BK columns and `m_part` rows. All members: G >= members, BR >= R."""
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_c8 = tl.program_id(0) * (BK // 8) + tl.arange(0, BK // 8)
    o_r = tl.arange(0, BR)
    m_k = o_k < N
    if DROP:
        seed = tl.load(p_seed)

    accs = (tl.zeros((BR, BK), tl.float32),) * G
    rims = ()
    if NEED:
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_rim = p_a + (g * R + o_r)[:, None].to(tl.int64) * stride_ar + o_k[None, :]
            rims = rims + (tl.load(p_rim, mask=m_r[:, None] & m_k[None, :], other=0.0),)

    m_first = tl.program_id(1) * m_part
    for m in range(m_first, tl.minimum(M, m_first + m_part), BM):
        o_m = m + tl.arange(0, BM)
        o_row = o_m[:, None].to(tl.int64)
        m_m = o_m < M
        mask = m_m[:, None] & m_k[None, :]
        b_f, b_d = both(tl.load(p_gate + o_row * stride_g + o_k[None, :], mask=mask, other=0.0).to(tl.float32), ACT)
        b_h = b_f
        if GATED:
            b_up = tl.load(p_up + o_row * stride_u + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
            b_h = b_f * b_up
            b_d *= b_up
        b_h = tl.where(mask, cast(b_h, p_gate.dtype.element_ty), 0.0).to(p_gate.dtype.element_ty)
        b_h = operand(b_h, p_a.dtype.element_ty)
        if NEED:
            b_dh = tl.load(p_dh + o_row * stride_dh + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        new = ()
        for g in tl.static_range(G):
            m_r = (o_r < R) & (g * R + o_r < members * R)
            p_block = p_ds + o_row * stride_dsm + (g * R + o_r)[None, :]
            b_ds = operand(tl.load(p_block, mask=m_m[:, None] & m_r[None, :], other=0.0), p_a.dtype.element_ty)
            b_hg = b_h
            if DROP:
                b_keep = keep_mask(seed, o_m, o_c8, g, threshold, BM, BK)
                b_hg = tl.where(b_keep, b_h, 0.0).to(b_h.dtype)
            new = new + (dot(tl.trans(b_ds), b_hg, accs[g]),)
            if NEED:
                b_rim = dot_rim(b_ds, rims[g], tl.zeros((BM, BK), tl.float32), p_gate.dtype.element_ty)
                b_rim *= pick(g, c0, c1, c2, c3)
                if DROP:
                    b_rim = tl.where(b_keep, b_rim, 0.0)
                b_dh += b_rim
        accs = new
        if NEED:
            tl.store(p_dgate + o_row * N + o_k[None, :], cast(b_dh * b_d, p_dgate.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(p_dup + o_row * N + o_k[None, :], cast(b_dh * b_f, p_dup.dtype.element_ty), mask=mask)

    p_da += tl.program_id(1).to(tl.int64) * stride_part
    for g in tl.static_range(G):
        m_r = (o_r < R) & (g * R + o_r < members * R)
        p_out = p_da + (g * R + o_r)[:, None].to(tl.int64) * N + o_k[None, :]
        b_da = accs[g] * pick(g, c0, c1, c2, c3)
        tl.store(p_out, cast(b_da, p_da.dtype.element_ty), mask=m_r[:, None] & m_k[None, :])


def _checked(act: str, gate: torch.Tensor, **others: torch.Tensor | None) -> None:
    given = {name: t for name, t in others.items() if t is not None}
    require_float(gate=gate, **given)
    if act not in NAMES:
        raise ValueError(f"unknown activation {act!r}; the Triton kernels have {', '.join(NAMES)}")
    for name in ("up", "dh"):
        if name in given and given[name].shape != gate.shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, gate {tuple(gate.shape)}; they must be the same")


def _rows(t: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """`t` with contiguous rows, and their distance."""
    if t is None:
        return None, 0
    t = unit_columns(t)
    return t, t.stride(0)


def _tile(N: int) -> dict[str, Any]:
    """1024 elements: 8 a thread, 16 bytes of a 16-bit matrix. Short rows come several at once."""
    BN = power_of_two(N, 16, 1024)
    return config(4, 1, BM=1024 // BN, BN=BN)


def _blocks(M: int, N: int, tile: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),)


def glu(gate: torch.Tensor, up: torch.Tensor | None, act: str) -> torch.Tensor:
    """h (M, N)."""
    _checked(act, gate, up=up)
    M, N = gate.shape
    h = torch.empty((M, N), dtype=gate.dtype, device=gate.device)
    if h.numel():
        (gate, stride_g), (up, stride_u), tile = _rows(gate), _rows(up), _tile(N)
        with on_device(gate):
            _glu_kernel[_blocks(M, N, tile)](
                gate, up, h, M, N, stride_g, stride_u, ACT=act, GATED=up is not None, **tile
            )  # fmt: skip
    return h


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dgate and, where there is an up, dup."""
    _checked(act, gate, up=up, dh=dh)
    M, N = gate.shape
    dgate = torch.empty((M, N), dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty((M, N), dtype=up.dtype, device=up.device)
    if dgate.numel():
        (dh, stride_dh), (gate, stride_g), (up, stride_u), tile = _rows(dh), _rows(gate), _rows(up), _tile(N)
        with on_device(gate):
            _glu_backward_kernel[_blocks(M, N, tile)](
                dh, gate, up, dgate, dup, M, N, stride_dh, stride_g, stride_u, ACT=act, GATED=up is not None, **tile
            )  # fmt: skip
    return dgate, dup


def _shrink_tile(R: int, members: int, M: int, n: int, drop: bool, multiprocessors: int) -> dict[str, Any] | None:
    """As `lora_shrink`'s; None where not all members' sums fit beside the activation: then h is read again for s."""
    BR = power_of_two(R, 16, 1024)
    if members * BR > {1: 64, 3: 32, 6: 16}[n]:
        return None
    BM = power_of_two(M, 16, 32 if n == 6 or triton.cdiv(M, 64) < multiprocessors else 64)
    BK = 16 if n == 6 else 32 if drop and (members > 1 or n == 3) else 64
    return config(warps=BM // 16, stages=2, G=members, BM=BM, BK=BK, BR=BR)


def glu_shrink(
    gate: torch.Tensor, up: torch.Tensor | None, act: str, A: torch.Tensor, scaling: Sequence[float], p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """h (M, N) and s (M, G·r) in A's dtype. One pass up to 64 columns of s (16 in fp32); beyond, one for each."""
    _checked(act, gate, up=up, A=A)
    M, N = gate.shape
    s = torch.empty((M, A.shape[0]), dtype=A.dtype, device=A.device)
    c, R, drop = members_of(scaling, A.shape[0], p)
    multiprocessors = limits(gate.device).multiprocessors
    tile = _shrink_tile(R, len(c), M, products(gate, A), drop, multiprocessors) if len(c) <= 4 else None
    if tile is None or M == 0 or N == 0:
        h = glu(gate, up, act)
        return h, shrink_into(s, h, A, scaling, p, seed)
    h = torch.empty((M, N), dtype=gate.dtype, device=gate.device)
    (gate, stride_g), (up, stride_u), A = _rows(gate), _rows(up), unit_columns(A)
    programs = triton.cdiv(M, tile["BM"])
    parts, per_part = splits_for(
        programs, triton.cdiv(N, tile["BK"]), triton.cdiv(1024, tile["BK"]), multiprocessors // 2
    )
    work = partials(parts, s)
    with on_device(gate):
        _glu_shrink_kernel[(programs, parts)](
            gate, up, A, h, work, seed if drop else None, *padded(c), threshold(p), M, N, R, 0, len(c),
            per_part * tile["BK"], stride_g, stride_u, A.stride(0), s.stride(0), s.numel(),
            ACT=act, GATED=up is not None, DROP=drop, **tile,
        )  # fmt: skip
        sum_partials((work, s))
    return h, s


def _backward_tile(R: int, members: int, M: int, n: int, drop: bool) -> dict[str, Any] | None:
    """As `lora_shrink_backward`'s with all members at once; None where their sums would not stay in registers.

    16 rows at a time where several masks, or a mask and sums of 64 columns, are made beside the activation: 32 spilled.
    """
    BR = power_of_two(R, 16, 1024)
    if members * BR > {1: 64, 3: 32, 6: 16}[n]:
        return None
    most = 16 if n == 6 or (drop and (members > 1 or BR == 64)) else 32
    BK = 32 if n == 6 and drop else 64  # with 64 columns of fp32 and their mask 3 accesses spilled on sm_120
    return config(warps=4, stages=2, G=members, BM=power_of_two(M, 16, most), BK=BK, BR=BR)


def glu_shrink_backward(
    dh: torch.Tensor | None, ds: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, act: str, A: torch.Tensor,
    scaling: Sequence[float], p: float, seed: torch.Tensor | None, need_input: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """dgate and dup (None unless need_input) and dA. One pass up to 64 columns of ds (16 in fp32); beyond, several."""
    if need_input and dh is None:
        raise ValueError("dh is needed for the gradient of the input")
    dh = dh if need_input else None
    _checked(act, gate, up=up, dh=dh, ds=ds, A=A)
    M, N = gate.shape
    dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
    dgate = torch.empty((M, N), dtype=gate.dtype, device=gate.device) if need_input else None
    dup = torch.empty((M, N), dtype=up.dtype, device=up.device) if need_input and up is not None else None
    if M == 0 or N == 0:
        return dgate, dup, dA.zero_()
    c, R, drop = members_of(scaling, A.shape[0], p)
    p = p if drop else 0.0
    tile = _backward_tile(R, len(c), M, products(gate, A), drop) if len(c) <= 4 else None
    ds, A = unit_columns(ds), unit_columns(A)
    if tile is None:
        outer_product(dA, ds, glu(gate, up, act), c, p, seed)
        if dh is not None:
            total = dh.to(torch.float32, copy=True)
            for g, c_g in enumerate(c):
                rank = slice(g * R, (g + 1) * R)
                add_product(total, ds[:, rank], A[rank].t(), c_g, p, seed, g)
            dgate, dup = glu_backward(total, gate, up, act)
        return dgate, dup, dA
    (dh, stride_dh), (gate, stride_g), (up, stride_u) = _rows(dh), _rows(gate), _rows(up)
    programs = triton.cdiv(N, tile["BK"])
    parts, per_part = splits_for(programs, triton.cdiv(M, tile["BM"]), 4, limits(gate.device).multiprocessors)
    work = partials(parts, dA)
    with on_device(gate):
        _glu_shrink_backward_kernel[(programs, parts)](
            dh, ds, gate, up, A, dgate, dup, work, seed if drop else None, *padded(c), threshold(p), M, N, R, len(c),
            per_part * tile["BM"], stride_dh, ds.stride(0), stride_g, stride_u, A.stride(0), dA.numel(),
            ACT=act, GATED=up is not None, NEED=need_input, DROP=drop, **tile,
        )  # fmt: skip
        sum_partials((work, dA))
    return dgate, dup, dA
