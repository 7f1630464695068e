"""Activated LoRA (arXiv:2504.12397): an adapter that works on a sequence from its invocation tokens on.

Before them the layers compute what the base model computes, so that the cache made by the base model (or another such
adapter) can be used. How far back from the end of each sequence the adapter works is one number a sample: its *offset*,
None where the invocation tokens do not occur. The offsets of the running forward are in a context variable, for the
layers to read; `fastpeft.tuner.activated` sets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpeft.layers.variants import LoraVariant

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig

Offsets = Sequence[int | None]

# One list for all adapters, or adapter -> list.
_running: ContextVar[Offsets | Mapping[str, Offsets] | None] = ContextVar("fastpeft_alora_offsets", default=None)


@contextmanager
def offsets_for(offsets: Offsets | Mapping[str, Offsets] | None) -> Iterator[None]:
    """Let activated adapters work from these offsets on while the block runs; None: nowhere."""
    token = _running.set(offsets)
    try:
        yield
    finally:
        _running.reset(token)


def running_offsets() -> Offsets | Mapping[str, Offsets] | None:
    """The offsets of the running forward."""
    return _running.get()


def find_offsets(input_ids: Tensor, invocation_tokens: Sequence[int]) -> list[int | None]:
    """For each row of input_ids (B, T), how far from its end the last occurrence of the tokens begins; None without."""
    tokens = torch.tensor(invocation_tokens, device=input_ids.device)
    n, length = len(invocation_tokens), input_ids.shape[1]
    if not 0 < n <= length:
        return [None] * input_ids.shape[0]
    found = (input_ids.unfold(1, n, 1) == tokens).all(-1)  # (B, T - n + 1)
    last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
    return [length - start if any_ else None for start, any_ in zip(last.tolist(), found.any(1).tolist())]


class Activated(LoraVariant):
    """LoRA on the last `offset` positions of each sequence."""

    name = "aLoRA"

    def init(self, layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Nothing beyond A and B."""

    def forward(self, layer: Any, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result (B, T, N) or (B, N), with scaling · B A dropout(x) added where the adapter works.

        kwargs: `alora_offsets` instead of the running ones; `rows`: which samples of the batch these are.
        """
        offsets: Any = kwargs.get("alora_offsets")
        offsets = running_offsets() if offsets is None else offsets
        if isinstance(offsets, Mapping):
            offsets = offsets.get(adapter_name)
        samples, steps = result.shape[0], result.shape[1] if result.dim() == 3 else 1
        if offsets is None:
            chosen = torch.empty(0, dtype=torch.long, device=result.device)  # nowhere, but with a gradient: zero
        else:
            rows = kwargs.get("rows")
            offsets = offsets if rows is None else [offsets[i] for i in rows]
            if len(offsets) != samples:
                raise ValueError(f"aLoRA: {len(offsets)} offsets were given for a batch of {samples}.")
            depth = torch.tensor([min(o or 0, steps) for o in offsets], device=result.device)
            active = torch.arange(steps, device=result.device) >= (steps - depth).unsqueeze(1)
            chosen = active.flatten().nonzero().squeeze(1)
        A, dropout = layer.lora_A[adapter_name], layer.lora_dropout[adapter_name]
        part = layer._cast_input_dtype(x, A.weight.dtype).reshape(-1, x.shape[-1])[chosen]
        added = layer.lora_B[adapter_name](A(dropout(part))) * layer.scaling[adapter_name]
        flat = result.reshape(-1, result.shape[-1])
        return flat.index_add(0, chosen, added.to(flat.dtype)).view(result.shape)

    def merge(self, layer: Any, adapter_name: str, weight: Tensor) -> Tensor:
        """Raises `NotImplementedError`: a weight knows no positions."""
        raise NotImplementedError("aLoRA does not support merging: the adapter works on a part of each sequence.")

    def unmerge(self, layer: Any, adapter_name: str, weight: Tensor) -> Tensor:
        """Raises `NotImplementedError`, like `merge`."""
        raise NotImplementedError("aLoRA does not support unmerging.")

    def supports_lora_conversion(self) -> bool:
        """Yes: a LoRA adapter that works everywhere can stand for its weights."""
        return True
