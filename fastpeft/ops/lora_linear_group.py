"""LoRA on a group of projections of one input, each with an adapter of its own or with none.

    y_g = x W_g^T + bias_g + c_g dropout_g(x) A_g^T B_g^T

The formula of `lora_linear`, member by member, with what they share done once: x is read once for all s_g, dx is one
buffer to which every member adds, the masks of all members are formed in one pass over x. Where the weights are row
blocks of one matrix the base is one product and the outputs are column blocks of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, philox, steps
from .backend import autocast_enabled, exact
from .bordered import BorderedWeight, lora_linear_bordered
from .lora_linear import NATIVE_ELEMENTS, check, lora_linear, rows_of
from .nf4 import Weight4bit, dequantize_4bit
from .nf4_linear import nf4_linear
from .projections import Projections, bias_grads, collect, members_of, planned, project, stack_rows

FORMS = ("auto", "plain", "fused", "bordered")


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Any],
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
    draws its own dropout mask. Weights may be of 4 bits (`nf4_linear`). stacked_weight: (sum N_g, K), whose row blocks
    are the weights in their order: then the base is one product and the outputs are column blocks of one matrix.
    stacked_bias: the biases likewise, in one.
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
    quantised = any(type(w) is Weight4bit for w in weights)
    if quantised and torch.compiler.is_compiling():
        return tuple(nf4_or_plain(x, *one, dropout_p) for one in zip(weights, biases, lora_A, lora_B, scaling))
    parameters = [w.packed if isinstance(w, Weight4bit) else w for w in weights]
    trainable_base = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    if (
        trainable_base
        or native.transformed(x, *parameters, *biases, *lora_A, *lora_B)
        or (dropout_p == 0.0 and x.numel() <= NATIVE_ELEMENTS and not quantised)
    ):
        weights = [dequantize_4bit(w, x.dtype) if isinstance(w, Weight4bit) else w for w in weights]
        return native.linear(x, weights, biases, lora_A, lora_B, scaling, dropout_p)

    if form == "bordered" and bordered is not None:
        return _bordered(x, bordered, weights, biases, lora_A, lora_B, scaling, dropout_p)
    device, dtype, cast = x.device, x.dtype, None
    adapters: list[Any] = [a for a in lora_A if a is not None] + [b for b in lora_B if b is not None]
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, adapters = x.to(cast), [t.to(cast) for t in adapters]
    stacked = stacked_weight is not None
    plan = planned(
        device,
        weights,
        lora_A,
        scaling,
        dropout_p,
        stacked=stacked,
        stacked_bias=stacked_bias is not None,
        fused=form == "fused",
        cast=cast,
    )
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) and plan.members else None
    base: list[Any] = [stacked_weight] if stacked else parameters
    added = [stacked_bias] if plan.stacked_bias else [*biases]
    outputs = _LoraLinearGroup.apply(plan, x, seed, *base, *added, *adapters)
    if cast is None or not quantised:
        return outputs
    return tuple(y.to(dtype) if w is not None else y for w, y in zip(plan.packed, outputs))  # as bitsandbytes gives it


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


def nf4_or_plain(
    x: Tensor,
    weight: Tensor | Weight4bit,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """One projection, for torch.compile, which joins several by itself."""
    if isinstance(weight, Weight4bit):
        return nf4_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
    if lora_A is None or lora_B is None:
        return torch.nn.functional.linear(x, weight, bias)
    return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p)


class _LoraLinearGroup(torch.autograd.Function):
    """Outputs of all projections from (plan, x, seed, weights, biases, A's, B's)."""

    @staticmethod
    def forward(ctx: Any, plan: Projections, x: Tensor, seed: Tensor | None, *tensors: Tensor | None) -> Any:
        weights, biases, lora_A, lora_B = plan.parts(tensors)
        with exact(x.device):
            flat = rows_of(x)
            s = None
            if lora_A:
                s = steps.shrink(plan.backend, flat, stack_rows(lora_A), plan.scaling, plan.p, seed)
            outputs = project(plan, flat, x.shape[:-1], s, weights, biases, lora_B)
        # x is kept for dA and s for dB: frozen adapters need neither.
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B))
        ctx.plan, ctx.x_shape = plan, x.shape
        ctx.save_for_backward(*((x, s) if trainable else (None, None)), seed, *weights, *lora_A, *lora_B)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: Projections = ctx.plan
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
            dtype = next(dy.dtype for dy in grads if dy is not None)
            each = [plan.weight(weights, i) for i in range(len(plan.splits))]
            each = [dequantize_4bit(w, plan.cast or dtype) if isinstance(w, Weight4bit) else w for w in each]
            dx, dA, dB = native.linear_backward(
                grads, x, seed, each, plan.members, lora_A, lora_B, plan.scaling, plan.p, ctx.x_shape
            )
        else:
            with exact(next(dy for dy in grads if dy is not None).device):
                dx, dA, dB = _backward(plan, grads, x, s, seed, weights, lora_A, lora_B, need_dx, ctx.x_shape)
        d_bias = bias_grads(plan, grads, need_bias)
        dA = [t if need else None for t, need in zip(dA, need_A)]
        dB = [t if need else None for t, need in zip(dB, need_B)]
        return (None, dx if need_dx else None, None, *[None] * n, *d_bias, *dA, *dB)


def _backward(
    plan: Projections,
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
    dx, ds, dB = collect(plan, grads, s, weights, lora_A, lora_B, need_dx)
    dA: list[Tensor | None] = [None] * len(lora_A)
    flat = dx if x is None else rows_of(x)  # with x None, dA is formed of dx and not used
    if ds is not None and flat is not None:
        d_rows = steps.shrink_backward(plan.backend, ds, flat, stack_rows(lora_A), plan.scaling, plan.p, seed, dx)
        if x is not None:
            dA = members_of(plan, d_rows, lora_A, grads)
    return None if dx is None else dx.view(x_shape), dA, dB


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
