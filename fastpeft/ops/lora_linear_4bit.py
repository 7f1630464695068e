"""LoRA over a 4-bit weight for few rows and without a graph, as decoding has it: everything in one operator.

    y = x W^T + bias + c x A^T B^T

x (..., K), W (N, K) of 4 bits (`nf4`), bias (N), A (r, K), B (N, r), without dropout; sums and s = c x A^T are in fp32,
rounded once to x's dtype. `nf4_linear` comes here by itself. On a Zen 4 core an operator that multiplies one row with
(32, 64) takes 5 microseconds and the general way, two operators and what Python has to ask for many rows, 25.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import backend, decisions
from .backend import OPS, define
from .nf4 import Weight4bit, linear_reference
from .products import MAX_RANK

_PLAIN = (Tensor, Parameter)
_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_transformed = torch._C._are_functorch_transforms_active


def reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    rows: int,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
) -> Tensor:
    """y (..., N) in x's dtype, N = rows."""
    storage = (packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    s = scaling * (flat.to(acc) @ A.to(acc).T)
    return linear_reference(flat, *storage, rows, bias, s, B).view(*x.shape[:-1], rows)


def _fake(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[7])


define(
    "lora_linear_4bit",
    "(Tensor x, Tensor packed, Tensor absmax, Tensor code, Tensor? nested_code, Tensor? nested_absmax, Tensor? offset, "
    "int blocksize, int nested_blocksize, int rows, Tensor? bias, Tensor A, Tensor B, float scaling) -> Tensor",
    reference=reference,
    fake=_fake,
)

# OpOverload.__call__ only passes its arguments on to this.
_FORWARD = OPS["auto"].lora_linear_4bit._op


def lora_linear_4bit(
    x: Tensor, weight: Weight4bit, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor | None:
    """y (..., N), or None where something is asked for that only the general way does.

    That is: a graph, more rows than the table of decisions has for decoding in place, another device than the CPU or no
    C++ kernels, a forced backend, tensors of other classes, autocast, tracing, compiling and functorch's transforms.
    Shapes that do not fit are left to the general way, which says what is wrong.
    """
    if (
        is_compiling()
        or torch.is_grad_enabled()
        or not x.is_cpu
        or type(x) not in _PLAIN
        or type(lora_A) not in _PLAIN
        or type(lora_B) not in _PLAIN
        or not backend.native_calls()
        or _any_autocast()
        or _tracing() is not None
        or _transformed()
    ):
        return None
    columns, elements = weight.columns, x.numel()
    most = columns * decisions.linear_4bit("cpu", weight.compute_dtype or x.dtype).forward
    if not 0 < elements <= most or x.dim() == 0 or x.shape[-1] != columns:
        return None
    r = lora_A.shape[0]
    if r > MAX_RANK or lora_A.shape != (r, columns) or lora_B.shape != (weight.rows, r):
        return None
    return _FORWARD(x, *weight[:8], weight.rows, bias, lora_A, lora_B, scaling)
