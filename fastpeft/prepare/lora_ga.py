"""LoRA-GA (arXiv:2407.05000): the gradients of the weights at the start, from which the adapter's factors are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.prepare.targets import device_of, is_filled, linear_targets, read_tensors, write_tensors

_FIELD = "_peft_loraga_grad"


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], None],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Leave on each layer that `lora_config` adapts the mean gradient of its weight, for `init_lora_weights="lora_ga"`.

    Args:
        model: the model to adapt, not quantised.
        lora_config: with a `lora_ga_config`.
        train_step: runs forward and backward, once or several times. Only the weights measured get gradients.
        cache_file: written if it is not there, and read instead of running `train_step` if it is.

    Raises `ValueError` if a layer is quantised or got no gradient, or if nothing is to be measured.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    targets = linear_targets(model, lora_config)
    for name, layer in targets.items():
        if hasattr(layer, "quant_state") or not layer.weight.is_floating_point():
            raise ValueError(
                f"LoRA-GA does not support quantized models. Found quantized module: '{name}'. LoRA-GA requires "
                "full-precision gradients during preprocessing."
            )
    if is_filled(cache_file):
        cache = read_tensors(cache_file, device_of(model), [f"{name}.{_FIELD}" for name in targets])  # type: ignore[arg-type]
        for name, layer in targets.items():
            setattr(layer, _FIELD, cache[f"{name}.{_FIELD}"])
        return
    estimate_gradients(model, lora_config, train_step)
    if cache_file is not None:
        write_tensors(cache_file, {f"{name}.{_FIELD}": getattr(layer, _FIELD) for name, layer in targets.items()})


def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None]) -> None:
    """Set `_peft_loraga_grad` on each targeted layer: its weight's gradient over `train_step`, divided by its calls."""
    targets = linear_targets(model, lora_config)
    calls = dict.fromkeys(targets, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(gradient: Any) -> None:
            calls[name] += 1

        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    with _only_trainable(model, [layer.weight for layer in targets.values()]), torch.enable_grad():
        handles = [layer.register_forward_hook(counter(name)) for name, layer in targets.items()]
        try:
            train_step()
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in targets.items():
            gradient, layer.weight.grad = layer.weight.grad, None
            if gradient is None:
                raise ValueError(
                    f"LoRA-GA: train_step gave no gradient to {name}. It must call backward on a loss of it."
                )
            setattr(layer, _FIELD, gradient.detach() / max(calls[name], 1))


@contextmanager
def _only_trainable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.train()
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)
        model.train(training)
