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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dora_products as dora_products  # declares the operators
from . import native, philox, steps
from .backend import OPS, autocast_enabled, cpu_extension, exact, route
from .lora_linear import check, rows_of, shaped
from .projections import stack_rows
from .weight_norm import weight_norm

# The largest p at which the second base product is made of the first on the CPU.
GATHER_P = 0.2
_SMALLEST = 2.0**-100


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

    x: (..., K). weight: (N, K), any strides; frozen, or differentiated natively. lora_A: (r, K), lora_B: (N, r), r from
    1 to 512, of one floating dtype that may differ from x's. magnitude: N elements of any shape. dropout_p: applied as
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
) -> tuple[Tensor, ...]:
    """The outputs of several projections of one input, each with a DoRA adapter of its own.

    Lists have one entry a projection, shapes as in `dora_linear`; ranks may differ. Each draws its own dropout mask.
    norms: where they are known.

    Raises ValueError on lists or shapes that do not fit.
    """
    lists = (weights, biases, lora_A, lora_B, magnitudes, scaling)
    if not weights or len({len(part) for part in lists}) != 1:
        raise ValueError(f"every list needs one entry a projection, got {', '.join(str(len(part)) for part in lists)}")
    for w, a, b, m in zip(weights, lora_A, lora_B, magnitudes):
        check(x, w, a, b, dropout_p, "dora_linear")
        if m.numel() != w.shape[0]:
            raise ValueError(f"dora_linear: magnitude must have {w.shape[0]} elements, got {tuple(m.shape)}")
    device, cast = x.device, None
    if native.transformed(x, *weights, *biases, *lora_A, *lora_B, *magnitudes) or (
        torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    ):
        return _native(x, None, weights, biases, lora_A, lora_B, magnitudes, scaling, dropout_p)
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, lora_A, lora_B = x.to(cast), [a.to(cast) for a in lora_A], [b.to(cast) for b in lora_B]
    known = (None,) * len(weights) if norms is None else tuple(norms)
    plan = _Plan(len(weights), tuple(float(c) for c in scaling), float(dropout_p), cast, route(device), known)
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) else None
    if not torch.is_grad_enabled():
        with exact(device):
            return _forward(plan, x, seed, weights, biases, lora_A, lora_B, magnitudes)[1]
    return _DoraLinear.apply(plan, x, seed, *weights, *biases, *lora_A, *lora_B, *magnitudes)


class _Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    members: int
    scaling: tuple[float, ...]
    p: float
    cast: torch.dtype | None  # autocast's dtype, to which the base is cast in the forward and again in the backward
    backend: str
    norms: tuple[Tensor | None, ...]  # those that are known

    def lists(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """One flat list, cut into the lists of its kinds."""
        return [list(tensors[i : i + self.members]) for i in range(0, len(tensors), self.members)]

    def gathers(self, x: Tensor) -> bool:
        """With dropout: whether the second base product is made of the first."""
        return (
            self.backend == "auto"
            and x.device.type == "cpu"
            and x.dtype is not torch.float64
            and self.p <= GATHER_P
            and cpu_extension() is not None
        )


class _DoraLinear(torch.autograd.Function):
    """Outputs of all projections from (plan, x, seed, weights, biases, A's, B's, magnitudes)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, seed: Tensor | None, *tensors: Tensor | None) -> Any:
        weights, biases, lora_A, lora_B, magnitudes = plan.lists(tensors)
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B, *magnitudes))
        with exact(x.device):
            s, outputs, kept, gains = _forward(plan, x, seed, weights, biases, lora_A, lora_B, magnitudes)
        # x is kept for dA, s for dB and y for dm: frozen adapters need none.
        wanted = [t if m.requires_grad else None for t, m in zip(kept, magnitudes)]
        ctx.plan, ctx.x_shape = plan, x.shape
        ctx.watched = None
        if seed is None and any(ctx.needs_input_grad[-plan.members :]) and not torch.compiler.is_compiling():
            ctx.watched = [_Watch(y) for y in outputs]
        ctx.save_for_backward(*((x, s) if trainable else (None, None)), seed, *tensors, *wanted, *gains)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        x, s, seed, *tensors = ctx.saved_tensors
        if all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        weights, biases, lora_A, lora_B, magnitudes, kept, gains = plan.lists(tensors)
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            inputs = [x, *weights, *biases, *lora_A, *lora_B, *magnitudes]
            return _graph(plan, inputs, ctx.x_shape, seed, grads, [needs[1], *needs[3:]])
        with exact(next(dy for dy in grads if dy is not None).device):
            changed = [watch.changed for watch in ctx.watched] if ctx.watched else [False] * plan.members
            dx, dA, dB, dm = _backward(
                plan, grads, x, s, seed, weights, biases, lora_A, lora_B, kept, gains, changed, needs[1], ctx.x_shape
            )
        d_bias = [
            dy.flatten(0, -2).sum(0) if need and dy is not None else None
            for dy, need in zip(grads, needs[3 + plan.members :])
        ]
        found = [None] * plan.members + d_bias + dA + dB
        found += [None if d is None else d.to(m.dtype).view(m.shape) for d, m in zip(dm, magnitudes)]
        return (None, dx, None, *(d if need else None for d, need in zip(found, needs[3:])))


class _Watch:
    """Tells whether an output was written to after it was made: a tensor of no elements that shares its version."""

    def __init__(self, y: Tensor) -> None:
        self._counter = y.detach()
        self._counter.data = y.new_empty(0)
        self._version = self._counter._version

    @property
    def changed(self) -> bool:
        return self._counter._version != self._version


def gain_of(
    weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """g - 1 and n, (N,) in fp32 (float64 if an operand is).

    n is as exact as m is, so that m at its start gives g = 1 to the bit. A row of zeros divides by no 0.
    """
    norm = weight_norm(weight, A, B, scaling) if norm is None else norm
    norm = norm.to(magnitude.dtype).to(norm.dtype).clamp_min(torch.finfo(norm.dtype).tiny)
    return (magnitude.detach().flatten().to(norm.dtype) - norm).div_(norm).clamp_min(_SMALLEST - 1), norm


def _forward(
    plan: _Plan,
    x: Tensor,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """S (M, G*r), the outputs, and of each projection what dm is made of and (2, N): g - 1 and n.

    The outputs are tensors that autograd takes neither for views nor for what is kept.
    """
    flat, lead, ops = rows_of(x), x.shape[:-1], OPS[plan.backend]
    s_all = steps.shrink(plan.backend, flat, stack_rows(list(lora_A)), plan.scaling, plan.p, seed)
    r = s_all.shape[1] // plan.members
    outputs, kept, gains = [], [], []
    for g, (w, b, A, B, m) in enumerate(zip(weights, biases, lora_A, lora_B, magnitudes)):
        gain, norm = gain_of(w, A, B, m, plan.scaling[g], plan.norms[g])
        if plan.cast is not None:
            w, b = w.to(plan.cast), None if b is None else b.to(plan.cast)
        s = s_all[:, g * r : g * r + B.shape[1]]
        if seed is None:
            y = t = F.linear(flat, w, b)
            ops.dora_expand_(y, s, B, gain, b)
        elif plan.gathers(flat):
            y = F.linear(flat, w)
            t = ops.dora_drop_(y, flat, w, s, B, gain, b, plan.p, seed, g)
        else:
            y, t = F.linear(flat, w), F.linear(ops.dropout(flat, plan.p, seed, g), w)
            ops.dora_mix_(y, t, s, B, gain, b)
        outputs.append(shaped(y, lead))
        kept.append(t)
        gains.append(torch.stack((gain, norm)))
    return s_all, tuple(outputs), kept, gains


def _backward(
    plan: _Plan,
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    kept: list[Tensor | None],
    gains: list[Tensor],
    changed: list[bool],
    need_dx: bool,
    shape: torch.Size,
) -> tuple[Tensor | None, list[Any], list[Any], list[Any]]:
    """dx, and of each projection dA, dB and dm."""
    ops, r = OPS[plan.backend], max(a.shape[0] for a in lora_A)
    flat = None if x is None else rows_of(x)
    dx: Tensor | None = None
    parts = []
    dA: list[Any] = [None] * plan.members
    dB, dm = list(dA), list(dA)
    for i, (grad, w, b, B, t) in enumerate(zip(grads, weights, biases, lora_B, kept)):
        if grad is None:
            parts.append(lora_A[i].new_zeros(shape[:-1].numel(), r))
            continue
        dy, (gain, norm) = rows_of(grad), gains[i]
        if plan.cast is not None:
            w, b = w.to(plan.cast), None if b is None else b.to(plan.cast)
        s_i = dy.new_zeros(dy.shape[0], B.shape[1], dtype=B.dtype) if s is None else s[:, i * r : i * r + B.shape[1]]
        g, again = 1 + gain, t is not None and (changed[i] or _hides(seed, gain))
        if again and flat is not None:
            t = F.linear(flat, w)
            ops.lora_expand_(t, s_i, B, [t.shape[1]])
        dt, out = _scaled_dy(plan, dy, seed, gain) if need_dx else (None, None)
        given_bias = b if seed is None and not again else None
        ds, dB[i], sums = ops.dora_expand_backward(dy, t, given_bias, s_i, B, g, out, dt)
        if t is not None:
            dm[i] = sums / (norm if seed is not None or again else g * norm)
        if dt is not None:
            dx = _add_input_gradient(plan, dx, dy, dt, w, gain, seed, i)
        parts.append(F.pad(ds, (0, r - ds.shape[1])) if ds.shape[1] < r else ds)
    known = dx if flat is None else flat  # with x None, dA is formed of dx and not used
    if known is not None:
        ds_all = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        d_rows = steps.shrink_backward(plan.backend, ds_all, known, stack_rows(lora_A), plan.scaling, plan.p, seed, dx)
        for i, a in enumerate(lora_A):
            if flat is not None and grads[i] is not None:
                dA[i] = d_rows.narrow(0, i * r, a.shape[0])
    return None if dx is None else dx.view(shape), dA, dB, dm


def _hides(seed: Tensor | None, gain: Tensor) -> bool:
    """On the CPU, where asking costs nothing: an output of magnitude 0 does not tell t."""
    return seed is None and gain.device.type == "cpu" and not torch.compiler.is_compiling() and _any_zero(gain)


def _any_zero(gain: Tensor) -> bool:
    return gain.numel() > 0 and gain.min().item() <= _SMALLEST - 1


def _scaled_dy(plan: _Plan, dy: Tensor, seed: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Where the multiple of dy goes that is multiplied with W, and the factors."""
    dt = torch.empty_like(dy, memory_format=torch.contiguous_format)
    if seed is None:
        return dt, 1 + gain
    return dt, 1 + gain * philox.keep_scale(plan.p) if plan.gathers(dy) else gain


def _add_input_gradient(
    plan: _Plan, dx: Tensor | None, dy: Tensor, dt: Tensor, w: Tensor, gain: Tensor, seed: Tensor | None, member: int
) -> Tensor:
    """One projection's part of dx, its rim's aside, added to dx where there is one."""
    ops = OPS[plan.backend]
    if seed is not None and not plan.gathers(dy):
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
        ops.dropout_add_(dx, torch.mm(dt, w), plan.p, seed, member)
        return dx
    dx = torch.mm(dt, w) if dx is None else dx.addmm_(dt, w)
    if seed is not None:
        ops.dora_drop_backward_(dx, dy, w, gain * philox.keep_scale(plan.p), plan.p, seed, member)
    return dx


def _native(
    x: Tensor,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scaling: Sequence[float],
    p: float,
) -> tuple[Tensor, ...]:
    """The formula in ordinary differentiable PyTorch. seed None: drawn where p asks for it."""
    outputs = []
    for g, (w, b, A, B, m, c) in enumerate(zip(weights, biases, lora_A, lora_B, magnitudes, scaling)):
        norm = weight_norm(w, A, B, c)
        norm = norm.to(m.dtype).to(norm.dtype).clamp_min(torch.finfo(norm.dtype).tiny)
        gain = (m.flatten().to(norm.dtype) - norm) / norm
        y = F.linear(x, w, b)
        z = x
        if p and native.transformed(x):
            z = F.dropout(x, p)  # a sharded or batched x has masks of its own kind
        elif p:
            seed = philox.draw_seed(x.device) if seed is None else seed
            mask = philox.keep_mask(seed, g, x.shape[:-1].numel(), x.shape[-1], p).view(x.shape)
            z = x * (mask * philox.keep_scale(p)).to(x.dtype)
        rim = F.linear(F.linear(z.to(A.dtype), A), B) * c
        if z is x:
            v = y + rim
            outputs.append((v + gain * (v if b is None else v - b)).to(y.dtype))
        else:
            outputs.append((y + rim + gain * (F.linear(z, w) + rim)).to(y.dtype))
    return tuple(outputs)


def _graph(
    plan: _Plan,
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
        if plan.cast is not None:
            weights, biases = (
                [w.to(plan.cast) for w in weights],
                [None if b is None else b.to(plan.cast) for b in biases],
            )
        with exact(weights[0].device):
            outputs = _native(x, seed, weights, biases, lora_A, lora_B, magnitudes, plan.scaling, plan.p)
            used = [(y, dy) for y, dy in zip(outputs, grads) if dy is not None]
            wanted = [t for t, need in zip(inputs, needs) if need]
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in used], wanted, [dy for _, dy in used], create_graph=True, allow_unused=True
                )
            )
    each = [next(found) if need else None for need in needs]
    return (None, each[0], None, *each[1:])
