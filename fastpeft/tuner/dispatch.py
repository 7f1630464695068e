"""Which LoRA layer stands for which kind of module."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers import attention, bnb, conv, embedding, experts, linear
from ..layers.base import BaseTunerLayer
from .walk import conv1d_class

if TYPE_CHECKING:
    from ..configs import LoraConfig

SUPPORTED = (
    "`torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`, "
    "`transformers.pytorch_utils.Conv1D`, `torch.nn.MultiheadAttention.`"
)

_BY_TYPE: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Embedding, embedding.Embedding),
    (nn.Conv2d, conv.Conv2d),
    (nn.Conv3d, conv.Conv3d),
    (nn.Conv1d, conv.Conv1d),
    (nn.MultiheadAttention, attention.MultiheadAttention),
)


def create_lora_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module:
    """The layer that adapts `target`: by the config's custom classes, then by the type of the module.

    Args:
        target: the module, or the tuner layer that stands for it already.
        parameter_name: adapt this parameter of the module and not the module.
        kwargs: rank, alpha and so on, handed to the layer.

    Raises:
        ValueError: there is no LoRA layer for a module of this type.
    """
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for base_cls, custom_cls in (config._custom_modules or {}).items():
        if isinstance(base, base_cls):
            return custom_cls(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)
    if parameter_name is not None:
        return experts.ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    for base_cls, layer_cls in _BY_TYPE:
        if isinstance(base, base_cls):
            return layer_cls(target, adapter_name, config=config, **kwargs)
    quantised = bnb.kind_of(base)
    if quantised is not None:
        layer = bnb.Linear4bit if quantised == "4bit" else bnb.Linear8bitLt
        return layer(target, adapter_name, config=config, **kwargs)
    conv1d = conv1d_class()
    is_conv1d = conv1d is not None and isinstance(base, conv1d)
    if is_conv1d or (isinstance(base, nn.Linear) and not _is_quantised(base)):
        _correct_fan_in_fan_out(config, is_conv1d)
        return linear.Linear(target, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are supported: {SUPPORTED}."
    )


def _is_quantised(base: nn.Linear) -> bool:
    """Does the weight hold something else than numbers (packed bits), so that it must not be read as a matrix?"""
    weight = base.weight
    floating = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return not floating or type(weight).__name__ in ("Params4bit", "Int8Params")


def _correct_fan_in_fan_out(config: LoraConfig, is_conv1d: bool) -> None:
    """The layer's type knows which way its weight is stored; the config's word is corrected, once."""
    if config.fan_in_fan_out != is_conv1d:
        kind = "`Conv1D`" if is_conv1d else "`torch.nn.Linear`"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is {kind}. "
            f"Setting fan_in_fan_out to {is_conv1d}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = is_conv1d
