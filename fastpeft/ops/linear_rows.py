"""A linear layer's product for few rows on the CPU, bound by reading the weight: decoding, and the logits of a token.

    y = x Wᵀ + bias        x (M, K), W (N, K), bias (N)

Sums are in fp32, in runs, and rounded once to x's dtype; W is read once and nothing is packed. `gemm.linear` comes here
where the table of decisions says so, by dtype and number of rows, for weights of at least 2^16 elements; docs/gemm.md
has the measurements. Not on a forced backend, nor where `torch.set_float32_matmul_precision` allows less than fp32, nor
under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import decisions
from .backend import OPS, define, native_calls

_any_autocast = torch._C._is_any_autocast_enabled
_tracing = torch._C._get_tracing_state
_transformed = torch._C._are_functorch_transforms_active
_LARGE = 1 << 16  # elements of a weight; below, the call is what a product costs


def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows of x, and weights of at least `_LARGE` elements, the product is `linear_rows` now."""
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 0
    return decisions.linear_rows(dtype)


def few(backend: str, x: Tensor, weight: Tensor) -> bool:
    """Whether x (M, K) times weight (N, K) transposed is for `linear_rows`."""
    if backend != "auto" or torch.compiler.is_compiling():
        return False
    return x.shape[0] <= few_rows(x.dtype) and _takes(x, weight)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is weight.dtype and x.is_cpu and weight.is_cpu and weight.numel() >= _LARGE and weight.stride(1) == 1


def linear_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """F.linear(x, weight, bias) of x (..., K) with few rows where no graph is recorded, or None: not one of those."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return None
    rows = x.shape[:-1].numel()
    if not 0 < rows <= few_rows(x.dtype) or not native_calls() or not _takes(x, weight):
        return None
    if _any_autocast() or _tracing() is not None or _transformed() or (bias is not None and bias.dtype is not x.dtype):
        return None
    return OPS["auto"].linear_rows(x.reshape(rows, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (M, N) in x's dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc) @ weight.to(acc).T
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


define("linear_rows", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference=reference, fake=_fake)
