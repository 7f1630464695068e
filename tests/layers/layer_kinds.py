"""One of each kind of adapter layer, for the tests: how to make its base layer, and an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastpeft.layers as layers
from fastpeft.configs import LoraConfig


class Experts(nn.Module):
    """Three-dimensional (w) and two-dimensional (gate) parameters, used without a layer of their own."""

    def __init__(self, experts: int = 4, out: int = 6, width: int = 5, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.w = nn.Parameter(torch.randn((experts, width, out) if transposed else (experts, out, width)))
        self.gate = nn.Parameter(torch.randn(experts, width))

    def forward(self, x):
        w = self.w if self.is_transposed else self.w.mT
        return torch.einsum("bk,ekn->ben", x, w) * (x @ self.gate.T)[..., None]


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its output, as Gemma's does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 10)


def _tokens() -> torch.Tensor:
    return torch.randint(0, 11, (3, 5))


@dataclass
class Kind:
    """A kind of layer: its class's name, its base layer, an input, and options of the config and of the layer."""

    cls: str
    base: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    mergeable: bool = True

    def make(self, base: nn.Module, module: Any = layers, config_cls: Any = LoraConfig, r: int = 4, **config: Any):
        """The adapter layer around `base`, of fastpeft or (another module and config class) of PEFT."""
        config = config_cls(**{**self.config, **config})
        return getattr(module, self.cls)(base, "default", config=config, r=r, lora_alpha=8, **self.options)


KINDS = {
    "linear": Kind("Linear", lambda: nn.Linear(10, 7), lambda: torch.randn(3, 4, 10)),
    "linear without bias": Kind("Linear", lambda: nn.Linear(10, 7, bias=False), lambda: torch.randn(3, 10)),
    "Conv1D": Kind(
        "Linear",
        _conv1d,
        lambda: torch.randn(3, 4, 10),
        {"fan_in_fan_out": True},
        {"is_target_conv_1d_layer": True},
    ),
    "embedding": Kind("Embedding", lambda: nn.Embedding(11, 6), _tokens),
    "embedding, padding": Kind("Embedding", lambda: nn.Embedding(11, 6, padding_idx=2), _tokens),
    "embedding, max norm": Kind("Embedding", lambda: nn.Embedding(11, 6, max_norm=0.5), _tokens, mergeable=False),
    "embedding, by frequency": Kind("Embedding", lambda: nn.Embedding(11, 6, scale_grad_by_freq=True), _tokens),
    "embedding, scaled": Kind("Embedding", lambda: ScaledEmbedding(11, 6), _tokens),
    "conv1d": Kind("Conv1d", lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": Kind("Conv2d", lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d 1x1": Kind("Conv2d", lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d, groups": Kind(
        "Conv2d", lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 9, 9), mergeable=False
    ),
    "conv3d": Kind("Conv3d", lambda: nn.Conv3d(4, 6, (1, 2, 3)), lambda: torch.randn(2, 4, 5, 5, 5)),
    "attention": Kind(
        "MultiheadAttention", lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: torch.randn(2, 3, 8)
    ),
    "attention without bias": Kind(
        "MultiheadAttention", lambda: nn.MultiheadAttention(8, 2, bias=False), lambda: torch.randn(3, 2, 8)
    ),
    "experts": Kind("ParamWrapper", Experts, lambda: torch.randn(2, 5), {}, {"parameter_name": "w"}),
    "experts, transposed": Kind(
        "ParamWrapper", lambda: Experts(transposed=True), lambda: torch.randn(2, 5), {}, {"parameter_name": "w"}
    ),
    "matrix": Kind("ParamWrapper", Experts, lambda: torch.randn(2, 5), {}, {"parameter_name": "gate"}),
}


def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's output; attention is called with x three times."""
    return layer(x, x, x)[0] if "Attention" in type(layer).__name__ else layer(x)


def randomise(layer: nn.Module, only: str = "lora_") -> None:
    """Give every adapter weight a random value of its own, the same for layers with the same names."""
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            if only in name:
                generator = torch.Generator().manual_seed(len(name) * 7919 + parameter.numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
