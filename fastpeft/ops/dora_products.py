"""What DoRA does beside the base products, as operators: what the backends implement. `dora_linear` has the algebra.

One projection with base product x W^T, S = c dropout(x) A^T of rank r, and a gain for each output.

    dora_gain               n = norm in the magnitude's precision, (2, N): magnitude / n - 1 and n
    dora_expand_            v = y + S B^T,  y = v + gain (v - bias)                          gain = g - 1
    dora_mix_               t = u + S B^T,  y = y + bias + S B^T + gain t                    gain = g - 1, t replaces u
    dora_expand_backward    dS = (gain dy) B,  dB = gain (dy^T S),  dt = out_gain dy,        gain = g
                            sums = sum over rows of dy (y - bias)                            all in one pass over dy
    dropout                 kept mask * x
    dropout_add_            dx += kept mask * v
    dora_drop_              `dora_mix_` for u = dropout(x) W^T, not given; returns t
    dora_drop_backward_     dx -= (1 - mask) * ((gain dy) W)

x (M, K), y, u, t, dy (M, N), S (M, r), B (N, r), W (N, K); gain and bias (N), gain in fp32. mask is that of `philox`
for one member, kept = 1/(1 - p) for the probability it realises. Sums are in fp32 (float64 if an operand is) and
rounded once to the result's dtype: y, u, dx to their own, dt to dy's, dS to S's, dB to B's, sums to gain's.

The last two are for the CPU at a small p, where next to nothing is dropped:

    dropout(x) W^T = kept (x W^T - dropped(x) W^T)

costs the p-th part of a second product with W, its few columns gathered one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .backend import define
from .products import _accumulator

SMALLEST_GAIN = 2.0**-100 - 1


def gain_reference(norm: Tensor, magnitude: Tensor) -> Tensor:
    """(2, N) like norm (N), which is fp32 or float64. n is as exact as the magnitude is, so that the magnitude at its
    start gives a gain of 1 to the bit. A row of zeros divides by no 0."""
    n = norm.to(magnitude.dtype).to(norm.dtype).clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.stack(((magnitude.flatten().to(n.dtype) - n).div_(n).clamp_min_(SMALLEST_GAIN), n))


def expand_reference(y: Tensor, s: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """In place on y (M, N)."""
    acc = _accumulator(y, s, B)
    v = y.to(acc) + s.to(acc) @ B.to(acc).T
    y.copy_(v + gain.to(acc) * (v if bias is None else v - bias.to(acc)))


def mix_reference(y: Tensor, u: Tensor, s: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """In place on y (M, N) and u (M, N)."""
    acc = _accumulator(y, s, B)
    rim = s.to(acc) @ B.to(acc).T
    t = u.to(acc) + rim
    out = y.to(acc) + rim + gain.to(acc) * t
    y.copy_(out if bias is None else out + bias.to(acc))
    u.copy_(t)


def expand_backward_reference(
    dy: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    B: Tensor,
    gain: Tensor,
    out_gain: Tensor | None,
    dt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dS (M, r), dB (N, r) and the sums (N); dt (M, N) is written where it is given. Without y the sums are zero."""
    acc = _accumulator(dy, s, B)
    scaled = dy.to(acc) * gain.to(acc)
    sums = torch.zeros_like(gain)
    if y is not None:
        kept = y.to(acc) if bias is None else y.to(acc) - bias.to(acc)
        sums = (dy.to(acc) * kept).sum(0).to(gain.dtype)
    if dt is not None and out_gain is not None:
        dt.copy_(dy.to(acc) * out_gain.to(acc))
    return (scaled @ B.to(acc)).to(s.dtype), (scaled.T @ s.to(acc)).to(B.dtype), sums


def _mask(t: Tensor, p: float, seed: Tensor, member: int) -> Tensor:
    return philox.keep_mask(seed, member, t.shape[0], t.shape[1], p)


def dropout_reference(x: Tensor, p: float, seed: Tensor, member: int) -> Tensor:
    """(M, K) like x."""
    return x * _mask(x, p, seed, member) * philox.keep_scale(p)


def dropout_add_reference(dx: Tensor, v: Tensor, p: float, seed: Tensor, member: int) -> None:
    """In place on dx (M, K)."""
    acc = _accumulator(dx)
    dx.copy_(dx.to(acc) + v.to(acc) * _mask(v, p, seed, member) * philox.keep_scale(p))


def drop_reference(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    p: float,
    seed: Tensor,
    member: int,
) -> Tensor:
    """In place on y (M, N); t (M, N)."""
    u = dropout_reference(x, p, seed, member).to(y.dtype) @ weight.T
    mix_reference(y, u, s, B, gain, bias)
    return u


def drop_backward_reference(
    dx: Tensor, dy: Tensor, weight: Tensor, gain: Tensor, p: float, seed: Tensor, member: int
) -> None:
    """In place on dx (M, K)."""
    acc = _accumulator(dx, dy)
    dropped = (dy.to(acc) * gain.to(acc)) @ weight.to(acc)
    dx.copy_(dx.to(acc) - dropped * ~_mask(dx, p, seed, member))


def _gain_fake(norm: Tensor, magnitude: Tensor) -> Tensor:
    return norm.new_empty(2, norm.shape[0])


def _in_place_fake(*operands: object) -> None:
    return None


def _expand_backward_fake(
    dy: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    s: Tensor,
    B: Tensor,
    gain: Tensor,
    out_gain: Tensor | None,
    dt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), B.new_empty(B.shape), torch.empty_like(gain)


def _dropout_fake(x: Tensor, p: float, seed: Tensor, member: int) -> Tensor:
    return x.new_empty(x.shape)


def _drop_fake(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    p: float,
    seed: Tensor,
    member: int,
) -> Tensor:
    return y.new_empty(y.shape)


define(
    "dora_gain",
    "(Tensor norm, Tensor magnitude) -> Tensor",
    reference=gain_reference,
    fake=_gain_fake,
    kernels="dora_linear",
)
define(
    "dora_expand_",
    "(Tensor(a!) y, Tensor s, Tensor B, Tensor gain, Tensor? bias) -> ()",
    reference=expand_reference,
    fake=_in_place_fake,
    kernels="dora_linear",
)
define(
    "dora_mix_",
    "(Tensor(a!) y, Tensor(b!) u, Tensor s, Tensor B, Tensor gain, Tensor? bias) -> ()",
    reference=mix_reference,
    fake=_in_place_fake,
    kernels="dora_linear",
)
define(
    "dora_expand_backward",
    "(Tensor dy, Tensor? y, Tensor? bias, Tensor s, Tensor B, Tensor gain, Tensor? out_gain, Tensor(a!)? dt)"
    " -> (Tensor ds, Tensor dB, Tensor sums)",
    reference=expand_backward_reference,
    fake=_expand_backward_fake,
    kernels="dora_linear",
)
define(
    "dropout",
    "(Tensor x, float p, Tensor seed, int member) -> Tensor",
    reference=dropout_reference,
    fake=_dropout_fake,
    kernels="dora_linear",
)
define(
    "dropout_add_",
    "(Tensor(a!) dx, Tensor v, float p, Tensor seed, int member) -> ()",
    reference=dropout_add_reference,
    fake=_in_place_fake,
    kernels="dora_linear",
)
define(
    "dora_drop_",
    "(Tensor(a!) y, Tensor x, Tensor weight, Tensor s, Tensor B, Tensor gain, Tensor? bias, float p, Tensor seed,"
    " int member) -> Tensor",
    reference=drop_reference,
    fake=_drop_fake,
)
define(
    "dora_drop_backward_",
    "(Tensor(a!) dx, Tensor dy, Tensor weight, Tensor gain, float p, Tensor seed, int member) -> ()",
    reference=drop_backward_reference,
    fake=_in_place_fake,
)
