"""What RMSNorm and LayerNorm share: their checks, and the gradient as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lora_linear import shaped


def accumulator(*operands: Tensor | None) -> torch.dtype:
    """float64 if an operand is, else fp32: the dtype of sums and of the statistics that are kept."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in operands) else torch.float32


def result_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The promotion of x and the parameters, as `weight * x` has it."""
    dtype = x.dtype
    for t in parameters:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check(
    where: str,
    x: Tensor,
    parameters: dict[str, Tensor | None],
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """ValueError unless the parameters are vectors of x's last dimension and `residual` is like x."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{where}: x must be floating and have a dimension to normalise, got {x.dtype} {_shape(x)}")
    for name, t in parameters.items():
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{where}: {name} must be ({x.shape[-1]},) for an input {_shape(x)}, got {_shape(t)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{where}: residual must have the shape and dtype of x, {_shape(x)} {x.dtype}, got {_shape(residual)} "
            f"{residual.dtype}; add it before the call where the sum is to be of another dtype"
        )
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"{where}: out_dtype must be a floating dtype, got {out_dtype}")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def shaped_like(y: Tensor, x: Tensor) -> Tensor:
    """y (M, K) in x's shape."""
    return y if x.dim() == 2 else shaped(y, x.shape[:-1])


def graph_backward(
    formula: Callable[..., Tensor], dy: Tensor, operands: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients of `formula(*operands)` as a graph, for a second derivative; None for what needs none."""
    with torch.enable_grad():
        y = formula(*operands)
        wanted = [t for t in operands if t is not None and t.requires_grad]
        found: Any = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in operands]


def grad_or_empty(total: Tensor, parameter: Tensor | None, needed: bool) -> Tensor:
    """A parameter's gradient in its dtype, or nothing of the sums' dtype."""
    return total.to(parameter.dtype) if needed and parameter is not None else total.new_empty(0)


def grad_or_empty_fake(x: Tensor, acc: torch.dtype, parameter: Tensor | None, needed: bool) -> Tensor:
    """The same in shape and dtype alone."""
    if needed and parameter is not None:
        return parameter.new_empty(parameter.shape)
    return x.new_empty(0, dtype=acc)
