"""A producer and the projections of what it produces, as one operation that keeps the producer's input only.

    n = f(z)        y_g = n W_g^T + bias_g + c_g dropout_g(n) A_g^T B_g^T

f is a norm (`norm_linear`) or an activation (`glu_linear`), z what it is computed from. Apart, n is kept for
dA_g = c_g ds_g^T dropout_g(n), a copy of what z already tells. Joined, the backward makes n again tile by tile, in the
pass that f's own gradient takes anyway, and the rims of dn are added there and never stored. s = c dropout(n) A^T comes
out of the pass that writes n.

Kept for the backward: z, a number or two a row (`extras`), s and the mask's seed. Weights may be of 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import gemm, native, philox, steps
from .backend import exact
from .dora_joined import dora_joined
from .lora_linear import check, rows_of, shaped
from .nf4 import Weight4bit, dequantize_4bit
from .nf4_linear import nf4_linear
from .projections import Projections, bias_grads, collect, flat_inputs, members_of, planned, project, stack_rows


class Producer(Protocol):
    """One kind of f. Its inputs are a flat tuple, matrices (M, K) first, then parameters; any may be None."""

    def forward(
        self,
        backend: str,
        inputs: Sequence[Any],
        A: Tensor | None,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """n (M, K), s (M, G*r) where there are adapters A (G*r, K), and the extras to keep."""

    def again(self, backend: str, inputs: Sequence[Any], extras: Sequence[Tensor]) -> Tensor:
        """n, the same bits as in the forward."""

    def backward(
        self, backend: str, dn: Tensor, inputs: Sequence[Any], extras: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs."""

    def backward_rim(
        self,
        backend: str,
        dn: Tensor,
        ds: Tensor,
        inputs: Sequence[Any],
        extras: Sequence[Tensor],
        A: Tensor,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """The gradients of the inputs for dn plus the rims' part of it, and dA (G*r, K)."""

    def native(self, inputs: Sequence[Any]) -> Tensor:
        """n in ordinary differentiable operators, for inputs of any shape."""


def joined(
    producer: Producer,
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | Weight4bit],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    *,
    stacked_weight: Tensor | None = None,
    stacked_bias: Tensor | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    told: Sequence[bool] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """n (..., K) and the outputs (..., N_g) of its projections; lists as in `lora_linear_group`.

    magnitudes: the adapters are DoRA, one on every projection; each base weight is then a product of its own. told:
    as in `dora_linear_group`.
    Base weights may be frozen or trained. All must be of one dtype, adapters and weights of 4 bits excepted; autocast
    is not looked at. Raises ValueError for DoRA over 4 bits.
    """
    quantised = any(isinstance(w, Weight4bit) for w in weights)
    if magnitudes is not None:
        if quantised:
            raise ValueError("magnitudes: DoRA over weights of 4 bits is not joined with what produces its input")
        A, B = _adapted(lora_A, lora_B)
        return dora_joined(producer, inputs, weights, biases, A, B, magnitudes, scaling, dropout_p, told)  # type: ignore[arg-type]
    for i, (w, a, b) in enumerate(zip(weights, lora_A, lora_B)):
        if a is not None and b is not None:
            check(inputs[0], w, a, b, dropout_p, f"projection {i}")  # type: ignore[arg-type]
    parameters = [w.packed if isinstance(w, Weight4bit) else w for w in weights]
    if native.transformed(*inputs, *parameters, *biases, *lora_A, *lora_B):
        n = producer.native(inputs)
        dense = [_dense(w, n.dtype) for w in weights]
        return n, native.linear(n, dense, biases, lora_A, lora_B, scaling, dropout_p)
    if quantised and torch.compiler.is_compiling():
        n = producer.native(inputs)
        lists = zip(weights, biases, lora_A, lora_B, scaling)
        return n, tuple(_one(n, *of_one, dropout_p) for of_one in lists)
    device = weights[0].device
    stacked = stacked_weight is not None
    plan = planned(device, weights, lora_A, scaling, dropout_p, stacked=stacked, stacked_bias=stacked_bias is not None)
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) and plan.members else None
    n, *outputs = _Joined.apply(
        producer,
        plan,
        len(inputs),
        seed,
        *inputs,
        *([stacked_weight] if stacked else parameters),
        *([stacked_bias] if plan.stacked_bias else biases),
        *(a for a in lora_A if a is not None),
        *(b for b in lora_B if b is not None),
    )
    return n, tuple(outputs)


def _dense(weight: Tensor | Weight4bit, dtype: torch.dtype) -> Tensor:
    return dequantize_4bit(weight, dtype) if isinstance(weight, Weight4bit) else weight


def _one(
    n: Tensor, w: Tensor | Weight4bit, bias: Tensor | None, a: Tensor | None, b: Tensor | None, c: float, p: float
) -> Tensor:
    """One projection, for torch.compile, which joins by itself."""
    if isinstance(w, Weight4bit):
        return nf4_linear(n, w, bias, a, b, c, p)
    return native.linear(n, (w,), (bias,), (a,), (b,), (c,), p)[0]


def _adapted(
    lora_A: Sequence[Tensor | None], lora_B: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    A, B = [a for a in lora_A if a is not None], [b for b in lora_B if b is not None]
    if len(A) != len(lora_A) or len(B) != len(lora_B):
        raise ValueError("magnitudes: every projection needs lora_A and lora_B, for one of them they are None")
    return A, B


class _Joined(torch.autograd.Function):
    """(n, y_1, …) from (producer, plan, how many inputs, seed, inputs, weights, biases, A's, B's)."""

    @staticmethod
    def forward(
        ctx: Any, producer: Producer, plan: Projections, count: int, seed: Tensor | None, *tensors: Tensor | None
    ) -> Any:
        inputs, rest = tensors[:count], tensors[count:]
        weights, biases, lora_A, lora_B = plan.parts(rest)
        lead = inputs[0].shape[:-1]  # type: ignore[union-attr]
        flat = flat_inputs(inputs)
        with exact(weights[0].device):
            A = stack_rows(lora_A) if lora_A else None
            n, s, extras = producer.forward(plan.backend, flat, A, plan.scaling, plan.p, seed)
            outputs = project(plan, n, lead, s, weights, biases, lora_B)
        if not any(t.requires_grad for t in (*lora_A, *lora_B)):
            s = None
        ctx.producer, ctx.plan, ctx.count, ctx.extras = producer, plan, count, len(extras)
        ctx.save_for_backward(s, seed, *inputs, *extras, *rest)
        ctx.set_materialize_grads(False)
        return (n if len(lead) == 1 else shaped(n, lead), *outputs)

    @staticmethod
    def backward(ctx: Any, dn: Tensor | None, *grads: Tensor | None) -> Any:
        if dn is None and all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        plan, count = ctx.plan, ctx.count
        s, seed, *saved = ctx.saved_tensors
        inputs, extras, rest = saved[:count], saved[count : count + ctx.extras], saved[count + ctx.extras :]
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return (None,) * 4 + _second_order(ctx.producer, plan, count, seed, inputs, rest, needs, (dn, *grads))
        with exact(rest[0].device):
            d_inputs, d_weights, dA, dB = _backward(
                ctx.producer, plan, dn, grads, s, seed, inputs, extras, plan.parts(rest), needs
            )
        d_bias = bias_grads(plan, grads, plan.parts(needs[count:])[1])
        found = [*d_inputs, *d_weights, *d_bias, *dA, *dB]
        return (None,) * 4 + tuple(g if need else None for g, need in zip(found, needs))


def _backward(
    producer: Producer,
    plan: Projections,
    dn: Tensor | None,
    grads: Sequence[Tensor | None],
    s: Tensor | None,
    seed: Tensor | None,
    inputs: Sequence[Tensor | None],
    extras: Sequence[Tensor],
    parts: tuple[list[Any], list[Any], list[Any], list[Any]],
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    weights, _, lora_A, lora_B = parts
    count = len(inputs)
    need_inputs, need_weights = needs[:count], plan.parts(needs[count:])[0]
    flat = flat_inputs(inputs)
    total, ds, dB = collect(plan, grads, s, weights, lora_A, lora_B, any(need_inputs))
    if dn is not None and any(need_inputs):
        outside = rows_of(dn)
        total = outside if total is None else total.add_(outside)
    dA: list[Tensor | None] = [None] * len(lora_A)
    d_weights: list[Tensor | None] = [None] * len(weights)
    train_A = ds is not None and s is not None
    # n whole: for a trained base weight, or where only dA is wanted of it.
    n = producer.again(plan.backend, flat, extras) if any(need_weights) or (train_A and total is None) else None
    if n is not None and any(need_weights):
        d_weights = _weight_grads(plan, grads, n, need_weights)
    if ds is not None and (train_A or total is not None):
        A = stack_rows(lora_A)
        if total is None:
            assert n is not None
            d_rows = steps.shrink_backward(plan.backend, ds, n, A, plan.scaling, plan.p, seed, None)
            d_inputs: Sequence[Tensor | None] = [None] * count
        else:
            d_inputs, d_rows = producer.backward_rim(
                plan.backend, total, ds, flat, extras, A, plan.scaling, plan.p, seed, need_inputs
            )
        dA = members_of(plan, d_rows, lora_A, grads)
    elif total is not None:
        d_inputs = producer.backward(plan.backend, total, flat, extras, need_inputs)
    else:
        d_inputs = [None] * count
    shaped_like = [d if d is None or x is None else d.view(x.shape) for d, x in zip(d_inputs, inputs)]
    return shaped_like, d_weights, dA, dB


def _weight_grads(
    plan: Projections, grads: Sequence[Tensor | None], n: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    each = [None if dy is None else gemm.mm(plan.backend, rows_of(dy).t(), n) for dy in grads]
    if not plan.stacked:
        return [d if need else None for d, need in zip(each, needed)]
    return [torch.cat([n.new_zeros(k, n.shape[1]) if d is None else d for d, k in zip(each, plan.splits)])]


def _second_order(
    producer: Producer,
    plan: Projections,
    count: int,
    seed: Tensor | None,
    inputs: Sequence[Tensor | None],
    rest: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph: the forward again in ordinary operators, differentiated."""
    weights, biases, lora_A, lora_B = plan.parts(rest)
    splits = len(plan.splits)
    each_A: list[Tensor | None] = [None] * splits
    each_B: list[Tensor | None] = [None] * splits
    scaling = [0.0] * splits
    for g, i in enumerate(plan.members):
        each_A[i], each_B[i], scaling[i] = lora_A[g], lora_B[g], plan.scaling[g]
    dtype = next(g.dtype for g in grads if g is not None)
    each_w = [_dense(plan.weight(weights, i), dtype) for i in range(splits)]
    each_b = list(biases[0].split(plan.splits)) if plan.stacked_bias else biases
    n = producer.native(inputs)
    outputs = (n, *native.linear(n, each_w, each_b, each_A, each_B, scaling, plan.p, seed))
    used = [(y, g) for y, g in zip(outputs, grads) if g is not None and y.requires_grad]
    tensors = (*inputs, *rest)
    wanted = [t for t, need in zip(tensors, needs) if need and t is not None]
    found = iter(
        torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if need else None for need in needs)
