"""Adapters that belong to a changed base weight (PiSSA, OLoRA, CorDA, LoRA-GA), written as LoRA for the original one.

Such a method moves c B₀ A₀ out of the base weight W before training, so that the trained model is W - c B₀ A₀ + c B A.
What training has added is c (B A - B₀ A₀) = c [B, -B₀] [A; A₀]: an adapter of rank 2 r on W itself.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterFileError

_METHODS = ("pissa", "corda", "olora", "lora_ga", "true")


def minus_initial(trained: Mapping[str, Tensor], initial: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The factors of `trained` minus those of `initial`, of twice the rank; other tensors as `trained` has them.

    trained, initial: an adapter's tensors under their names in a file. source: where `initial` is from, for errors.

    Raises `AdapterFileError` if `initial` lacks a factor or has one of another shape.
    """
    result = dict(trained)
    for name, tensor in trained.items():
        dim = _rank_dim(name)
        if dim is None:
            continue
        first = initial.get(name)
        if first is None or first.shape != tensor.shape:
            found = "does not have it" if first is None else f"has shape {tuple(first.shape)}"
            raise AdapterFileError(
                f"{name} of shape {tuple(tensor.shape)}: the initial adapter in {source} {found}. Pass the directory "
                "that this adapter was saved to before its training."
            )
        first = first.to(tensor)
        result[name] = torch.cat([tensor, first if dim == 0 else -first], dim=dim)
    return result


def of_twice_the_rank(config: Any) -> Any:
    """A copy of the config for what `minus_initial` returns: rank doubled, scaling kept, initialised as plain LoRA.

    Raises `ValueError` for options with which the difference is no LoRA adapter.
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    if config.use_dora:
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported with "
            "`use_dora=True`: DoRA's difference to the original weight has full rank."
        )
    if not str(config.init_lora_weights).lower().startswith(_METHODS):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA/LoRA-GA adapter "
            "to a LoRA adapter",
            stacklevel=4,
        )
    config = copy.copy(config)
    config.init_lora_weights = True
    config.eva_config = config.corda_config = config.lora_ga_config = None
    config.r *= 2
    config.lora_alpha = config.lora_alpha * math.sqrt(2) if config.use_rslora else config.lora_alpha * 2
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def _rank_dim(name: str) -> int | None:
    """The dimension of a factor that counts ranks; None for a tensor that is no factor."""
    for part in name.split("."):
        if part in ("lora_A", "lora_embedding_A"):
            return 0
        if part in ("lora_B", "lora_embedding_B"):
            return None if name.endswith(".bias") else 1
    return None
