"""What adapters a model has, and in which state: for people who debug, and for `print`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from .layers.tokens import TrainableTokensWrapper
from .layers.wrappers import AuxiliaryTrainingWrapper
from .tuner.base import BaseTuner
from .tuner.walk import BaseTunerLayer, is_transformers_model, named_modules

T = TypeVar("T")
Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapter layer.

    Attributes:
        name: of the layer in the model.
        module_type: such as `lora.Linear`.
        enabled: whether the adapters take part in the forward.
        active_adapters: names of the active adapters, whether or not this layer has them.
        merged_adapters: names of those merged into the weight.
        requires_grad: per adapter: True, False, or "irregular" if its parameters differ.
        available_adapters: names of the adapters on this layer, sorted.
        devices: per adapter, the types of device its parameters are on.
        quantization_backend: how the base weight is quantised, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; where the layers disagree it says "irregular".

    Attributes:
        base_model_type: class of the model that was adapted.
        adapter_model_type: class of the tuner, such as `LoraModel`; "None" if adapters were injected without one.
        peft_types: per adapter, its method.
        trainable_params: number of elements that require a gradient.
        total_params: number of elements.
        num_adapter_layers: number of adapter layers.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as
            in `TunerLayerStatus`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def _agreed(values: Iterable[T]) -> T | Irregular:
    """The value that all have, or "irregular"."""
    first, *rest = values
    return first if all(value == first for value in rest) else "irregular"


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _parameters(layer: Any, names: Iterable[str]) -> list[tuple[str, Any]]:
    """(adapter, parameter or buffer) in the containers of these names."""
    found: list[tuple[str, Any]] = []
    for name in names:
        container = getattr(layer, name)
        if isinstance(container, nn.ModuleDict):
            found.extend((adapter, p) for adapter, module in container.items() for p in module.parameters())
        elif isinstance(container, nn.ParameterDict):
            found.extend(container.items())
    return found


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    trained = _parameters(layer, layer.adapter_layer_names)
    kept = _parameters(layer, layer.adapter_layer_names + layer.other_param_names)
    backend = getattr(layer, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad={k: _agreed(v) for k, v in _grouped((k, p.requires_grad) for k, p in trained).items()},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={k: sorted(set(v)) for k, v in _grouped((k, p.device.type) for k, p in kept).items()},
        quantization_backend=getattr(backend, "backend_name", None),
    )


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer of a `PeftModel`, or of a model with adapters injected into it.

    Raises:
        TypeError: a `PeftModel` that has no adapter layers by its kind.
        ValueError: the model has no adapters.
    """
    from .model import PeftModel

    root = model
    if isinstance(model, PeftModel):
        root = model.base_model
        if not isinstance(root, BaseTuner):
            raise TypeError(
                f"get_layer_status() got an invalid PeftModel instance: its base is a {type(root).__name__}."
            )
    status = [
        _layer_status(name, module)
        for name, module in named_modules(root)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not isinstance(module, TrainableTokensWrapper)  # the layer inside of it is the one
    ]
    if not status:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return status


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) elements; a 4-bit weight counts the elements it stands for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)  # DeepSpeed ZeRO-3 keeps the shape elsewhere
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()  # two elements a byte
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapters of a `PeftModel`, or of a model with adapters injected into it.

    Raises:
        TypeError: a `PeftModel` that has no adapter layers by its kind.
        ValueError: the model has no adapters.
    """
    from .model import PeftModel

    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, BaseTuner):
            kind = type(model.base_model).__name__
            raise TypeError(f"get_model_status() got an invalid PeftModel instance: its base is a {kind}.")
        base_type, tuner_type = type(model.get_base_model()).__name__, type(model.base_model).__name__
        methods = {name: str(getattr(c.peft_type, "name", c.peft_type)) for name, c in model.peft_config.items()}
    else:
        base_type = type(model).__name__ if is_transformers_model(model) else "other"
        tuner_type, methods = "None", {}
    layers = get_layer_status(model)
    trainable, total = count_parameters(model)

    merged = {name for layer in layers for name in layer.merged_adapters}
    partly_merged = any(merged & (set(la.available_adapters) - set(la.merged_adapters)) for la in layers)
    requires_grad = _grouped((name, flag) for layer in layers for name, flag in layer.requires_grad.items())
    devices = _grouped((name, device) for layer in layers for name, ds in layer.devices.items() for device in ds)
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=tuner_type,
        peft_types=methods,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_agreed(list(layer.active_adapters) for layer in layers),
        merged_adapters="irregular" if partly_merged else sorted(merged),
        requires_grad={name: _agreed(flags) for name, flags in requires_grad.items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: sorted(set(ds)) for name, ds in devices.items()},
        quantization_backend=_agreed(layer.quantization_backend for layer in layers),
    )
