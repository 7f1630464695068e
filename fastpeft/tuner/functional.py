"""Switching, freezing, deleting and casting adapters in any model that has some, wrapped in a `PeftModel` or not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper
from .trainable import set_wrapper_adapter
from .walk import adapter_layers, tuner_layers, wrappers

# Adapters of these types are trained in float32; the 8-bit floats exist only in some builds of torch.
_UPCAST_NAMES = "float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"  # fmt: skip
UPCAST_DTYPES = frozenset(getattr(torch, name) for name in _UPCAST_NAMES.split() if hasattr(torch, name))


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Make the adapter(s) active, and the only trainable ones unless `inference_mode`. Merged layers are unmerged.

    Raises:
        ValueError: two of the adapters have a copy of the same module (`modules_to_save`); nothing is changed then.
    """
    set_wrapper_adapter(model, adapter_name, inference_mode=inference_mode)
    for layer in tuner_layers(model, layer_cls):
        if layer.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            layer.unmerge()
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make the parameters of the adapter(s) trainable or not, active or not."""
    for layer in adapter_layers(model):
        layer.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)


def check_adapters_not_merged(model: nn.Module, adapter_name: str) -> None:
    """Raise `ValueError` if a layer has the adapter merged into its weight."""
    if any(adapter_name in layer.merged_adapters for layer in tuner_layers(model)):
        raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first.")


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str = "lora_",
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> list[str] | None:
    """Remove an adapter from every layer.

    Returns:
        The adapters that are active now (another one was chosen if the deleted one was), or None without any layer.
    """
    new_active: list[str] | None = None
    for layer in tuner_layers(model, layer_cls):
        layer.delete_adapter(adapter_name)
        if new_active is None:
            new_active = list(layer.active_adapters)
    for wrapper in wrappers(model):
        wrapper.delete_adapter(adapter_name, new_active_adapters=new_active)
    return new_active


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast the adapter's parameters of 16 bits or fewer to float32, in which training is stable."""
    if not autocast_adapter_dtype:
        return
    for layer in tuner_layers(model):
        for key, container in layer._modules.items():
            if key == "base_layer" or not isinstance(container, nn.ModuleDict | nn.ParameterDict):
                continue
            if isinstance(container, nn.ParameterDict):
                tensor = container._parameters.get(adapter_name)
                if tensor is not None and tensor.dtype in UPCAST_DTYPES:
                    container[adapter_name] = tensor.to(torch.float32)
                continue
            entry = container._modules.get(adapter_name)
            owners = () if entry is None else entry.modules() if entry._modules else (entry,)
            for owner in owners:
                for name, parameter in list(owner._parameters.items()):
                    if parameter is not None and parameter.dtype in UPCAST_DTYPES:
                        # a new parameter and no assignment to `.data`, which would not reach a DTensor's local shard
                        cast = nn.Parameter(parameter.data.to(torch.float32), requires_grad=parameter.requires_grad)
                        setattr(owner, name, cast)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Inside the block no adapter takes part in the forward, and the active ones are frozen; afterwards all is as
    before.

    The same as `enable_adapters(False)` and back on each layer, but what was trainable is remembered and not worked out
    again, so that a frozen adapter stays frozen; and adapters that are not active are not touched, so that it takes a
    millisecond or two for hundreds of layers, however many adapters they have.
    """
    layers = list(adapter_layers(model))
    trained = [p for p in _active_parameters(layers) if p.requires_grad and p.is_leaf]
    active = [layer._active_adapter for layer in layers]
    for parameter in trained:
        parameter.requires_grad = False
    for layer in layers:
        if _has_plain_switch(layer):
            layer._disable_adapters = True
        else:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        if list(adapter_layers(model)) != layers or [layer._active_adapter for layer in layers] != active:
            for layer in adapter_layers(model):  # the adapters were changed meanwhile: work it out
                layer.enable_adapters(True)
        else:
            for layer in layers:
                if _has_plain_switch(layer):
                    layer._disable_adapters = False
                else:
                    layer.enable_adapters(True)
                    for parameter in _active_parameters([layer]):
                        if parameter.is_leaf:
                            parameter.requires_grad = False
            for parameter in trained:
                parameter.requires_grad = True


def _has_plain_switch(layer: Any) -> bool:
    return getattr(type(layer), "enable_adapters", None) is BaseTunerLayer.enable_adapters


def _active_parameters(layers: Iterable[Any]) -> list[nn.Parameter]:
    """The parameters of the active adapters of tuner layers, and of the active copies in wrappers."""
    found: list[Any] = []
    for layer in layers:
        containers, names = layer._modules, layer.active_adapters
        for container_name in layer.adapter_layer_names:
            container = containers.get(container_name)
            for name in names if container is not None else ():
                if name in container._modules:
                    module = container._modules[name]
                    found += module.parameters() if module._modules else module._parameters.values()
                elif name in container._parameters:
                    found.append(container._parameters[name])
    return [parameter for parameter in found if parameter is not None]


def freeze_outside_adapters(model: nn.Module) -> None:
    """`requires_grad=False` for every parameter that belongs neither to an adapter nor to a `modules_to_save` copy."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen or isinstance(module, AuxiliaryTrainingWrapper):  # wrappers manage their own copies
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad = False
        children = module._modules
        if isinstance(module, BaseTunerLayer):
            children = {"base_layer": children.get("base_layer")}
        stack.extend(child for child in children.values() if child is not None)
