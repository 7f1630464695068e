"""How far a replacement may be from what it replaces: both are measured against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers.bnb import kind_of

# Ours may err at most this many times as much as the original does.
FACTOR = 2.0

# An original further than this from float64 does not compute the formula at all (fp32 may be TF32 inside).
FORMULA = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}

_WIDE = (torch.float32, torch.float64)


def of_outputs(model: nn.Module, dtype: torch.dtype) -> float:
    """How far a model's outputs in `dtype` may move where every replacement inside has been compared strictly.

    This is to catch a structure misread, whose error is of order 1. Quantised layers may multiply in 16 bits or in
    int8 whatever the dtype around them is.
    """
    if dtype not in _WIDE:
        return 5e-2
    coarse = any(
        kind_of(m) == "8bit" or (kind_of(m) == "4bit" and getattr(m, "compute_dtype", None) not in (None, *_WIDE))
        for m in model.modules()
    )
    return 5e-2 if coarse else 1e-3


def differ(first: list[Tensor], second: list[Tensor], model: nn.Module) -> str | None:
    """What is wrong with what the patched model returned, second; None where it is what it returned before."""
    if len(first) != len(second):
        return "the patched model returns something else"
    for a, b in zip(first, second):
        if a.shape != b.shape or a.dtype != b.dtype:
            return "the patched model returns other shapes or dtypes"
        if a.is_meta:
            continue
        finite = torch.isfinite(a) & torch.isfinite(b)
        apart = distance(b[finite], a[finite])
        if not apart <= of_outputs(model, a.dtype):
            return f"the patched model's output differs by {apart:.1e}"
    return None


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative root-mean-square error; infinite where there is a NaN."""
    truth = truth.double()
    error = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def agrees(mine: Tensor, other: Tensor, true: Tensor) -> bool:
    """Does `other` compute the formula, in float64 `true`, and does ours err at most FACTOR times as much?"""
    allowed = distance(other, true)
    return allowed <= FORMULA[other.dtype] and distance(mine, true) <= FACTOR * allowed


def with_gradients(f: Callable[..., tuple[Tensor, ...]], xs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """The outputs of f(*xs), then the gradients of xs."""
    xs = [x.detach().requires_grad_() for x in xs]
    with torch.enable_grad():
        ys = f(*xs)
        grads = torch.autograd.grad(ys, xs, [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)])
    return [*(y.detach() for y in ys), *grads]
