"""The small helpers that other libraries import from PEFT's deep modules; served by `install_as_peft()`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ..configs import PeftConfig
from ..layers import BaseTunerLayer, LoraLayer


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a local directory or hub id holds an adapter: whether its config can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # the hub client's errors are many, and each means no
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every LoRA layer of `model` while the context lasts.

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: `model` has no LoRA layer.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = {module: dict(module.scaling) for module in model.modules() if isinstance(module, LoraLayer)}
    if not before:
        raise ValueError("rescale_adapter_scale: the model has no LoRA layer (scaling is only supported for those)")
    for layer, scaling in before.items():
        layer.scaling = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Leave the dtype of the adapter layers' inputs alone while the context lasts (hooks of the caller see to it)."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


def no_split_modules(model: nn.Module) -> set[str]:
    """The class names of the blocks that Transformers' models inside `model` want to be kept whole."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """An FSDP policy: each transformer block, and each trainable leaf (the adapters) by itself.

    The blocks' class names are `FSDP_TRANSFORMER_CLS_TO_WRAP` of the environment (comma-separated), by default the
    model's `_no_split_modules`.

    Raises:
        TypeError: the model has no module of such a class.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    default = ",".join(sorted(no_split_modules(model)))
    wanted = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", default).split(",") if name]
    classes = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in wanted if name not in classes]
    if missing:
        raise TypeError(f"fsdp_auto_wrap_policy: the model has no module of class {', '.join(missing)}")

    def trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad and next(module.children(), None) is None

    leaves = functools.partial(lambda_auto_wrap_policy, lambda_fn=trainable_leaf)
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in wanted})
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _installed(package: str) -> Callable[[], bool]:
    """A probe for an importable package, under the name PEFT gives such probes."""

    @functools.cache
    def probe() -> bool:
        return importlib.util.find_spec(package) is not None

    return probe


is_aqlm_available = _installed("aqlm")
is_bnb_available = is_bnb_4bit_available = _installed("bitsandbytes")
is_diffusers_available = _installed("diffusers")
is_eetq_available = _installed("eetq")
is_gptqmodel_available = _installed("gptqmodel")
is_hqq_available = _installed("hqq")
is_inc_available = _installed("neural_compressor")
is_optimum_available = _installed("optimum")
is_te_available = _installed("transformer_engine")
is_torchao_available = _installed("torchao")


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch can use an Intel GPU."""
    return torch.xpu.is_available()


def __getattr__(name: str) -> Any:
    """`is_transformers_ge_v5_1_0` and its like: whether Transformers is at least that version."""
    prefix = "is_transformers_ge_v"
    if not name.startswith(prefix):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    asked = Version(name.removeprefix(prefix).replace("_", ".") + ".dev0")
    return Version(importlib.metadata.version("transformers")) >= asked
