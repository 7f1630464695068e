"""Several projections of one input: the vendor's products and the rims, forward and backward, without the input's part.

What `lora_linear_group` (the input is kept) and `joined` (the input is made again) have in common. A group's tensors
travel as one flat list: base weights, biases, A's, B's; `Projections` knows how many there are of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, steps
from .backend import OPS, route
from .lora_linear import column_block, rows_of, shaped
from .nf4 import Weight4bit
from .nf4_linear import input_gradient, linear


class Projections(NamedTuple):
    """Everything about the projections of one input that is not a tensor."""

    splits: tuple[int, ...]  # N of each projection
    members: tuple[int, ...]  # the projections that have an adapter
    scaling: tuple[float, ...]  # one for each member
    p: float
    stacked: bool  # one weight for all projections
    stacked_bias: bool
    fused: bool
    cast: torch.dtype | None  # autocast's dtype, to which the base is cast in the forward and again in the backward
    backend: str
    packed: tuple[Weight4bit | None, ...] = ()  # the weights of 4 bits, by projection; empty without one

    def parts(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Weights, biases, A's and B's out of one flat list."""
        n, g = len(self.splits), len(self.members)
        found, start = [], 0
        for count in (1 if self.stacked else n, 1 if self.stacked_bias else n, g, g):
            found.append(list(tensors[start : start + count]))
            start += count
        return found[0], found[1], found[2], found[3]

    def offset(self, projection: int) -> int:
        return sum(self.splits[:projection])

    def weight(self, weights: list[Tensor], projection: int) -> Any:
        """One projection's weight, in autocast's dtype where there is one."""
        w: Any = self.packed[projection] if self.packed else None
        if w is not None:
            pass
        elif self.stacked:
            w = weights[0].narrow(0, self.offset(projection), self.splits[projection])
        else:
            w = weights[projection]
        return w if self.cast is None else w.to(self.cast)


def planned(
    device: torch.device,
    weights: Sequence[Tensor | Weight4bit],
    lora_A: Sequence[Tensor | None],
    scaling: Sequence[float],
    p: float,
    *,
    stacked: bool = False,
    stacked_bias: bool = False,
    fused: bool = False,
    cast: torch.dtype | None = None,
) -> Projections:
    """The plan of a call on these tensors, with the backend that is chosen now."""
    members = tuple(i for i, a in enumerate(lora_A) if a is not None)
    packed = tuple(w if type(w) is Weight4bit else None for w in weights)
    return Projections(
        splits=tuple(w.shape[0] for w in weights),
        members=members,
        scaling=tuple(float(scaling[i]) for i in members),
        p=float(p),
        stacked=stacked,
        stacked_bias=stacked and stacked_bias,
        fused=fused,
        cast=cast,
        backend=route(device),
        packed=packed if any(w is not None for w in packed) else (),
    )


def project(
    plan: Projections,
    flat: Tensor,
    lead: torch.Size,
    s: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_B: list[Tensor],
) -> tuple[Tensor, ...]:
    """Every projection of flat (M, K) as (*lead, N_g): base product, bias, and the rim from s (M, G*r).

    They are tensors that autograd does not take for views, so that they may be changed in place.
    """
    if plan.cast is not None:
        biases = [None if b is None else b.to(plan.cast) for b in biases]
    r = 0
    rims: dict[int, tuple[Tensor, Tensor]] = {}
    if s is not None:
        r = s.shape[1] // len(plan.members)
        rims = {i: (s[:, g * r : g * r + b.shape[1]], b) for g, (i, b) in enumerate(zip(plan.members, lora_B))}

    if not plan.stacked:
        outputs = []
        for i, b in enumerate(biases):
            y = base_product(plan.backend, flat, plan.weight(weights, i), b, *rims.get(i, (None, None)))
            outputs.append(y if len(lead) == 1 else shaped(y, lead))
        return tuple(outputs)

    if plan.cast is not None:
        weights = [weights[0].to(plan.cast)]
    bias = biases[0] if plan.stacked_bias else None
    everyone = len(rims) == len(plan.splits)
    if s is not None and plan.fused and everyone:
        y = OPS[plan.backend].lora_linear_wide(flat, weights[0], bias, s, stack_columns(lora_B, r), plan.splits)
    else:
        y = gemm.linear(plan.backend, flat, weights[0], bias)
        if s is not None and everyone:
            steps.expand_(plan.backend, y, s, stack_columns(lora_B, r), plan.splits)
        else:
            for i, (s_i, b) in rims.items():
                n = plan.splits[i]
                steps.expand_(plan.backend, y.narrow(1, plan.offset(i), n), s_i, b, (n,))
    blocks = []
    for i, n in enumerate(plan.splits):
        own_bias = None if plan.stacked_bias else biases[i]
        if own_bias is not None:
            y.narrow(1, plan.offset(i), n).add_(own_bias)
        blocks.append(column_block(y, plan.offset(i), n, lead))
    return tuple(blocks)


def base_product(
    backend: str,
    x: Tensor,
    w: Tensor | Weight4bit,
    bias: Tensor | None = None,
    s: Tensor | None = None,
    B: Tensor | None = None,
) -> Tensor:
    """x (M, K) Wᵀ + bias + s (M, r) Bᵀ."""
    if isinstance(w, Weight4bit):
        return linear(backend, x, w, bias, s, B)
    y = gemm.linear(backend, x, w, bias)
    if s is not None and B is not None:
        steps.expand_(backend, y, s, B, (y.shape[1],))
    return y


def base_gradient(
    backend: str, dy: Tensor, w: Tensor | Weight4bit, into: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """dy (M, N) diag(gain) W; added to `into`, in place, where there is one. gain (N): where the product is ours."""
    if isinstance(w, Weight4bit):
        return input_gradient(backend, dy, w, into)
    return gemm.mm(backend, dy, w, gain=gain) if into is None else gemm.addmm_(backend, into, dy, w, gain)


def collect(
    plan: Projections,
    grads: Sequence[Tensor | None],
    s: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dx (M, K) of the base products alone, ds (M, G*r) before scaling and mask, and the dB's.

    s None: no adapter is trained, and no dB is formed. A projection whose gradient is None was not used. dx is a new
    tensor, None unless needed; ds is None without an adapter whose output was used.
    """
    dys = [None if dy is None else rows_of(dy) for dy in grads]
    dx = None
    if need_dx:
        for i, dy in enumerate(dys):
            if dy is not None:
                dx = base_gradient(plan.backend, dy, plan.weight(weights, i), dx)
    dB: list[Tensor | None] = [None] * len(lora_B)
    if not any(dys[i] is not None for i in plan.members):
        return dx, None, dB
    r, rows = max(a.shape[0] for a in lora_A), next(dy.shape[0] for dy in dys if dy is not None)
    parts = []
    for g, (i, b) in enumerate(zip(plan.members, lora_B)):
        dy, rank = dys[i], b.shape[1]
        if dy is None:
            ds = b.new_zeros(rows, r)
        elif s is None:
            ds = torch.mm(dy.to(b.dtype), b)
        else:
            ds, dB[g] = steps.expand_backward(plan.backend, dy, s[:, g * r : g * r + rank], b)
        parts.append(F.pad(ds, (0, r - ds.shape[1])) if ds.shape[1] < r else ds)
    return dx, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), dB


def members_of(plan: Projections, d_rows: Tensor, lora_A: list[Tensor], grads: Sequence[Tensor | None]) -> list[Any]:
    """The dA's out of the stacked one (G*r, K); None for a member whose output was not used."""
    r = d_rows.shape[0] // len(plan.members)
    return [
        d_rows.narrow(0, g * r, a.shape[0]) if grads[i] is not None else None
        for g, (i, a) in enumerate(zip(plan.members, lora_A))
    ]


def bias_grads(plan: Projections, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    sums = [None if dy is None else dy.reshape(-1, dy.shape[-1]).sum(0) for dy in grads]
    if not plan.stacked_bias:
        return [t if need else None for t, need in zip(sums, needed)]
    like = next(t for t in sums if t is not None)
    return [torch.cat([like.new_zeros(n) if t is None else t for t, n in zip(sums, plan.splits)])]


def stack_rows(parts: list[Tensor]) -> Tensor:
    """A's (r_g, K) one below another, each padded with zero rows to the largest rank."""
    if len(parts) == 1:
        return parts[0]
    r = max(part.shape[0] for part in parts)
    return torch.cat([p if p.shape[0] == r else F.pad(p, (0, 0, 0, r - p.shape[0])) for p in parts])


def stack_columns(parts: list[Tensor], r: int) -> Tensor:
    """B's (N_g, r_g) one below another, each padded with zero columns to r."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p if p.shape[1] == r else F.pad(p, (0, r - p.shape[1])) for p in parts])


def flat_inputs(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Activations as matrices; parameters (one-dimensional) and None as they are."""
    return [t if t is None or t.dim() < 2 else rows_of(t) for t in inputs]
