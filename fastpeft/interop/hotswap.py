"""Another adapter's weights in the place of a loaded adapter's, so that a compiled model need not be compiled again.

Nothing is added to or removed from the model: tensors are filled in place, an adapter of lower rank with zeros behind.
So for a compiled model the first adapter is padded to the highest rank to come, and scalings become tensors, before it
is compiled: `prepare_model_for_compiled_hotswap`. Served as `peft.utils.hotswap` for Transformers and diffusers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..configs import LoraConfig, PeftConfig, PeftType
from ..layers import BaseTunerLayer, LoraLayer
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..storage import load_peft_weights
from ..tuner.targets import pattern_value

# What changes the result beside the weights, the rank and alpha.
_SAME_IN_BOTH = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
# The rank's dimension, for each weight that has one.
_RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Whether an adapter of `config1` can take the place of one of `config0`.

    Raises:
        ValueError: one is not LoRA, or an option differs that changes the result beside weights, rank and alpha.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {_method(config0)} and {_method(config1)}")
    if config0.peft_type != PeftType.LORA:
        raise ValueError(f"Hotswapping only supports LORA but {_method(config0)} was passed.")
    for name in _SAME_IN_BOTH:
        old, new = getattr(config0, name), getattr(config1, name)
        if old != new:
            raise ValueError(f"Configs are incompatible: for {name}, {old} != {new}")


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make later swaps free of recompilation; call it with the first adapter loaded, before the model is compiled.

    Args:
        model: the model with the adapter.
        target_rank: the highest rank of all adapters to come; the weights are padded to it with zeros.
        config: configs whose rank is to say `target_rank` too.
        check_compiled: what to do if the model is compiled already.

    Raises:
        ValueError: the model is compiled or has no LoRA layer, or an adapter cannot be padded to `target_rank`; nothing
            is changed then.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "result in re-compilation, hurting performance. Call the function before compiling the model.",
                stacklevel=2,
            )
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    padded = [] if target_rank is None else [weight for layer in layers for weight in _padded(layer, target_rank)]
    for parameter, value in padded:
        parameter.data = value
    for layer in layers:
        for name, scaling in layer.scaling.items():
            if not isinstance(scaling, Tensor):
                layer.scaling[name] = torch.tensor(float(scaling), device=_device(layer))
            if target_rank is not None:
                _set_rank(layer, name, target_rank)
    if config is not None and target_rank is not None:
        for each in config.values() if isinstance(config, Mapping) else [config]:
            each.r = target_rank
            each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def hotswap_adapter(
    model: Any, model_name_or_path: str | os.PathLike[str], adapter_name: str, torch_device: Any = None, **kwargs: Any
) -> None:
    """Read an adapter and put its weights in the place of the adapter `adapter_name` of a (compiled) `PeftModel`.

    Args:
        model: the model; its adapter keeps its name and its config.
        model_name_or_path: directory or hub id of the new adapter.
        adapter_name: which adapter is replaced.
        torch_device: where the new tensors are read to.
        kwargs: of the download (`subfolder`, `revision`, `token`, ...), `key_mapping`, `use_safetensors`.

    Raises:
        ValueError: the configs do not fit each other, or the adapter is merged.
        RuntimeError: the new adapter has weights that the model's has no place for. The model is unchanged then.
    """
    not_for_config = ("key_mapping", "use_safetensors")
    config = PeftConfig.from_pretrained(
        model_name_or_path, **{name: value for name, value in kwargs.items() if name not in not_for_config}
    )
    check_hotswap_configs_compatible(model.peft_config[adapter_name], config)
    weights = load_peft_weights(model_name_or_path, device=torch_device, **kwargs)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    state = {_with_adapter_name(key, adapter_name, prefix): tensor for key, tensor in weights.items()}
    hotswap_adapter_from_state_dict(model, state, adapter_name, config, parameter_prefix=prefix)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put these weights in the place of the adapter's; what they do not adapt is not adapted any more.

    Args:
        model: the model, wrapped or not, compiled or not.
        state_dict: the new weights under the model's own names (`….lora_A.default.weight`).
        adapter_name: which adapter is replaced.
        config: the new adapter's config: its rank and alpha.
        parameter_prefix: what the names of the adapter's weights start with.

    Raises:
        ValueError: the adapter is merged into the base weights.
        RuntimeError: a key that the model does not have, or a shape that does not fit. The model is unchanged then.
    """
    model = getattr(model, "_orig_mod", model)
    layers: dict[str, Any] = {n: module for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} while it is merged into the base weights: unmerge it first."
        )
    held = {
        f"{name}.{key}": (name, layer, key, parameter)
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if key.startswith(parameter_prefix) and adapter_name in key.split(".")
    }
    unknown = sorted(state_dict.keys() - held.keys())
    if unknown:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unknown)}.")
    changes = []
    for path, (_, layer, key, parameter) in held.items():
        tensor = state_dict.get(path)
        if tensor is not None:
            value = _fitted(layer, path, key, parameter, tensor)
        elif key.split(".")[0] in _RANK_DIM:
            value = torch.zeros_like(parameter)
        else:
            raise RuntimeError(f"Hot swapping the adapter did not succeed: the new adapter has no {path}.")
        changes.append((parameter, value))

    for parameter, value in changes:
        if parameter.shape == value.shape:
            parameter.data.copy_(value)  # in place, for compiled code holds on to the memory
        else:
            parameter.data = value
    for path in state_dict:
        name, layer, _, _ = held[path]
        rank = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if isinstance(layer.scaling[adapter_name], Tensor):
            layer.scaling[adapter_name].fill_(scaling)
        else:
            layer.scaling[adapter_name] = scaling
        if adapter_name in getattr(layer, "lora_A", {}):
            _set_rank(layer, adapter_name, layer.lora_A[adapter_name].weight.shape[0])


def _method(config: PeftConfig) -> str:
    return PeftType(config.peft_type).value


def _with_adapter_name(key: str, adapter_name: str, prefix: str) -> str:
    """`a.lora_A.weight` → `a.lora_A.default.weight`, `a.lora_embedding_A` → `a.lora_embedding_A.default`."""
    parts = key.split(".")
    places = [i for i, part in enumerate(parts) if part.startswith(prefix)]
    if not places:
        return key
    parts.insert(places[-1] + 1, adapter_name)
    if parts[places[-1]] == "lora_magnitude_vector":  # DoRA's: a tensor in files, a module in the model
        parts.append("weight")
    return ".".join(parts)


def _fitted(layer: Any, path: str, key: str, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """The new value of a weight: the tensor as it is, or with zeros up to the rank that the model's weight has."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    dim = _RANK_DIM.get(key.split(".")[0]) if key.endswith("weight") or "embedding" in key else None
    shapes = [list(parameter.shape), list(tensor.shape)]
    if dim is not None and len(shapes[0]) == len(shapes[1]):
        shapes = [[*shape[:dim], *shape[dim + 1 :]] for shape in shapes]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed: {path} has shape {tuple(tensor.shape)}, which does not fit the "
            f"model's {tuple(parameter.shape)}."
        )
    if dim is None or tensor.shape[dim] >= parameter.shape[dim]:
        return tensor
    return _with_zeros(tensor, dim, parameter.shape[dim], _groups(layer) if dim == 0 else 1)


def _padded(layer: Any, rank: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The weights of a layer's adapters, padded to the rank."""
    groups = _groups(layer)
    if rank % groups:
        raise ValueError(
            f"Trying to pad a {type(layer).__name__} LoRA adapter with groups={groups} to target rank {rank}, but the "
            f"target rank is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
        )
    for container in ("lora_A", "lora_B"):
        for factor in getattr(layer, container).values():
            if not isinstance(factor, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                raise ValueError(f"A {type(factor).__name__} as {container} cannot be padded to another rank.")
            dim = _RANK_DIM[container]
            size = rank // (getattr(factor, "groups", 1) if dim == 1 else 1)
            if factor.weight.shape[dim] > size:
                raise ValueError(
                    f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger "
                    f"({factor.weight.shape[dim] * rank // size}). This is not possible."
                )
            yield factor.weight, _with_zeros(factor.weight.detach(), dim, size, groups if dim == 0 else 1)


def _with_zeros(tensor: Tensor, dim: int, size: int, groups: int) -> Tensor:
    """`tensor` with zeros up to `size` along `dim`, behind each of `groups` equal parts of that dimension."""
    shape = list(tensor.shape)
    parts = tensor.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])
    padded = parts.new_zeros(*shape[:dim], groups, size // groups, *shape[dim + 1 :])
    padded.narrow(dim + 1, 0, shape[dim] // groups).copy_(parts)
    return padded.reshape(*shape[:dim], size, *shape[dim + 1 :])


def _set_rank(layer: Any, adapter_name: str, rank: int) -> None:
    """Make what says an adapter's rank say the rank its weights have, padding included."""
    if adapter_name not in layer.r or adapter_name not in getattr(layer, "lora_A", {}):
        return
    layer.r[adapter_name] = rank
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(A, nn.Linear):
        A.out_features = B.in_features = rank
    else:
        A.out_channels = B.in_channels = rank


def _groups(layer: Any) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def _device(layer: Any) -> torch.device:
    return next(iter(layer.get_base_layer().parameters())).device
