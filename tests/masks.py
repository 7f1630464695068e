"""The masks of fastpeft in PEFT's dropout, so that the two can be compared with dropout on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpeft.ops import philox

SEED = 20240531


@contextlib.contextmanager
def exchanged_masks(*models: nn.Module, member: Callable[[str], int] = lambda name: 0) -> Iterator[None]:
    """Within: every call of fastpeft draws one seed, and the dropout modules of the models' LoRA layers have its masks.

    member: the place of a layer, by its name in the model, in the group that it is computed in.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(philox, "draw_seed", lambda device: torch.tensor([SEED], device=device))
        for model in models:
            for name, layer in model.named_modules():
                for dropout in getattr(layer, "lora_dropout", {}).values():
                    patched.setattr(dropout, "forward", _masked(dropout, member(name)))
        yield


def _masked(dropout: Any, member: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not dropout.training or isinstance(dropout, nn.Identity):
            return x
        mask = _mask(SEED, member, x.shape[:-1].numel(), x.shape[-1], dropout.p)
        return x * (mask.view(x.shape) * philox.keep_scale(dropout.p)).to(x.dtype)

    return forward


@functools.lru_cache(maxsize=16)
def _mask(seed: int, member: int, rows: int, columns: int, p: float) -> Tensor:
    """One mask serves all layers of a shape: in PyTorch's operators it takes longer than the layer."""
    return philox.keep_mask(torch.tensor([seed]), member, rows, columns, p)
