"""A producer and the DoRA projections of what it produces: what `joined` does for LoRA.

    n = f(z)        y_g = n W_g^T + bias_g + (g_g - 1) (u W_g^T) + g_g c_g u A_g^T B_g^T,        u = dropout_g(n)

The formula of `dora_linear`, member by member, on an n that is made again in the backward. Kept for it: z, the
producer's extras, s, two numbers for each column of an output, and of each projection y, from which dm is made and
which whatever reads it keeps most often (with dropout: t).

dm_g = sum over rows of dy t / |W_g + c_g B_g A_g| can be had without y only at the price of a product dy^T n as wide as
the base product, so nothing narrower than y would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native, philox, steps
from .backend import exact, route
from .dora_projections import Plan, check_all, collect, formula, hand_out, project, promised, recall, split_rows, watch
from .lora_linear import rows_of, shaped
from .projections import flat_inputs, stack_rows
from .promise import Promise

if TYPE_CHECKING:
    from .joined import Producer


def dora_joined(
    producer: Producer,
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    told: Sequence[bool] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """n (..., K) and the outputs (..., N_g) of its projections; lists as in `dora_linear_group`.

    Base weights are frozen, or differentiated natively. All must be of one dtype, adapters and magnitudes excepted;
    autocast is not looked at. told: as in `dora_linear_group`.

    Raises ValueError on shapes that do not fit.
    """
    check_all(inputs[0], weights, lora_A, lora_B, magnitudes, dropout_p)  # type: ignore[arg-type]
    tensors = [*weights, *biases, *lora_A, *lora_B, *magnitudes]
    if native.transformed(*inputs, *tensors) or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
        n = producer.native(inputs)
        return n, formula(n, None, weights, biases, lora_A, lora_B, magnitudes, scaling, dropout_p)
    device, members = weights[0].device, len(weights)
    plan = Plan(members, tuple(map(float, scaling)), float(dropout_p), None, route(device), (None,) * members)
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) else None
    promises = promised(told, magnitudes, plan.p)
    n, *outputs = _DoraJoined.apply(producer, plan, promises, len(inputs), seed, *inputs, *tensors)
    hand_out(outputs, promises)
    return n, tuple(outputs)


class _DoraJoined(torch.autograd.Function):
    """(n, y_1, …) from (producer, plan, promises, how many inputs, seed, inputs, weights, biases, A's, B's, m's)."""

    @staticmethod
    def forward(
        ctx: Any,
        producer: Producer,
        plan: Plan,
        promises: list[Promise | None],
        count: int,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:
        inputs, rest = tensors[:count], tensors[count:]
        weights, biases, lora_A, lora_B, magnitudes = plan.lists(rest)
        lead, flat = inputs[0].shape[:-1], flat_inputs(inputs)  # type: ignore[union-attr]
        with exact(weights[0].device):
            n, s, extras = producer.forward(plan.backend, flat, stack_rows(lora_A), plan.scaling, plan.p, seed)
            assert s is not None  # every projection has an adapter
            outputs, kept, gains = project(plan, n, lead, s, seed, weights, biases, lora_A, lora_B, magnitudes)
        # s is kept for dB and y for dm: frozen adapters need neither.
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B, *magnitudes))
        wanted = [t if m.requires_grad and p is None else None for t, m, p in zip(kept, magnitudes, promises)]
        ctx.watched = watch(outputs, magnitudes, seed)
        ctx.producer, ctx.plan, ctx.promises, ctx.count, ctx.extras = producer, plan, promises, count, len(extras)
        ctx.save_for_backward(s if trainable else None, seed, *inputs, *extras, *rest, *wanted, *gains)
        ctx.set_materialize_grads(False)
        return (n if len(lead) == 1 else shaped(n, lead), *outputs)

    @staticmethod
    def backward(ctx: Any, dn: Tensor | None, *grads: Tensor | None) -> Any:
        if dn is None and all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        plan: Plan = ctx.plan
        s, seed, *saved = ctx.saved_tensors
        inputs, saved = saved[: ctx.count], saved[ctx.count :]
        extras, lists = saved[: ctx.extras], plan.lists(saved[ctx.extras :])
        needs = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return (None,) * 5 + _second_order(ctx.producer, plan, seed, inputs, lists[:5], needs, (dn, *grads))
        again = recall(lists[5], ctx.promises, ctx.watched)
        with exact(lists[0][0].device):
            d_inputs, dA, dB, dm = _backward(
                ctx.producer, plan, dn, grads, s, seed, inputs, extras, lists, again, needs[: ctx.count]
            )
        _, need_bias, *_ = plan.lists(needs[ctx.count :])
        d_bias = [dy.flatten(0, -2).sum(0) if need and dy is not None else None for dy, need in zip(grads, need_bias)]
        d_magnitude = [None if d is None else d.to(m.dtype).view(m.shape) for d, m in zip(dm, lists[4])]
        found = [*d_inputs, *[None] * plan.members, *d_bias, *dA, *dB, *d_magnitude]
        return (None,) * 5 + tuple(d if need else None for d, need in zip(found, needs))


def _backward(
    producer: Producer,
    plan: Plan,
    dn: Tensor | None,
    grads: Sequence[Tensor | None],
    s: Tensor | None,
    seed: Tensor | None,
    inputs: Sequence[Tensor | None],
    extras: Sequence[Tensor],
    lists: list[list[Any]],
    again: list[bool],
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], list[Any], list[Any], list[Any]]:
    """The gradients of the producer's inputs, and of each projection dA, dB and dm."""
    weights, biases, lora_A, lora_B, _, kept, gains = lists
    flat = flat_inputs(inputs)

    def made() -> Tensor:
        return producer.again(plan.backend, flat, extras)

    total: Tensor | None = None
    ds: Tensor | None = None
    dA: list[Any] = [None] * plan.members
    dB, dm = list(dA), list(dA)
    if any(dy is not None for dy in grads):
        product = None if s is None else made
        total, ds, dB, dm = collect(
            plan, grads, product, s, seed, weights, biases, lora_A, lora_B, kept, gains, again, any(needs)
        )
    if dn is not None and any(needs):
        outside = rows_of(dn)
        total = outside if total is None else total.add_(outside)
    d_inputs: Sequence[Tensor | None] = [None] * len(inputs)
    if ds is not None and (s is not None or total is not None):
        A = stack_rows(lora_A)
        if total is None:
            d_rows = steps.shrink_backward(plan.backend, ds, made(), A, plan.scaling, plan.p, seed, None)
        else:
            d_inputs, d_rows = producer.backward_rim(
                plan.backend, total, ds, flat, extras, A, plan.scaling, plan.p, seed, needs
            )
        dA = split_rows(d_rows, lora_A, grads)
    elif total is not None:
        d_inputs = producer.backward(plan.backend, total, flat, extras, needs)
    shaped_like = [d if d is None or x is None else d.view(x.shape) for d, x in zip(d_inputs, inputs)]
    return shaped_like, dA, dB, dm


def _second_order(
    producer: Producer,
    plan: Plan,
    seed: Tensor | None,
    inputs: Sequence[Tensor | None],
    lists: list[list[Any]],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph: the forward again in ordinary operators, differentiated."""
    n = producer.native(inputs)
    weights, biases, lora_A, lora_B, magnitudes = lists
    outputs = (n, *formula(n, seed, weights, biases, lora_A, lora_B, magnitudes, plan.scaling, plan.p))
    used = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
    tensors = [*inputs, *(t for part in lists for t in part)]
    wanted = [t for t, need in zip(tensors, needs) if need and t is not None]
    found = iter(
        torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if need else None for need in needs)
