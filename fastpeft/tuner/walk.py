"""Walking a model past its adapters.

A LoRA layer is ten modules (dictionaries, projections, dropouts, per adapter), so `named_modules()` of an adapted model
takes milliseconds and grows with every adapter. These walks see a LoRA layer as one module and go on below only into
what it wraps. They are cheap enough (0.2 ms for 30 decoder layers) that no index of layers has to be kept, and so none
can go stale when the user changes the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper


def named_modules(root: nn.Module, *, into_adapters: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`root.named_modules()`, same names and order, without the inside of adapters.

    Of a tuner layer only `base_layer` is entered (`into_adapters=True`), or nothing (`False`). The tree is read as the
    walk goes; collect the result first if it is going to be changed.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", root)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = module._modules
        if not children:
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            base = children.get("base_layer")
            if into_adapters and base is not None:
                stack.append((f"{prefix}base_layer", base))
            continue
        stack.extend((f"{prefix}{key}", child) for key, child in reversed(children.items()) if child is not None)


def adapter_layers(root: nn.Module) -> Iterator[Any]:
    """Every tuner layer and every wrapper of a `modules_to_save` module, nested ones too."""
    seen: set[int] = set()
    stack: list[nn.Module] = [root]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        if isinstance(module, BaseTunerLayer):
            yield module
            base = children.get("base_layer")
            if base is not None:
                stack.append(base)
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield module
        if children:
            stack.extend(child for child in reversed(children.values()) if child is not None)


def tuner_layers(root: nn.Module, layer_cls: type = BaseTunerLayer) -> Iterator[Any]:
    """Every tuner layer of a class."""
    return (layer for layer in adapter_layers(root) if isinstance(layer, layer_cls))


def wrappers(root: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """Every wrapper of a `modules_to_save` module."""
    return (layer for layer in adapter_layers(root) if isinstance(layer, AuxiliaryTrainingWrapper))


def adapter_parameters(layer: BaseTunerLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """(adapter name, parameter) of a tuner layer."""
    for container_name in layer.adapter_layer_names:
        container = layer._modules.get(container_name)
        if isinstance(container, nn.ModuleDict):
            for adapter_name, module in container._modules.items():
                if module is None:
                    continue
                for parameter in module.parameters() if module._modules else module._parameters.values():
                    if parameter is not None:
                        yield adapter_name, parameter
        elif isinstance(container, nn.ParameterDict):
            yield from container._parameters.items()  # type: ignore[misc]


def submodule_and_parent(root: nn.Module, key: str) -> tuple[nn.Module, Any, str]:
    """(parent, module, name in the parent) of the module named `key`."""
    parent_key, _, name = key.rpartition(".")
    return root.get_submodule(parent_key), root.get_submodule(key), name


def is_transformers_model(model: object) -> bool:
    """Is this a Transformers model? Does not import transformers: without it there cannot be one."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def conv1d_class() -> type[nn.Module] | None:
    """Transformers' `Conv1D`, or None while nothing has imported it (then no model contains one)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def infer_device() -> str:
    """The type of the accelerator, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
