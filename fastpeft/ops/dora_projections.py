"""DoRA's projections of one input, forward and backward, without the input's part: the algebra is in `dora_linear`.

What `dora_linear_group` (the input is kept) and `dora_joined` (the input is made again) have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dora_products as dora_products  # declares the operators
from . import gemm, native, philox
from .backend import OPS, cpu_extension
from .lora_linear import check, rows_of, shaped
from .nf4 import Weight4bit
from .projections import base_gradient, base_product
from .promise import Promise, Watch
from .weight_norm import weight_norm

# The largest p at which the second base product is made of the first on the CPU.
GATHER_P = 0.2


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    members: int
    scaling: tuple[float, ...]
    p: float
    cast: torch.dtype | None  # autocast's dtype, to which the base is cast in the forward and again in the backward
    backend: str
    norms: tuple[Tensor | None, ...]  # those that are known
    packed: tuple[Weight4bit | None, ...] = ()  # the weights of 4 bits, by projection; empty without one

    def lists(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """One flat list, cut into the lists of its kinds."""
        return [list(tensors[i : i + self.members]) for i in range(0, len(tensors), self.members)]

    def weights(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The weights, where `tensors` has the packed elements of those of 4 bits."""
        return [w if p is None else p for p, w in zip(self.packed, tensors)] if self.packed else tensors

    def back(self, outputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Under autocast: those of 4-bit weights in the input's dtype, as bitsandbytes gives them."""
        if not self.packed or self.cast is None:
            return tuple(outputs)
        return tuple(y if w is None else y.to(dtype) for w, y in zip(self.packed, outputs))

    def gathers(self, x: Tensor) -> bool:
        """With dropout: whether the second base product is made of the first, by columns of W: not of 4 bits."""
        return (
            self.backend == "auto"
            and not self.packed
            and x.device.type == "cpu"
            and x.dtype is not torch.float64
            and self.p <= GATHER_P
            and cpu_extension() is not None
        )


def promised(told: Sequence[bool], magnitudes: Sequence[Tensor], p: float) -> list[Promise | None]:
    """A promise for each output that need not be kept because its reader tells it.

    None with dropout, when it is t that is kept, which no reader knows, and none of a frozen magnitude's, which is not
    kept anyway.
    """
    usable = not p and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    asked = told or (False,) * len(magnitudes)
    return [Promise() if usable and t and m.requires_grad else None for t, m in zip(asked, magnitudes)]


def hand_out(outputs: Sequence[Tensor], promises: Sequence[Promise | None]) -> None:
    """Each promise goes with its output."""
    for y, promise in zip(outputs, promises):
        if promise is not None:
            promise.of(y)


def watch(outputs: Sequence[Tensor], magnitudes: Sequence[Tensor], seed: Tensor | None) -> list[Watch | None]:
    """What notices that an output from which dm is to be made was changed."""
    if seed is not None or torch.compiler.is_compiling():
        return [None] * len(outputs)
    return [Watch(y) if m.requires_grad else None for y, m in zip(outputs, magnitudes)]


def recall(
    kept: list[Tensor | None], promises: Sequence[Promise | None], watched: Sequence[Watch | None]
) -> list[bool]:
    """Puts the outputs that were promised in their places in `kept`; for each, whether it must be computed again."""
    again = [w is not None and w.changed for w in watched]
    for i, promise in enumerate(promises):
        if promise is not None:
            kept[i] = promise.redeem()
            again[i] = again[i] or kept[i] is None
    return again


def check_all(
    x: Tensor,
    weights: Sequence[Tensor | Weight4bit],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    dropout_p: float,
) -> None:
    """`check` of each projection, and that its magnitude has an element for each row of its weight."""
    for i, (w, a, b, m) in enumerate(zip(weights, lora_A, lora_B, magnitudes)):
        where = "dora_linear" if len(weights) == 1 else f"dora_linear: projection {i}"
        check(x, w, a, b, dropout_p, where)
        if m.numel() != w.shape[0]:
            raise ValueError(f"{where}: magnitude must have {w.shape[0]} elements, got {tuple(m.shape)}")


def project(
    plan: Plan,
    flat: Tensor,
    lead: torch.Size,
    s_all: Tensor,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Of flat (M, K) and s (M, G*r): the outputs (*lead, N_g), and of each what dm is made of and (2, N): g - 1 and n.

    The outputs are tensors that autograd takes neither for views nor for what is kept.
    """
    ops, r = OPS[plan.backend], s_all.shape[1] // plan.members
    outputs, kept, gains = [], [], []
    for g, (w, b, A, B, m) in enumerate(zip(plan.weights(weights), biases, lora_A, lora_B, magnitudes)):
        norm = plan.norms[g]
        gains.append(ops.dora_gain(weight_norm(w, A, B, plan.scaling[g]) if norm is None else norm, m))
        gain = gains[g][0]
        if plan.cast is not None:
            w, b = w.to(plan.cast), None if b is None else b.to(plan.cast)
        s = s_all[:, g * r : g * r + B.shape[1]]
        if seed is None:
            y = t = base_product(plan.backend, flat, w, b)
            ops.dora_expand_(y, s, B, gain, b)
        elif plan.gathers(flat):
            y = base_product(plan.backend, flat, w)
            t = ops.dora_drop_(y, flat, w, s, B, gain, b, plan.p, seed, g)
        else:
            y = base_product(plan.backend, flat, w)
            t = base_product(plan.backend, ops.dropout(flat, plan.p, seed, g), w)
            ops.dora_mix_(y, t, s, B, gain, b)
        outputs.append(shaped(y, lead))
        kept.append(t)
    return tuple(outputs), kept, gains


def collect(
    plan: Plan,
    grads: Sequence[Tensor | None],
    made: Callable[[], Tensor] | None,
    s: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    kept: list[Tensor | None],
    gains: list[Tensor],
    again: list[bool],
    need_dx: bool,
) -> tuple[Tensor | None, Tensor, list[Any], list[Any]]:
    """dx (M, K) of the base products alone, ds (M, G*r) before scaling and mask, and of each projection dB and dm.

    made: gives the input (M, K), for an output that does not tell dm; None where nothing is trained. again: that output
    is gone, or is not what it was. dx is a new tensor, None unless needed. Some gradient is not None.
    """
    ops, r = OPS[plan.backend], max(a.shape[0] for a in lora_A)
    rows = next(rows_of(dy).shape[0] for dy in grads if dy is not None)
    dx: Tensor | None = None
    parts = []
    dB: list[Any] = [None] * plan.members
    dm = list(dB)
    for i, (grad, w, b, B, t) in enumerate(zip(grads, plan.weights(weights), biases, lora_B, kept)):
        if grad is None:
            parts.append(lora_A[i].new_zeros(rows, r))
            continue
        dy, gain, norm = rows_of(grad), gains[i][0], gains[i][1]
        if plan.cast is not None:
            w, b = w.to(plan.cast), None if b is None else b.to(plan.cast)
        s_i = dy.new_zeros(dy.shape[0], B.shape[1], dtype=B.dtype) if s is None else s[:, i * r : i * r + B.shape[1]]
        g, anew = 1 + gain, again[i] or (t is not None and _hides(seed, gain))
        if anew and made is not None:
            t = base_product(plan.backend, made(), w)
            ops.lora_expand_(t, s_i, B, [t.shape[1]])
        factor = g if seed is None else 1 + gain * philox.keep_scale(plan.p) if plan.gathers(dy) else gain
        # A product of ours multiplies by it while it reads W; for the vendor's the multiple of dy is written.
        spread = need_dx and not (isinstance(w, Tensor) and gemm.ours(plan.backend, dy, w))
        dt = torch.empty_like(dy, memory_format=torch.contiguous_format) if spread else None
        given_bias = b if seed is None and not anew else None
        t = None if t is None else rows_of(t)
        ds, dB[i], sums = ops.dora_expand_backward(dy, t, given_bias, s_i, B, g, factor if spread else None, dt)
        if t is not None:
            dm[i] = sums / (norm if seed is not None or anew else g * norm)
        if need_dx:
            scaled = (dy, factor) if dt is None else (dt, None)
            dx = _add_input_gradient(plan, dx, dy, scaled, w, gain, seed, i)
        parts.append(F.pad(ds, (0, r - ds.shape[1])) if ds.shape[1] < r else ds)
    return dx, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), dB, dm


def split_rows(d_rows: Tensor, lora_A: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Any]:
    """The dA's out of the stacked one (G*r, K); None for a member whose output was not used."""
    r = d_rows.shape[0] // len(lora_A)
    return [None if dy is None else d_rows.narrow(0, i * r, a.shape[0]) for i, (a, dy) in enumerate(zip(lora_A, grads))]


def _hides(seed: Tensor | None, gain: Tensor) -> bool:
    """On the CPU, where asking costs nothing: an output of magnitude 0 does not tell t."""
    if seed is not None or gain.device.type != "cpu" or torch.compiler.is_compiling() or not gain.numel():
        return False
    return gain.min().item() <= dora_products.SMALLEST_GAIN


def _add_input_gradient(
    plan: Plan,
    dx: Tensor | None,
    dy: Tensor,
    scaled: tuple[Tensor, Tensor | None],
    w: Tensor | Weight4bit,
    gain: Tensor,
    seed: Tensor | None,
    member: int,
) -> Tensor:
    """One projection's part of dx, its rim's aside, added to dx where there is one.

    scaled: the multiple of dy that meets W, by column; or dy and the factors.
    """
    ops, (dt, factor) = OPS[plan.backend], scaled
    if seed is not None and not plan.gathers(dy):
        dx = base_gradient(plan.backend, dy, w, dx)
        ops.dropout_add_(dx, base_gradient(plan.backend, dt, w, None, factor), plan.p, seed, member)
        return dx
    dx = base_gradient(plan.backend, dt, w, dx, factor)
    if seed is not None:
        ops.dora_drop_backward_(dx, dy, w, gain * philox.keep_scale(plan.p), plan.p, seed, member)
    return dx


def formula(
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
