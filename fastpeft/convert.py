"""Any adapter that adds to its weight as a plain LoRA adapter, of any rank: `convert_to_lora`, `save_as_lora`.

The adapter's whole addition is formed and its greatest singular triples are kept (Eckart-Young: the nearest matrix of
that rank), a layer at a time. The scaling is in the factors, so r = lora_alpha.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .configs import LoraConfig
from .layers import BaseTunerLayer, ModulesToSaveWrapper

_PREFIX = "base_model.model."


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the state dict of a LoRA adapter that does as nearly as `rank` allows what this adapter does.

    Args:
        rank: an int: the rank of every layer. A float in (0, 1]: the part of the squared singular values to keep; ranks
            differ from layer to layer then.
        progressbar: show how far it is.
        compile_kwargs: compile the conversion of a layer with these arguments of `torch.compile`.

    Raises:
        TypeError: a layer cannot be converted (DoRA scales its weight, it does not add to it), or there is none.
        ValueError: a rank out of range, or an adapter that trains biases.
    """
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"convert_to_lora: a rank that is a float is a threshold in (0, 1], got {rank}")
    if rank == 0:
        raise ValueError("convert_to_lora: a rank of 0 doesn't make sense, please pass a valid value.")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    unfit = {repr(type(layer)) for _, layer in layers if not layer.supports_lora_conversion(adapter_name)}
    if unfit:
        raise TypeError(f"Some module types on this model do not support LoRA conversion: {', '.join(sorted(unfit))}.")
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    old: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if isinstance(old, LoraConfig):
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=2,
        )
    if old is not None and old.bias != "none":
        raise ValueError(f"The adapter's config sets bias={old.bias}, this is not supported right now.")
    config = _config(old, rank)
    factors = torch.compile(_factors, **compile_kwargs) if compile_kwargs is not None else _factors
    state: dict[str, Tensor] = {}
    for name, layer in _shown(layers, progressbar):
        A, B, effective = factors(layer, rank, adapter_name)
        short = name.removeprefix(_PREFIX)
        if effective != rank or isinstance(config.target_modules, str):
            config.rank_pattern[short] = effective  # type: ignore[index]
            config.alpha_pattern[short] = effective  # type: ignore[index]
        else:
            config.target_modules.add(short)  # type: ignore[union-attr]
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = A, B
    if old is not None and getattr(old, "modules_to_save", None):
        config.modules_to_save = copy.copy(old.modules_to_save)
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                for key, parameter in module.modules_to_save[adapter_name].named_parameters():
                    state[f"{name}.{key}"] = parameter.data
    return config, state


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written as an adapter folder that PEFT and vLLM read. Arguments and errors are the same."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_as_lora: {folder} is a file, and must be a folder")
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _config(old: Any, rank: int | float) -> LoraConfig:
    r = rank if isinstance(rank, int) else 1  # with a threshold the patterns say every layer's
    if old is None:
        return LoraConfig(r=r, lora_alpha=r, target_modules=[])
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=copy.copy(old.target_modules),
        base_model_name_or_path=old.base_model_name_or_path,
        layers_pattern=getattr(old, "layers_pattern", None),
        layers_to_transform=getattr(old, "layers_to_transform", None),
    )
    return config


@torch.no_grad()
def _factors(layer: Any, rank: int | float, adapter_name: str) -> tuple[Tensor, Tensor, int]:
    delta = layer.get_delta_weight(adapter_name)
    if delta.dim() != 2:
        raise TypeError(f"{type(layer).__name__}: only linear layers can be converted to LoRA")
    if layer.fan_in_fan_out:
        delta = delta.T
    U, S, Vh = torch.linalg.svd(delta.float(), full_matrices=False)
    effective = rank if isinstance(rank, int) else _enough(S, rank)
    if effective > U.shape[1]:
        raise ValueError(
            f"The chosen rank {effective} is larger than the weight shape ({U.shape[1]}), please choose a lower rank."
        )
    A, B = Vh[:effective], U[:, :effective] * S[:effective]
    return A.to(delta.dtype).contiguous(), B.to(delta.dtype).contiguous(), effective


def _enough(S: Tensor, threshold: float) -> int:
    """How many of the greatest singular values have `threshold` of the sum of squares."""
    sums = S.square().cumsum(0)
    return int(torch.searchsorted(sums, threshold * sums[-1]).item()) + 1


def _shown(layers: list[Any], progressbar: bool) -> Any:
    if not progressbar:
        return layers
    from tqdm import tqdm

    return tqdm(layers, desc="Converting to LoRA")
