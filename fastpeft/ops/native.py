"""LoRA's formula in ordinary differentiable PyTorch: for what the autograd.Functions do not do.

Trainable base weights, tensor subclasses, functorch transforms and second derivatives come here. So does nothing that
is hot. The formula and the names are those of `lora_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import philox

_PLAIN_TYPES = (Tensor, Parameter, type(None))


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor subclass or a functorch transform is at work, which a custom operator would not see through."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if type(t) not in _PLAIN_TYPES:
            return True
    return torch._C._are_functorch_transforms_active()


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of a group, one a projection. seed: of the masks, where they have been drawn already."""
    outputs, member = [], 0
    for w, bias, a, b, c in zip(weights, biases, lora_A, lora_B, scaling):
        y = F.linear(x, w, bias)
        if a is not None and b is not None:
            z = x
            if dropout_p and transformed(x):
                z = F.dropout(x, dropout_p)  # a sharded or batched x has masks of its own kind
            elif dropout_p:
                seed = philox.draw_seed(x.device) if seed is None else seed
                mask = philox.keep_mask(seed, member, x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape)
                z = x * (mask * philox.keep_scale(dropout_p)).to(x.dtype)
            y = (y + F.linear(F.linear(z.to(a.dtype), a), b) * c).to(y.dtype)
            member += 1
        outputs.append(y)
    return tuple(outputs)


def linear_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    seed: Tensor | None,
    weights: Sequence[Tensor],
    members: Sequence[int],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float,
    shape: torch.Size,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """dx (of `shape`) and the dA's and dB's as a graph, for a second derivative. x None: no adapter is trainable.

    dys, weights: one a projection; a dy is None where that output was not used. members: the projections with an
    adapter, in the order of lora_A, lora_B and scaling.
    """
    flat = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
    rows, columns = shape[:-1].numel(), shape[-1]
    dx: Any = sum(dy @ w.to(dy.dtype) for dy, w in zip(flat, weights) if dy is not None)
    d_A: list[Tensor | None] = [None] * len(lora_A)
    d_B: list[Tensor | None] = [None] * len(lora_B)
    for g, (i, a, b, c) in enumerate(zip(members, lora_A, lora_B, scaling)):
        dy = flat[i]
        if dy is None:
            continue
        factor: Tensor | float = c
        if seed is not None:
            mask = philox.keep_mask(seed, g, rows, columns, dropout_p)
            factor = (c * philox.keep_scale(dropout_p) * mask).to(a.dtype)
        ds = dy.to(a.dtype) @ b
        dx = dx + (ds @ a * factor).to(dx.dtype)
        if x is not None:
            scaled = x.reshape(rows, columns).to(a.dtype) * factor
            d_A[g] = ds.T @ scaled
            d_B[g] = dy.to(a.dtype).T @ (scaled @ a.T)
    return dx.reshape(shape), d_A, d_B
