"""LoRA+ (arXiv:2402.12354): B learns `loraplus_lr_ratio` times as fast as A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastpeft.layers.base import BaseTunerLayer

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
_NORMS = (nn.LayerNorm,)


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer of class `optimizer_cls` over the trainable parameters, in four groups as PEFT makes them.

    A and whatever else is trained learns with `lr`; B, and vectors (biases, DoRA's magnitudes), with
    `lr * loraplus_lr_ratio`; adapters of embeddings with `loraplus_lr_embedding`. Weight decay
    (`loraplus_weight_decay`) spares biases and norms. In an 8-bit optimizer the embeddings' state stays in 32 bits.

    Args:
        lr: the learning rate of A.
        loraplus_lr_ratio: at least 1; the more, the harder the task.
        kwargs: loraplus_weight_decay (0), loraplus_lr_embedding (1e-6); the rest goes to `optimizer_cls`.
    """
    decay = float(kwargs.pop("loraplus_weight_decay", 0.0))
    lr_embedding = float(kwargs.pop("loraplus_lr_embedding", 1e-6))
    of_norms = {
        f"{name}.{key}" for name, m in model.named_modules() if isinstance(m, _norm_classes()) for key in m._parameters
    }
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = model.get_submodule(".".join(name.split(".")[:-2]))
        if isinstance(owner, BaseTunerLayer) and isinstance(owner.get_base_layer(), nn.Embedding):
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            spared = "bias" in name or name in of_norms
            groups["B without decay" if spared else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    fast = lr * loraplus_lr_ratio
    optimizer: Any = optimizer_cls(
        [
            {"params": groups["A"], "weight_decay": decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": decay, "lr": lr_embedding},
            {"params": groups["B"], "weight_decay": decay, "lr": fast},
            {"params": groups["B without decay"], "weight_decay": 0.0, "lr": fast},
        ],
        lr=lr,  # type: ignore[call-arg]
        **kwargs,
    )
    if optimizer_cls.__name__ in _EIGHT_BIT:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _norm_classes() -> tuple[type[nn.Module], ...]:
    """The classes that Transformers counts as norms, where it is there."""
    try:
        from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    except ImportError:
        return (*_NORMS, torch.nn.RMSNorm)
    return tuple(ALL_LAYERNORM_LAYERS)
