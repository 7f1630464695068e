"""A tiny input for a model whose input is known only through its config and the signature of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 5


class NoInput(Exception):
    """No input could be made; the message says what is unknown."""


def example_call(model: nn.Module, example_inputs: Any = None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The module to run once, its arguments and its keyword arguments.

    example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments for `model` itself. Without it the
    first Transformers model inside `model` is run on a synthesised input. Raises NoInput if there is none to be made.
    """
    if example_inputs is not None:
        if isinstance(example_inputs, Tensor):
            return model, (example_inputs,), {}
        if isinstance(example_inputs, tuple | list):
            return model, tuple(example_inputs), {}
        return model, (), dict(example_inputs)
    for module in model.modules():
        if isinstance(getattr(type(module), "main_input_name", None), str) and hasattr(module, "config"):
            return module, (), synthesise(module)
    raise NoInput(f"{type(model).__name__} is not a Transformers model, so its input is unknown")


def synthesise(model: Any) -> dict[str, Any]:
    """Keyword arguments for one small forward of a Transformers model."""
    accepted = inspect.signature(model.forward).parameters
    name = model.main_input_name
    maker = _MAKERS.get(name)
    if maker is None:
        raise NoInput(f"do not know how to make the model's main input {name!r}")
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if not floats:
        raise NoInput("the model has no parameters")
    device, dtype = floats[0].device, floats[0].dtype
    if not dtype.itemsize > 1:
        dtype = torch.float32
    inputs: dict[str, Any] = {name: maker(model.config).to(device)}
    if name == "input_ids" and "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs[name])
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _input_ids(model.config)[:, :3].to(device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _input_ids(config: Any) -> Tensor:
    size = getattr(_text_config(config), "vocab_size", None)
    if not isinstance(size, int):
        raise NoInput("the config has no vocab_size")
    special = {getattr(_text_config(config), f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    ids = [i for i in range(min(size, 64)) if i not in special] or [0]
    return torch.tensor(ids).repeat(BATCH * LENGTH)[: BATCH * LENGTH].view(BATCH, LENGTH)


def _pixel_values(config: Any) -> Tensor:
    config = getattr(config, "vision_config", config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        raise NoInput("the config has no image_size")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return _noise(1, channels, height, width)


def _input_features(config: Any) -> Tensor:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        raise NoInput("the config has no num_mel_bins or no max_source_positions")
    return _noise(1, bins, 2 * positions)


def _input_values(config: Any) -> Tensor:
    return _noise(1, 4000)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
}
