"""DoRA on linear layers, one or several that read one input.

DoRA (arXiv:2402.09353) gives the rows of W + c B A a trained length m. With the norms n = |W + c B A| by row, taken as
constants in the gradient as the paper proposes (section 4.3), and the gain g = m / n,

    y = x W^T + bias + (g - 1) (z W^T) + g c z A^T B^T,        z = dropout(x)

x (..., K), W (N, K), bias (N), A (r, K), B (N, r), m, n and g (N). This is PEFT's formula to the letter: with dropout
the base product stands twice, once of x and once of z. W is frozen. With S = c z A^T and t = z W^T + S B^T,

    no dropout    v = t + bias,  y = v + (g - 1) (v - bias)      one base product; the rest is one pass over y
    dropout       y = x W^T + bias + S B^T + (g - 1) t           two

where g - 1 = (m - n) / n is formed in fp32. The backward, with dt = g dy:

    dS = dt B        dA = c dS^T z        dm = sum over rows of dy t / n
    dB = dt^T S      dx = dt W + c dS A                             without dropout
                     dx = dy W + mask/(1-p) (((g - 1) dy) W + c dS A)    with it

dS, dB, dm and dt come from one pass over dy. Without dropout t need not be kept: t = (y - bias) / g, and y is kept by
whatever reads it, most often (a y changed in place afterwards is noticed, and t is computed again). So a layer keeps x,
S and y. With dropout it keeps x, S and t. Masks are formed again.

On the CPU, for p up to `GATHER_P`, the second product is not made. Little is dropped, so it is made of the first one:

    z W^T = (x W^T - dropped(x) W^T) / (1 - p)        dx = (h dy) W, less (h dy - dy) W where the mask drops

with h = 1 + (g - 1)/(1 - p); the few columns of dropped(x) are gathered (`dora_products`).

n is formed in fp32 from the very A and B that the forward uses, rounded as they are, and from W as it is stored
(`weight_norm`); it is rounded to m's dtype, so that m at its start gives g = 1 to the bit. m = 0 makes t unknowable
from y: on the CPU such outputs are computed again, elsewhere g is kept from being 0 by 2^-100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, philox, steps
from .backend import autocast_enabled, exact, route
from .dora_projections import Plan, check_all, collect, formula, hand_out, project, promised, recall, split_rows, watch
from .lora_linear import rows_of
from .nf4 import Weight4bit, dequantize_4bit
from .projections import stack_rows
from .promise import Promise


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    *,
    norm: Tensor | None = None,
) -> Tensor:
    """y (..., N) of one layer, in the dtype of the base product.

    x: (..., K). weight: (N, K), any strides; frozen, or differentiated natively; or of 4 bits, decoded by panels for
    the products, as in `nf4_linear`, and for the norms. lora_A: (r, K), lora_B: (N, r), r from 1 to 512, of one
    floating dtype that may differ from x's. magnitude: N elements of any shape. dropout_p: applied as
    given, so pass 0 in evaluation. Under autocast everything but the magnitude is cast as F.linear casts. norm: what
    `weight_norm` would return, where it is known.

    Raises ValueError on shapes that do not fit, on r > 512 and on dropout_p outside [0, 1].
    """
    lists = (weight,), (bias,), (lora_A,), (lora_B,), (magnitude,), (scaling,)
    return dora_linear_group(x, *lists, dropout_p, norms=None if norm is None else (norm,))[0]


def dora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    *,
    norms: Sequence[Tensor] | None = None,
    told: Sequence[bool] = (),
) -> tuple[Tensor, ...]:
    """The outputs of several projections of one input, each with a DoRA adapter of its own.

    Lists have one entry a projection, shapes as in `dora_linear`; ranks may differ. Each draws its own dropout mask.
    norms: where they are known. told: without dropout, outputs that are not kept for the gradient of m, since `rope`
    will rotate them and tell them in the backward (`promise`).

    Raises ValueError on lists or shapes that do not fit.
    """
    lists = (weights, biases, lora_A, lora_B, magnitudes, scaling)
    if not weights or len({len(part) for part in lists}) != 1:
        raise ValueError(f"every list needs one entry a projection, got {', '.join(str(len(part)) for part in lists)}")
    check_all(x, weights, lora_A, lora_B, magnitudes, dropout_p)
    device, dtype, cast = x.device, x.dtype, None
    packed = tuple(w if isinstance(w, Weight4bit) else None for w in weights)
    quantised = any(w is not None for w in packed)
    parameters = [w.packed if isinstance(w, Weight4bit) else w for w in weights]
    if (
        native.transformed(x, *parameters, *biases, *lora_A, *lora_B, *magnitudes)
        or (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        or (quantised and torch.compiler.is_compiling())
    ):
        if quantised and autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device.type)
        weights = [dequantize_4bit(w).to(dtype) if isinstance(w, Weight4bit) else w for w in weights]
        return formula(x, None, weights, biases, lora_A, lora_B, magnitudes, scaling, dropout_p)
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, lora_A, lora_B = x.to(cast), [a.to(cast) for a in lora_A], [b.to(cast) for b in lora_B]
    known = (None,) * len(weights) if norms is None else tuple(norms)
    numbers = tuple(float(c) for c in scaling)
    plan = Plan(len(weights), numbers, float(dropout_p), cast, route(device), known, packed if quantised else ())
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) else None
    if not torch.is_grad_enabled():
        with exact(device):
            return plan.back(_forward(plan, x, seed, (weights, biases, lora_A, lora_B, magnitudes))[1], dtype)
    # What `back` casts is not what is kept.
    promises = promised(() if quantised and cast is not None else told, magnitudes, plan.p)
    outputs = _DoraLinear.apply(plan, promises, x, seed, *parameters, *biases, *lora_A, *lora_B, *magnitudes)
    hand_out(outputs, promises)
    return plan.back(outputs, dtype)


class _DoraLinear(torch.autograd.Function):
    """Outputs of all projections from (plan, promises, x, seed, weights, biases, A's, B's, magnitudes)."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        promises: list[Promise | None],
        x: Tensor,
        seed: Tensor | None,
        *tensors: Tensor | None,
    ) -> Any:
        weights, biases, lora_A, lora_B, magnitudes = plan.lists(tensors)
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B, *magnitudes))
        with exact(x.device):
            s, outputs, kept, gains = _forward(plan, x, seed, (weights, biases, lora_A, lora_B, magnitudes))
        # x is kept for dA, s for dB and y for dm: frozen adapters need none.
        wanted = [t if m.requires_grad and p is None else None for t, m, p in zip(kept, magnitudes, promises)]
        ctx.plan, ctx.promises, ctx.x_shape = plan, promises, x.shape
        ctx.watched = watch(outputs, magnitudes, seed)
        ctx.save_for_backward(*((x, s) if trainable else (None, None)), seed, *tensors, *wanted, *gains)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        x, s, seed, *tensors = ctx.saved_tensors
        if all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        weights, biases, lora_A, lora_B, magnitudes, kept, gains = plan.lists(tensors)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            inputs = [x, *weights, *biases, *lora_A, *lora_B, *magnitudes]
            return _graph(plan, inputs, ctx.x_shape, seed, grads, [needs[2], *needs[4:]])
        with exact(next(dy for dy in grads if dy is not None).device):
            again = recall(kept, ctx.promises, ctx.watched)
            lists = [weights, biases, lora_A, lora_B, magnitudes, kept, gains]
            dx, dA, dB, dm = _backward(plan, grads, x, s, seed, lists, again, needs[2], ctx.x_shape)
        d_bias = [
            dy.flatten(0, -2).sum(0) if need and dy is not None else None
            for dy, need in zip(grads, needs[4 + plan.members :])
        ]
        found = [None] * plan.members + d_bias + dA + dB
        found += [None if d is None else d.to(m.dtype).view(m.shape) for d, m in zip(dm, magnitudes)]
        return (None, None, dx, None, *(d if need else None for d, need in zip(found, needs[4:])))


def _forward(
    plan: Plan, x: Tensor, seed: Tensor | None, lists: Sequence[Sequence[Any]]
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """S (M, G*r), then as `project`."""
    flat, A = rows_of(x), stack_rows(list(lists[2]))
    s = steps.shrink(plan.backend, flat, A, plan.scaling, plan.p, seed)
    return s, *project(plan, flat, x.shape[:-1], s, seed, *lists)


def _backward(
    plan: Plan,
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    lists: list[list[Any]],
    again: list[bool],
    need_dx: bool,
    shape: torch.Size,
) -> tuple[Tensor | None, list[Any], list[Any], list[Any]]:
    """dx, and of each projection dA, dB and dm."""
    weights, biases, lora_A, lora_B, _, kept, gains = lists
    made = None if x is None else lambda: rows_of(x)
    dx, ds, dB, dm = collect(plan, grads, made, s, seed, weights, biases, lora_A, lora_B, kept, gains, again, need_dx)
    dA: list[Any] = [None] * plan.members
    known = dx if x is None else rows_of(x)  # with x None, dA is formed of dx and not used
    if known is not None:
        d_rows = steps.shrink_backward(plan.backend, ds, known, stack_rows(lora_A), plan.scaling, plan.p, seed, dx)
        if x is not None:
            dA = split_rows(d_rows, lora_A, grads)
    return None if dx is None else dx.view(shape), dA, dB, dm


def _graph(
    plan: Plan,
    inputs: list[Any],
    shape: torch.Size,
    seed: Tensor | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> Any:
    """The gradients as a graph, for a second derivative."""
    x, *tensors = inputs
    with torch.enable_grad():
        if x is None:  # nothing is trained, and dx, which is linear in dy, does not hang on x
            x = inputs[0] = next(dy for dy in grads if dy is not None).new_zeros(shape, requires_grad=True)
        weights, biases, lora_A, lora_B, magnitudes = plan.lists(tensors)
        if plan.packed:
            weights = [t if w is None else dequantize_4bit(w).to(x.dtype) for w, t in zip(plan.packed, weights)]
        if plan.cast is not None:
            weights, biases = (
                [w.to(plan.cast) for w in weights],
                [None if b is None else b.to(plan.cast) for b in biases],
            )
        with exact(weights[0].device):
            outputs = formula(x, seed, weights, biases, lora_A, lora_B, magnitudes, plan.scaling, plan.p)
            used = [(y, dy) for y, dy in zip(outputs, grads) if dy is not None]
            wanted = [t for t, need in zip(inputs, needs) if need]
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in used], wanted, [dy for _, dy in used], create_graph=True, allow_unused=True
                )
            )
    each = [next(found) if need else None for need in needs]
    return (None, None, each[0], None, *each[1:])
