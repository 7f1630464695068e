"""LoRA on a group of projections of one input, each with an adapter of its own or with none.

    y_g = x W_g^T + bias_g + c_g dropout_g(x) A_g^T B_g^T

The formula of `lora_linear`, member by member, with what they share done once: x is read once for all s_g, dx is one
buffer to which every member adds, the masks of all members are formed in one pass over x. Where the weights are row
blocks of one matrix the base is one product and the outputs are column blocks of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, philox, steps
from .backend import OPS, autocast_enabled, exact, route
from .bordered import BorderedWeight, lora_linear_bordered
from .lora_linear import NATIVE_ELEMENTS, check, column_block, rows_of, shaped

FORMS = ("auto", "plain", "fused", "bordered")


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    *,
    stacked_weight: Tensor | BorderedWeight | None = None,
    stacked_bias: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, ...]:
    """The outputs of several projections of one input, each with its own adapter or (A and B None) with none.

    Lists have one entry a projection, shapes as in `lora_linear`; ranks may differ. Each projection with an adapter
    draws its own dropout mask. stacked_weight: (sum N_g, K), whose row blocks are the weights in their order: then the
    base is one product and the outputs are column blocks of one matrix. stacked_bias: the biases likewise, in one.
    form: "plain" (the vendor's product, then the rim added in place), "fused" (base and rim in one kernel, where the
    backend has one), "bordered" (one vendor product for both; stacked_weight must be a BorderedWeight, every projection
    have an adapter, all of one rank and dtype), or "auto", which is plain (docs/bordered_weight.md has the numbers).

    Raises ValueError on lists, shapes or options that do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    bordered = None
    if isinstance(stacked_weight, BorderedWeight):
        bordered, stacked_weight = stacked_weight, stacked_weight.weight
    elif form == "bordered":
        raise ValueError("form 'bordered' needs stacked_weight to be a BorderedWeight")
    _check(x, weights, biases, lora_A, lora_B, scaling, dropout_p, stacked_weight)
    trainable_base = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    if (
        trainable_base
        or native.transformed(x, *weights, *biases, *lora_A, *lora_B)
        or (dropout_p == 0.0 and x.numel() <= NATIVE_ELEMENTS)
    ):
        return native.linear(x, weights, biases, lora_A, lora_B, scaling, dropout_p)

    if form == "bordered" and bordered is not None:
        return _bordered(x, bordered, weights, biases, lora_A, lora_B, scaling, dropout_p)
    members = tuple(i for i, a in enumerate(lora_A) if a is not None)
    device, cast = x.device, None
    adapters: list[Any] = [lora_A[i] for i in members] + [lora_B[i] for i in members]
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, adapters = x.to(cast), [t.to(cast) for t in adapters]
    stacked = stacked_weight is not None
    plan = _Plan(
        splits=tuple(w.shape[0] for w in weights),
        members=members,
        scaling=tuple(float(scaling[i]) for i in members),
        p=float(dropout_p),
        stacked=stacked,
        stacked_bias=stacked and stacked_bias is not None,
        fused=form == "fused",
        cast=cast,
        backend=route(device),
    )
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) and members else None
    base = [stacked_weight] if stacked else [*weights]
    added = [stacked_bias] if plan.stacked_bias else [*biases]
    return _LoraLinearGroup.apply(plan, x, seed, *base, *added, *adapters)


def _bordered(
    x: Tensor,
    bordered: BorderedWeight,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float,
) -> tuple[Tensor, ...]:
    given_A, given_B = [a for a in lora_A if a is not None], [b for b in lora_B if b is not None]
    if len(given_A) != len(weights):
        raise ValueError("form 'bordered' needs an adapter on every projection")
    if autocast_enabled(x.device):
        raise ValueError("form 'bordered' computes in the weight's dtype: use form 'plain' under autocast")
    splits = [w.shape[0] for w in weights]
    outputs = lora_linear_bordered(x, bordered, given_A, given_B, scaling, splits, dropout_p)
    return tuple(y if b is None else y + b for y, b in zip(outputs, biases))


class _Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    splits: tuple[int, ...]  # N of each projection
    members: tuple[int, ...]  # the projections that have an adapter
    scaling: tuple[float, ...]  # one for each member
    p: float
    stacked: bool  # one weight for all projections
    stacked_bias: bool
    fused: bool
    cast: torch.dtype | None  # autocast's dtype, to which the base is cast in the forward and again in the backward
    backend: str

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

    def weight(self, weights: list[Tensor], projection: int) -> Tensor:
        """One projection's weight, in autocast's dtype where there is one."""
        if self.stacked:
            w = weights[0].narrow(0, self.offset(projection), self.splits[projection])
        else:
            w = weights[projection]
        return w if self.cast is None else w.to(self.cast)


class _LoraLinearGroup(torch.autograd.Function):
    """Outputs of all projections from (plan, x, seed, weights, biases, A's, B's)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, seed: Tensor | None, *tensors: Tensor | None) -> Any:
        weights, biases, lora_A, lora_B = plan.parts(tensors)
        with exact(x.device):
            s, outputs = _forward(plan, x, seed, weights, biases, lora_A, lora_B)
        # x is kept for dA and s for dB: frozen adapters need neither.
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B))
        ctx.plan, ctx.x_shape = plan, x.shape
        ctx.save_for_backward(*((x, s) if trainable else (None, None)), seed, *weights, *lora_A, *lora_B)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        x, s, seed, *tensors = ctx.saved_tensors
        if all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        n = 1 if plan.stacked else len(plan.splits)
        weights, rest = tensors[:n], tensors[n:]
        lora_A, lora_B = rest[: len(plan.members)], rest[len(plan.members) :]
        need_dx = ctx.needs_input_grad[1]
        dx: Tensor | None
        _, need_bias, need_A, need_B = plan.parts(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            each = [plan.weight(weights, i) for i in range(len(plan.splits))]
            dx, dA, dB = native.linear_backward(
                grads, x, seed, each, plan.members, lora_A, lora_B, plan.scaling, plan.p, ctx.x_shape
            )
        else:
            with exact(next(dy for dy in grads if dy is not None).device):
                dx, dA, dB = _backward(plan, grads, x, s, seed, weights, lora_A, lora_B, need_dx, ctx.x_shape)
        d_bias = _bias_grads(plan, grads, need_bias)
        dA = [t if need else None for t, need in zip(dA, need_A)]
        dB = [t if need else None for t, need in zip(dB, need_B)]
        return (None, dx if need_dx else None, None, *[None] * n, *d_bias, *dA, *dB)


def _forward(
    plan: _Plan,
    x: Tensor,
    seed: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """s, and the outputs as tensors that autograd does not take for views (so that they may be changed in place)."""
    flat, lead = rows_of(x), x.shape[:-1]
    if plan.cast is not None:
        weights, biases = [w.to(plan.cast) for w in weights], [None if b is None else b.to(plan.cast) for b in biases]
    s, r = None, 0
    rims: dict[int, tuple[Tensor, Tensor]] = {}
    if lora_A:
        r = max(a.shape[0] for a in lora_A)
        s = steps.shrink(plan.backend, flat, _stack_rows(lora_A, r), plan.scaling, plan.p, seed)
        rims = {i: (s[:, g * r : g * r + b.shape[1]], b) for g, (i, b) in enumerate(zip(plan.members, lora_B))}

    if not plan.stacked:
        outputs = []
        for i, (w, b) in enumerate(zip(weights, biases)):
            y = F.linear(flat, w, b)
            if i in rims:
                steps.expand_(plan.backend, y, *rims[i], (plan.splits[i],))
            outputs.append(y if x.dim() == 2 else shaped(y, lead))
        return s, tuple(outputs)

    bias = biases[0] if plan.stacked_bias else None
    everyone = len(rims) == len(plan.splits)
    if s is not None and plan.fused and everyone:
        y = OPS[plan.backend].lora_linear_wide(flat, weights[0], bias, s, _stack_columns(lora_B, r), plan.splits)
    else:
        y = F.linear(flat, weights[0], bias)
        if s is not None and everyone:
            steps.expand_(plan.backend, y, s, _stack_columns(lora_B, r), plan.splits)
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
    return s, tuple(blocks)


def _backward(
    plan: _Plan,
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    need_dx: bool,
    x_shape: torch.Size,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    dys = [None if dy is None else rows_of(dy) for dy in grads]
    dx = None
    if need_dx:
        for i, dy in enumerate(dys):
            if dy is not None:
                w = plan.weight(weights, i)
                dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)

    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_B)
    flat = dx if x is None else rows_of(x)  # with x None, dA is formed of dx and not used
    if lora_A and flat is not None:
        r = max(a.shape[0] for a in lora_A)
        parts = []
        for g, (i, b) in enumerate(zip(plan.members, lora_B)):
            dy, rank = dys[i], b.shape[1]
            if dy is None:
                ds = lora_A[g].new_zeros(flat.shape[0], r)
            elif s is None:
                ds = torch.mm(dy.to(b.dtype), b)
            else:
                ds, dB[g] = steps.expand_backward(plan.backend, dy, s[:, g * r : g * r + rank], b)
            parts.append(F.pad(ds, (0, r - ds.shape[1])) if ds.shape[1] < r else ds)
        ds = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        d_rows = steps.shrink_backward(plan.backend, ds, flat, _stack_rows(lora_A, r), plan.scaling, plan.p, seed, dx)
        for g, (i, a) in enumerate(zip(plan.members, lora_A)):
            if x is not None and dys[i] is not None:
                dA[g] = d_rows.narrow(0, g * r, a.shape[0])
    return None if dx is None else dx.view(x_shape), dA, dB


def _bias_grads(plan: _Plan, grads: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    sums = [None if dy is None else dy.reshape(-1, dy.shape[-1]).sum(0) for dy in grads]
    if not plan.stacked_bias:
        return [t if need else None for t, need in zip(sums, needed)]
    like = next(t for t in sums if t is not None)
    return [torch.cat([like.new_zeros(n) if t is None else t for t, n in zip(sums, plan.splits)])]


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float,
    stacked_weight: Tensor | None,
) -> None:
    if not weights or len({len(part) for part in (weights, biases, lora_A, lora_B, scaling)}) != 1:
        raise ValueError(
            "weights, biases, lora_A, lora_B and scaling need one entry a projection, got "
            f"{len(weights)}, {len(biases)}, {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    for i, (w, a, b) in enumerate(zip(weights, lora_A, lora_B)):
        if (a is None) != (b is None):
            raise ValueError(f"projection {i}: lora_A and lora_B must both be given or both be None")
        if a is not None and b is not None:
            check(x, w, a, b, dropout_p, f"projection {i}")
        elif x.dim() == 0 or w.shape[1] != x.shape[-1]:
            raise ValueError(f"projection {i}: weight {tuple(w.shape)} does not fit an input {tuple(x.shape)}")
    shape = (sum(w.shape[0] for w in weights), weights[0].shape[1])
    if stacked_weight is not None and stacked_weight.shape != shape:
        raise ValueError(f"stacked_weight must be {shape}, got {tuple(stacked_weight.shape)}")


def _stack_rows(parts: list[Tensor], r: int) -> Tensor:
    """A's (r_g, K) one below another, each padded with zero rows to r."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p if p.shape[0] == r else F.pad(p, (0, 0, 0, r - p.shape[0])) for p in parts])


def _stack_columns(parts: list[Tensor], r: int) -> Tensor:
    """B's (N_g, r_g) one below another, each padded with zero columns to r."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p if p.shape[1] == r else F.pad(p, (0, r - p.shape[1])) for p in parts])
