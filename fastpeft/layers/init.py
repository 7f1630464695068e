"""How the factors of a new adapter start: PyTorch's own draws, then the method of `init_lora_weights`.

The random numbers are PEFT's, draw for draw: it builds A and B as `nn.Linear`s (which fill themselves) and fills them
again, so that the same seed gives the same tensors, and leaves the generator in the same state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpeft.configs.lora import check_init_method

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig
    from fastpeft.layers.lora import LoraLayer

# `init_lora_weights` in lower case, up to "_niter_" -> function(layer, adapter_name, config); not True and False.
INIT_METHODS: dict[str, Callable[[LoraLayer, str, LoraConfig | None], None]] = {}


def initialise(layer: LoraLayer, adapter_name: str, method: Any, config: LoraConfig | None = None) -> None:
    """Fill A and B by `method`, a value of `init_lora_weights`. False leaves them as they were made, both random.

    Raises `UnsupportedOptionError` or `ValueError` for a method that is not implemented or not known.
    """
    if not method:
        return
    if method is True:
        layer._reset_factors(adapter_name, kaiming_uniform_)
        return
    check_init_method(method)
    INIT_METHODS[method.lower().split("_niter_")[0]](layer, adapter_name, config)


def _gaussian(layer: LoraLayer, adapter_name: str, config: LoraConfig | None) -> None:
    std = 1 / layer.r[adapter_name]
    layer._reset_factors(adapter_name, lambda weight: weight.data.normal_(0.0, std))


INIT_METHODS["gaussian"] = _gaussian


def kaiming_uniform_(weight: Tensor) -> None:
    """`nn.init.kaiming_uniform_(weight, a=sqrt(5))`, with which PyTorch starts linear and convolution layers.

    Uniform within sqrt(3) * gain / sqrt(fan_in) for gain = sqrt(2 / (1 + a²)) (He et al., 2015), in that order of
    operations: the bound must be the same float.
    """
    bound = math.sqrt(3.0) * (_GAIN / math.sqrt(weight.numel() // weight.shape[0]))
    weight.data.uniform_(-bound, bound)


_GAIN = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))


def make_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """`nn.Linear(in_features, out_features, bias)`, the same random numbers included, at a third of its price."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    weight = torch.empty(out_features, in_features)
    kaiming_uniform_(weight)
    linear.register_parameter("weight", nn.Parameter(weight))
    if bias:
        bound = 1 / math.sqrt(in_features) if in_features > 0 else 0
        linear.register_parameter("bias", nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)))
    else:
        linear.register_parameter("bias", None)
    return linear
