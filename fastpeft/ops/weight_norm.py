"""The norms of the rows of W + c B A, without forming it: what DoRA (arXiv:2402.09353) divides by.

    |W_n + c (BA)_n|² = |W_n|² + 2c B_n · (W Aᵀ)_n + c² B_n (A Aᵀ) B_nᵀ          (the square, expanded)

W (N, K), A (r, K), B (N, r). W Aᵀ has r columns and A Aᵀ is r × r, so the memory needed is O(N r + r²), where the
direct way takes N K. Sums are in fp32, float64 if an operand is float64.

Where the three terms nearly cancel, their sum has lost its digits. Those rows (sum below a quarter of the terms) are
computed again from W + c B A itself, in float64.

Nothing is remembered from call to call, neither of A and B, to which fused optimisers write without a trace, nor of W:
the product with A reads W anyway, and |W_n|² is one multiplication beside its r.

A weight of 4 bits is decoded by panels of rows, into the dtype it was quantised from: the norms are those of the weight
that bitsandbytes' `dequantize_4bit` would give, and of it no more than 4 MiB is there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import OPS, define, route
from .nf4 import Weight4bit, dequantize_4bit
from .nf4_linear import row_panels

_LEFT_OF_TERMS = 0.25  # below this part of its terms a sum counts as cancelled: two of fp32's 24 bits
_BLOCK = 1 << 22  # elements of W converted at a time


@dataclass
class RowPanels:
    """A weight that is decoded some rows at a time: its shape (N, K), and what gives (rows, those rows) in turn."""

    shape: tuple[int, int]
    panels: Callable[[], Iterator[tuple[slice, Tensor]]]


def weight_norm(
    weight: Tensor | Weight4bit | RowPanels, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """|W_n + scaling (BA)_n| for each row n: (N,) in fp32 (float64 if an operand is), detached.

    weight: (N, K), any strides (a transposed view for a weight stored as (in, out)), or of 4 bits, or RowPanels.
    lora_A: (r, K), lora_B: (N, r).

    Raises ValueError on shapes that do not fit.
    """
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_B.shape != (n, lora_A.shape[0]):
        raise ValueError(
            f"with weight {(n, k)}, lora_A must be (r, {k}) and lora_B ({n}, r), got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}"
        )
    if isinstance(weight, Weight4bit | RowPanels):
        return _by_panels(weight, lora_A.detach(), lora_B.detach(), scaling)
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling.detach(), 1.0
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or any(type(t) not in _PLAIN for t in (weight, lora_A, lora_B))
    ):
        return direct(weight, lora_A, lora_B, scaling)  # sharded or batched: through ordinary operators only
    return OPS[route(weight.device)].weight_norm(weight, lora_A, lora_B, float(scaling))


def _by_panels(weight: Weight4bit | RowPanels, A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    if isinstance(weight, RowPanels):
        panels = weight.panels()
    elif weight.rows == 0 or type(A) not in _PLAIN or torch._C._are_functorch_transforms_active():
        return weight_norm(dequantize_4bit(weight), A, B, scaling)
    else:
        panels = row_panels(route(weight.device), weight, weight.dtype)
    parts = [weight_norm(panel, A, B[rows], scaling) for rows, panel in panels]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_PLAIN = (Tensor, torch.nn.Parameter)


def direct(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The definition: forms W + c B A."""
    acc = _accumulator(weight, A, B)
    return torch.linalg.vector_norm(torch.add(weight.to(acc), B.to(acc) @ A.to(acc), alpha=scaling), dim=1)


def reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The factored form."""
    acc = _accumulator(weight, A, B)
    a, b = A.to(acc), B.to(acc)
    own = _row_squares(weight).to(acc)
    cross = torch.cat([(block @ a.T).mul_(b[rows]).sum(1) for rows, block in _blocks(weight, acc)])
    gram = a @ a.T
    added = (b @ gram).mul_(b).sum(1)
    total = own + (2 * scaling) * cross + (scaling * scaling) * added
    # What the terms are made of; the last covers B A that is itself a difference of large columns.
    terms = own + (scaling * scaling) * (added.abs() + b.square() @ gram.diagonal())
    cancelled = (total < _LEFT_OF_TERMS * terms).nonzero().squeeze(1)
    norms = total.clamp_min(0).sqrt()
    if cancelled.numel():
        norms[cancelled] = _directly(weight, A, B, scaling, cancelled).to(acc)
    return norms


def _row_squares(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1, dtype=_widest(weight)).square()


def _directly(weight: Tensor, A: Tensor, B: Tensor, scaling: float, rows: Tensor) -> Tensor:
    wide = _widest(weight)
    a = A.to(wide)
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    return torch.cat([direct(weight[part].to(wide), a, B[part].to(wide), scaling) for part in rows.split(step)])


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of W in `dtype`: all at once if they are in it, else a block at a time."""
    n, k = weight.shape
    step = n if weight.dtype == dtype else max(1, _BLOCK // max(1, k))
    for start in range(0, max(n, 1), max(step, 1)):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)


def _accumulator(*operands: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32


def _widest(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64


def _fake(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=_accumulator(weight, A, B))


define(
    "weight_norm",
    "(Tensor weight, Tensor A, Tensor B, float scaling) -> Tensor",
    reference=reference,
    fake=_fake,
    kernels="weight_norm",
)
