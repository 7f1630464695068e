"""From a config to an adapted model; which classes belong to which method."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .configs import CONFIG_CLASSES, PeftConfig, PeftType, config_class
from .errors import UnsupportedOptionError
from .layers.base import BaseTunerLayer
from .tuner.inject import warn_if_name_in_prefix
from .tuner.lora import LoraModel
from .tuner.walk import adapter_layers

if TYPE_CHECKING:
    from .model import PeftModel
    from .tuner.base import BaseTuner

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = CONFIG_CLASSES
PEFT_TYPE_TO_TUNER_MAPPING: dict[str, type[BaseTuner]] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, str] = {PeftType.LORA: LoraModel.prefix}
#: Methods whose adapters may stand in one model with those of another method: none yet.
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, type[BaseTuner]] = {}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config of the method that `config_dict["peft_type"]` names, from its fields."""
    return config_class(config_dict["peft_type"])(**config_dict)  # type: ignore[return-value]


def tuner_class(config: PeftConfig) -> type[BaseTuner]:
    """The tuner of the config's method.

    Raises:
        UnsupportedOptionError: fastpeft does not implement the method.
    """
    tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[arg-type]
    if tuner_cls is None:
        config_class(str(config.peft_type))
        raise UnsupportedOptionError(f"fastpeft has no tuner for peft_type={config.peft_type!r}.")
    return tuner_cls


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into `model` in place, without wrapping the model; its state dict gets no prefix.

    Args:
        peft_config: the adapter's config.
        model: the model; returned.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the weights on the meta device, to be loaded with `set_peft_model_state_dict`.
        state_dict: adapt the modules that this state dict has weights for; only its keys are used.
    """
    tuner = tuner_class(peft_config)(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    )
    return tuner.model


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt `model`, in place, and wrap it in the `PeftModel` class for the config's task.

    Args:
        model: a Transformers model or any other `nn.Module`.
        peft_config: what to adapt and how.
        adapter_name: the adapter's name, part of its parameters' names.
        mixed: adapters of several methods in one model: not implemented.
        autocast_adapter_dtype: keep adapter weights in float32 if the layer's are in a 16-bit (or 8-bit) float.
        revision: the base model's revision, written into the config.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.

    Raises:
        NoMatchingPeftModuleError: the config names no module of this model; the model is unchanged.
        UnsupportedOptionError: `mixed=True`, or a method that fastpeft does not implement.
    """
    from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from .model import PeftModel

    if mixed:
        raise UnsupportedOptionError(
            "get_peft_model(mixed=True): models with adapters of several methods are not implemented in fastpeft; use "
            "one method, or PEFT."
        )
    tuner_class(peft_config)
    old_name = peft_config.base_model_name_or_path
    new_name = model.__dict__.get("name_or_path") or None  # "" for a model made from a config
    peft_config.base_model_name_or_path = new_name
    if any(isinstance(layer, BaseTunerLayer) for layer in adapter_layers(model)):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if old_name is not None and old_name != new_name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to '{new_name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=2,
            )
        peft_config.revision = revision
    warn_if_name_in_prefix(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type, ""))  # type: ignore[arg-type]
    model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)  # type: ignore[arg-type]
    return model_cls(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
