"""Which layers a measurement is about, and the files measurements are kept in."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.tuner.constants import LORA_TARGET_MODULES
from fastpeft.tuner.lora import LoraModel
from fastpeft.tuner.targets import TargetMatcher, include_all_linear_layers
from fastpeft.tuner.walk import conv1d_class


def linear_targets(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Name → linear layer (or Transformers' `Conv1D`), of those that `config` would adapt.

    Raises `ValueError` if there is none.
    """
    options = copy.copy(config)
    if options.target_modules is None:
        model_type = LoraModel.get_model_config(model).get("model_type")
        defaults = LORA_TARGET_MODULES.get(model_type or "")
        if defaults is None:
            raise ValueError("Please specify `target_modules` in `peft_config`")
        options.target_modules = defaults if isinstance(defaults, str) else set(defaults)
    matches = TargetMatcher(include_all_linear_layers(options, model))
    conv1d = conv1d_class()
    kinds = (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and matches(name)}
    if not found:
        raise ValueError(
            "No supported layers found: only nn.Linear and Conv1D layers can be measured, and target_modules="
            f"{config.target_modules!r} names none of them."
        )
    return found


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    conv1d = conv1d_class()
    return conv1d is not None and isinstance(layer, conv1d)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def is_filled(path: str | os.PathLike[str] | None) -> bool:
    """Whether there is a file that is not empty."""
    return path is not None and os.path.exists(path) and os.path.getsize(path) > 0


def read_tensors(path: str | os.PathLike[str], device: torch.device, names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write_tensors` wrote; `ValueError` if one of `names` is not in it."""
    content = torch.load(path, map_location=device, weights_only=True)
    if missing := [name for name in names if name not in content]:
        raise ValueError(
            f"{os.fspath(path)} has no {missing[0]!r} (and {len(missing) - 1} others): it was made for another model "
            "or other target modules. Remove it to measure again."
        )
    return content


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor]) -> None:
    """Write name → tensor."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save(tensors, path)
