"""LoRA on one linear layer.

    y = x W^T + bias + c dropout(x) A^T B^T

x (..., K), W (N, K), bias (N), A (r, K), B (N, r), c a float (LoRA: Hu et al., 2021, eq. 3). W is frozen. The backward
keeps x, s = c dropout(x) A^T, the mask's seed and the parameters; the mask is formed again:

    ds = dy B        dA = c ds^T dropout(x)
    dB = dy^T s      dx = dy W + c mask * (ds A)

The arithmetic is in `steps` and `products`. Very small inputs go to `lora_linear_small`, or take the same formula in
ordinary operators: calls, not arithmetic, are what they cost. Groups of projections of one input are in
`lora_linear_group`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, native, philox, steps
from .backend import autocast_enabled, exact, route
from .lora_linear_small import lora_linear_small
from .nf4 import Weight4bit
from .products import MAX_RANK

# Elements of x up to which calls, not arithmetic, are the cost without dropout. A forward of (1, 64) takes 7 us by
# `lora_linear_small` and 16 by ordinary operators, (64, 64) takes 33 and 27, with the backward 109 and 119 (one Zen 4
# core, fp32).
NATIVE_ELEMENTS = 4096


def lora_linear(
    x: Tensor,
    weight: Tensor | Weight4bit,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y (..., N) = x W^T + bias + scaling * dropout(x) A^T B^T, in the dtype of the base product.

    x: (..., K). weight: (N, K), any strides; frozen, or differentiated natively; a Weight4bit goes to `nf4_linear`.
    lora_A: (r, K), lora_B: (N, r), r from 1 to 512, of one floating dtype that may differ from x's. dropout_p: applied
    as given, so pass 0 in evaluation. Under autocast everything is cast as F.linear casts.

    Raises ValueError on adapter shapes that do not fit, on r > 512 and on dropout_p outside [0, 1].
    """
    if type(weight) is Weight4bit:
        from .nf4_linear import nf4_linear  # it is built from what is here

        return nf4_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
    assert isinstance(weight, Tensor)
    if dropout_p == 0.0 and x.numel() <= NATIVE_ELEMENTS and x.dtype is lora_A.dtype:
        small = lora_linear_small(x, weight, bias, lora_A, lora_B, scaling)
        if small is not None:
            return small
        if x.dim() == 2:
            return torch.addmm(F.linear(x, weight, bias), F.linear(x, lora_A), lora_B.t(), alpha=scaling)
        shape = x.shape
        flat = x.reshape(shape[:-1].numel(), shape[-1])
        y = torch.addmm(F.linear(flat, weight, bias), F.linear(flat, lora_A), lora_B.t(), alpha=scaling)
        return y.view(*shape[:-1], y.shape[1])
    check(x, weight, lora_A, lora_B, dropout_p)
    if native.transformed(x, weight, bias, lora_A, lora_B) or (weight.requires_grad and torch.is_grad_enabled()):
        return native.linear(x, (weight,), (bias,), (lora_A,), (lora_B,), (scaling,), dropout_p)[0]
    device = x.device
    cast = None
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, lora_A, lora_B = x.to(cast), lora_A.to(cast), lora_B.to(cast)
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) else None
    return _LoraLinear.apply(
        x, seed, weight, bias, lora_A, lora_B, (float(scaling),), float(dropout_p), cast, route(device)
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: tuple[float],
        p: float,
        cast: torch.dtype | None,  # autocast's dtype, to which the base is cast here and again in the backward
        backend: str,
    ) -> Tensor:
        if cast is None:
            y, s = _forward(x, seed, weight, bias, A, B, scaling, p, backend)
        else:
            with exact(x.device):
                b = None if bias is None else bias.to(cast)
                y, s = _forward(x, seed, weight.to(cast), b, A, B, scaling, p, backend)
        # x is kept for dA and s for dB: a frozen adapter needs neither.
        trainable = A.requires_grad or B.requires_grad
        ctx.save_for_backward(x if trainable else None, s if trainable else None, seed, weight, A, B)
        ctx.call = x.shape, scaling, p, cast, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, s, seed, weight, A, B = ctx.saved_tensors
        shape, scaling, p, cast, backend = ctx.call
        need_dx, _, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        dx: Tensor | None
        dA: Tensor | None
        dB: Tensor | None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, (dA,), (dB,) = native.linear_backward((dy,), x, seed, (weight,), (0,), (A,), (B,), scaling, p, shape)
            d_bias = dy.flatten(0, -2).sum(0) if need_bias else None
        elif autocast_enabled(dy.device):
            with exact(dy.device):
                dx, dA, dB, d_bias = _backward(
                    dy, x, s, seed, weight, A, B, scaling, p, cast, backend, ctx.needs_input_grad
                )
        else:
            dx, dA, dB, d_bias = _backward(
                dy, x, s, seed, weight, A, B, scaling, p, cast, backend, ctx.needs_input_grad
            )
        if dx is not None:
            dx = dx.view(shape) if need_dx else None
        return dx, None, None, d_bias, dA if need_A else None, dB if need_B else None, None, None, None, None


def _forward(
    x: Tensor,
    seed: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: tuple[float],
    p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    flat = rows_of(x)
    s = steps.shrink(backend, flat, A, scaling, p, seed)
    y = gemm.linear(backend, flat, weight, bias)
    steps.expand_(backend, y, s, B, (weight.shape[0],))
    return y if x.dim() == 2 else shaped(y, x.shape[:-1]), s


def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: tuple[float],
    p: float,
    cast: torch.dtype | None,
    backend: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dy = rows_of(dy)
    d_bias = dy.sum(0) if needs[3] else None
    dx = gemm.mm(backend, dy, weight if cast is None else weight.to(cast)) if needs[0] else None
    if x is None or s is None:
        if dx is not None:
            # dA, formed of dx for want of x, is not used.
            steps.shrink_backward(backend, torch.mm(dy.to(B.dtype), B), dx, A, scaling, p, seed, dx)
        return dx, None, None, d_bias
    ds, dB = steps.expand_backward(backend, dy, s, B)
    dA = steps.shrink_backward(backend, ds, rows_of(x), A, scaling, p, seed, dx)
    return dx, dA, dB, d_bias


def rows_of(t: Tensor) -> Tensor:
    """t as a matrix whose rows are contiguous (an input may come transposed, a gradient expanded)."""
    if t.dim() != 2:
        t = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1]) else t.contiguous()


def check(x: Tensor, weight: Any, A: Tensor, B: Tensor, dropout_p: float, where: str = "lora_linear") -> None:
    """ValueError unless the shapes fit each other, the rank is in range and dropout_p is a probability."""
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{where}: weight {tuple(weight.shape)} needs an input (..., {k}), got {tuple(x.shape)}")
    r = A.shape[0]
    if A.shape != (r, k) or B.shape != (n, r):
        raise ValueError(
            f"{where}: with weight {tuple(weight.shape)}, lora_A must be (r, {k}) and lora_B ({n}, r), got "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{where}: rank must be from 1 to {MAX_RANK}, got {r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{where}: dropout_p must be between 0 and 1, got {dropout_p}")


def shaped(y: Tensor, lead: torch.Size) -> Tensor:
    """y (M, N) as (*lead, N), sharing memory but not a view to autograd (see column_block)."""
    return torch.ops.aten._unsafe_view(y, (*lead, y.shape[1]))


def column_block(y: Tensor, offset: int, n: int, lead: torch.Size) -> Tensor:
    """Columns offset … offset + n of y (M, N) as (*lead, n), sharing memory but not a view to autograd.

    A view returned by an autograd.Function may not be changed in place, and models do that (clamp_ on queries).
    """
    if torch.compiler.is_compiling():  # a copy that the compiler moves into whatever reads it
        return shaped(y.narrow(1, offset, n).clone(memory_format=torch.contiguous_format), lead)
    strides = [math.prod(lead[i + 1 :]) * y.stride(0) for i in range(len(lead))]
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset() + offset, (*lead, n), (*strides, 1))
