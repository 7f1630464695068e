"""The exact scales of 4-bit weights: none is repacked while `patch` tries a model, nor under a patch."""

from __future__ import annotations

from torch import nn

from ..layers.bnb import REPACKS, keep_scales
from .forwards import LoraForward

_MARK = "_fastpeft_would_repack"


def hold(model: nn.Module) -> None:
    """Switch repacking off in every 4-bit layer, with a mark where it was on."""
    for layer in keep_scales(model):
        layer.__dict__[_MARK] = True


def release(model: nn.Module, keep_patched: bool = False) -> None:
    """Switch it on where `hold` has switched it off; keep_patched: but not below layers that a patch computes."""
    kept = set()
    for module in model.modules() if keep_patched else ():
        if isinstance(module.__dict__.get("forward"), LoraForward):
            kept.add(module._modules["base_layer"])
    for module in model.modules():
        if _MARK in module.__dict__ and module not in kept:
            del module.__dict__[_MARK]
            module.__dict__[REPACKS] = True
