"""LoftQ (arXiv:2310.08659) on a model that is quantised already: adapters that make up for what quantising has lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastpeft.layers.loftq import residual_factors

_PREFIX = "base_model.model."


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Make A and B of every LoRA layer over a 4-bit layer the r greatest singular triples of W - dequantised W.

    The unquantised weights are read from safetensors, one at a time.

    Args:
        peft_model: a PeftModel, of fastpeft or peft, over a model quantised by bitsandbytes.
        model_path: the folder with `model.safetensors` (or its shards), or that file; None: where the model was loaded
            from.
        callback: called with model and name after each layer; where it returns False the layer is put back.

    Raises:
        ValueError: there is no 4-bit layer with this adapter, no bitsandbytes, or no path is known.
        FileNotFoundError: no safetensors file is there.
        KeyError: a weight is not in it.
    """
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise ValueError("bitsandbytes must be installed and the model must be quantized in 4bits.") from error
    layers = [(name, m) for name, m in peft_model.named_modules() if _is_quantised_lora(m, adapter_name)]
    if not layers:
        raise ValueError(f"No bnb LoRA module with an adapter {adapter_name!r} found on the model")
    weights = _Weights(peft_model, model_path)
    for name, layer in layers:
        if not name.startswith(_PREFIX):
            raise TypeError("The passed model does not appear to be a valid PeftModel")
        quantised = layer.get_base_layer().weight
        weight = weights[f"{name.removeprefix(_PREFIX)}.weight"].to(quantised.device, torch.float32)
        decoded = bnb.dequantize_4bit(quantised.data, quantised.quant_state).float().view(weight.shape)
        new = residual_factors(weight, decoded, layer.r[adapter_name])
        factors = (layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight)
        before = [parameter.data for parameter in factors]
        for parameter, value in zip(factors, new):
            parameter.data = value.to(parameter.dtype).contiguous()
        if callback is not None and not callback(peft_model, name.removeprefix(_PREFIX)):
            for parameter, value in zip(factors, before):
                parameter.data = value


def _is_quantised_lora(module: Any, adapter_name: str) -> bool:
    if "base_layer" not in module._modules or adapter_name not in getattr(module, "lora_A", ()):
        return False
    return type(getattr(module.get_base_layer(), "weight", None)).__name__ == "Params4bit"


class _Weights:
    """The tensors of a model's safetensors files by name, read when asked for."""

    def __init__(self, model: Any, path: str | None) -> None:
        if path is None:
            path = getattr(getattr(model.get_base_model(), "config", None), "_name_or_path", None)
        if not path:
            raise ValueError("The model does not say where it was loaded from: pass model_path=, a safetensors file.")
        file = Path(path)
        file = file if file.suffix == ".safetensors" else file / "model.safetensors"
        index = file.with_name(f"{file.name}.index.json")
        self._file = file
        self._shards: dict[str, str] | None = None
        if not file.exists():
            if not index.exists():
                raise FileNotFoundError(f"Could not find {file}, nor {index.name} beside it.")
            self._shards = json.loads(index.read_text())["weight_map"]
        self._prefix = f"{getattr(model.get_base_model(), 'base_model_prefix', '')}."

    def __getitem__(self, name: str) -> Tensor:
        for key in (name, name.removeprefix(self._prefix)):  # a file may leave out the name of the inner model
            file = self._file if self._shards is None else self._file.with_name(self._shards.get(key, ""))
            if file.is_dir():
                continue
            with safe_open(file, framework="pt", device="cpu") as tensors:
                if key in tensors.keys():  # noqa: SIM118 (it has no __contains__)
                    return tensors.get_tensor(key)
        raise KeyError(f"{name} is not among the weights of {self._file}")
