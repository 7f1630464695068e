"""LoRA on an embedding.

    y = W[i] + c A[:, i]^T B^T

i (...) indices, W (V, D), A (r, V), B (D, r): the shapes of PEFT's lora_embedding_A and lora_embedding_B. Gradients:

    dB = c dy^T A[:, i]^T        dA[:, v] = c sum over i = v of B^T dy        (0 for v = padding_idx)

Kept for the backward: the indices and the parameters. y is in W's dtype; A and B may be of another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import OPS, define, route
from .products import MAX_RANK, _accumulator

NO_PADDING = -1


def lora_embedding(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    padding_idx: int | None = None,
) -> Tensor:
    """y (..., D) = W[indices] + scaling * A[:, indices]^T B^T, in W's dtype.

    indices: (...) int64 or int32 below V. weight: (V, D); frozen, or differentiated natively. lora_A: (r, V), lora_B:
    (D, r), r from 1 to 512. padding_idx: the index whose column of A gets no gradient; may be negative, from the end.

    Raises ValueError on shapes that do not fit, IndexError on an index out of range (CPU).
    """
    vocabulary, width = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != vocabulary or lora_B.shape != (width, lora_A.shape[0]):
        raise ValueError(
            f"with weight {tuple(weight.shape)}, lora_A must be (r, {vocabulary}) and lora_B ({width}, r), got "
            f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if not 1 <= lora_A.shape[0] <= MAX_RANK:
        raise ValueError(f"rank must be from 1 to {MAX_RANK}, got {lora_A.shape[0]}")
    padding = NO_PADDING if padding_idx is None else padding_idx % vocabulary
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (indices, weight, lora_A, lora_B))
    if not torch.compiler.is_compiling():
        plain = plain and not torch._C._are_functorch_transforms_active()
    if not plain or (weight.requires_grad and torch.is_grad_enabled()):
        return _native(indices, weight, lora_A, lora_B, scaling, padding)
    return _LoraEmbedding.apply(indices, weight, lora_A, lora_B, float(scaling), padding, route(weight.device))


def embedding_reference(
    indices: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, padding_idx: int
) -> Tensor:
    """y (M, D) for indices (M,)."""
    acc = _accumulator(weight, A, B)
    rim = F.embedding(indices, A.T).to(acc) @ B.to(acc).T
    return (F.embedding(indices, weight).to(acc) + scaling * rim).to(weight.dtype)


def embedding_backward_reference(
    dy: Tensor, indices: Tensor, A: Tensor, B: Tensor, scaling: float, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """dA (r, V) in A's dtype and dB (D, r) in B's, from dy (M, D)."""
    acc = _accumulator(dy, A, B)
    dy = dy.to(acc)
    dB = scaling * (dy.T @ F.embedding(indices, A.T).to(acc))
    columns = scaling * (dy @ B.to(acc))
    if padding_idx >= 0:
        columns = columns * (indices != padding_idx).unsqueeze(1)
    dA = torch.zeros(A.shape[1], A.shape[0], dtype=acc, device=A.device).index_add_(0, indices, columns)
    return dA.T.to(A.dtype).contiguous(), dB.to(B.dtype)


define(
    "lora_embedding",
    "(Tensor indices, Tensor weight, Tensor A, Tensor B, float scaling, int padding_idx) -> Tensor",
    reference=embedding_reference,
    fake=lambda indices, weight, A, B, scaling, padding_idx: weight.new_empty(indices.shape[0], weight.shape[1]),
    kernels="lora_embedding",
)
define(
    "lora_embedding_backward",
    "(Tensor dy, Tensor indices, Tensor A, Tensor B, float scaling, int padding_idx) -> (Tensor dA, Tensor dB)",
    reference=embedding_backward_reference,
    fake=lambda dy, indices, A, B, scaling, padding_idx: (A.new_empty(A.shape), B.new_empty(B.shape)),
    kernels="lora_embedding",
)


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, padding: int, backend: str
    ) -> Tensor:
        y = OPS[backend].lora_embedding(indices.reshape(-1), weight, A, B, scaling, padding)
        ctx.save_for_backward(indices, A, B)
        ctx.scaling, ctx.padding, ctx.backend = scaling, padding, backend
        return torch.ops.aten._unsafe_view(y, (*indices.shape, weight.shape[1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        indices, A, B = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dA, dB = _differentiable_backward(flat, indices.reshape(-1), A, B, ctx.scaling, ctx.padding)
        else:
            flat = flat if flat.stride(1) == 1 else flat.contiguous()
            dA, dB = OPS[ctx.backend].lora_embedding_backward(flat, indices.reshape(-1), A, B, ctx.scaling, ctx.padding)
        return None, None, dA, dB, None, None, None


def _differentiable_backward(
    dy: Tensor, indices: Tensor, A: Tensor, B: Tensor, scaling: float, padding: int
) -> tuple[Tensor, Tensor]:
    dy = dy.to(A.dtype)
    columns = scaling * (dy @ B)
    if padding >= 0:
        columns = columns * (indices != padding).unsqueeze(1)
    dA = torch.zeros_like(A.T).index_add(0, indices, columns).T
    return dA, scaling * (dy.T @ F.embedding(indices, A.T))


def _native(indices: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, padding: int) -> Tensor:
    """The formula in ordinary operators."""
    pad = None if padding < 0 else padding
    y = F.embedding(indices, weight, pad)
    return (y + scaling * (F.embedding(indices, A.T, pad) @ B.T)).to(y.dtype)
