"""LoRA on one linear layer, for inputs so small that calls are what they cost: everything in one operator.

    y = x W^T + bias + c x A^T B^T

without dropout; shapes and formula are those of `lora_linear`, whose public function comes here by itself. Tensors are
of one dtype. The backward keeps x and forms c x A^T again:

    ds = c dy B      dA = ds^T x
    dB = dy^T (c x A^T)    dx = dy W + ds A

On a Zen 4 core the three products of (1, 64) by ordinary operators take 9 microseconds without a graph and 13 with one,
of which less than one is arithmetic; docs/python_cost.md has what a layer takes. The sums are in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import backend, native
from .backend import OPS, define
from .linear_rows import few_rows

_PLAIN = (Tensor, Parameter)
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_transformed = torch._C._are_functorch_transforms_active


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, few: int = 0
) -> Tensor:
    """y (..., N) of x (..., K). few: up to so many rows the kernel makes a large base product by `linear_rows`."""
    return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, A), B), alpha=scaling)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x (without need_dx: empty), dA and dB."""
    m = x.shape[:-1].numel()
    rows, flat = dy.reshape(m, dy.shape[-1]), x.reshape(m, x.shape[-1])
    ds = scaling * (rows @ B)
    dx = (rows @ weight + ds @ A).view(x.shape) if need_dx else x.new_empty(0, 0)
    return dx, ds.T @ flat, scaling * (rows.T @ (flat @ A.T))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, few: int = 0) -> Tensor:
    if not x.device == weight.device == A.device == B.device:  # one of them is on the meta device
        raise RuntimeError(
            f"lora_linear: x is on {x.device}, weight on {weight.device}, lora_A on {A.device}, lora_B on {B.device}"
        )
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else (0, 0)), A.new_empty(A.shape), B.new_empty(B.shape)


define(
    "lora_linear_small",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling, int few=0) -> Tensor",
    reference=reference,
    fake=_fake,
)
define(
    "lora_linear_small_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, float scaling, bool need_dx)"
    " -> (Tensor dx, Tensor dA, Tensor dB)",
    reference=backward_reference,
    fake=_backward_fake,
)

# OpOverload.__call__ only passes its arguments on to this.
_FORWARD = OPS["auto"].lora_linear_small._op
_BACKWARD = OPS["auto"].lora_linear_small_backward._op


class _LoraLinearSmall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling = scaling
        return _FORWARD(x, weight, bias, A, B, scaling, few_rows(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, A, B = ctx.saved_tensors
        need_dx, _, _, need_A, need_B, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            dx, (dA,), (dB,) = native.linear_backward(
                (dy,), x, None, (weight,), (0,), (A,), (B,), (ctx.scaling,), 0.0, x.shape
            )
        else:
            dx, dA, dB = _BACKWARD(dy, x, weight, A, B, ctx.scaling, need_dx)
        return dx if need_dx else None, None, None, dA if need_A else None, dB if need_B else None, None


# Function.apply without its Python part, which looks for functorch transforms and for setup_context.
_apply = super(torch.autograd.Function, _LoraLinearSmall).apply


def lora_linear_small(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor | None:
    """y (..., N), or None where something is asked for that only the general way does.

    That is: another device than the CPU or no C++ kernels, a forced backend, a trainable base or a frozen adapter, a
    base of another dtype, tensors of other classes, autocast, tracing, compiling and functorch's transforms. x and the
    adapter are of one dtype already. Every check here is a hundredth of the call.
    """
    if (
        is_compiling()
        or not x.is_cpu
        or type(x) not in _PLAIN
        or not (type(weight) is type(lora_A) is type(lora_B) is Parameter)
        or x.dtype is not weight.dtype
        or not backend.native_calls()
        or _any_autocast()
        or _tracing() is not None
        or _transformed()
    ):
        return None
    if not torch.is_grad_enabled():
        return _FORWARD(x, weight, bias, lora_A, lora_B, scaling, few_rows(x.dtype))
    if weight.requires_grad or not lora_A.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return _apply(x, weight, bias, lora_A, lora_B, scaling)
