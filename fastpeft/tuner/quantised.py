"""A quantised model made an ordinary one again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.bnb import is_plain_4bit, read_4bit
from ..ops.nf4 import dequantize_4bit

# The last: how a file of 4 bits was read, which saving would reverse; without it the model's own conversions hold.
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized", "_weight_conversions")


@torch.no_grad()
def dequantise_rest(model: Any) -> None:
    """Decode the `Linear4bit` layers that no adapter stood on, and let the model forget that it was quantised."""
    for module in [m for m in model.modules() if not is_plain_4bit(m)]:
        for name, child in list(module._modules.items()):
            if child is not None and is_plain_4bit(child):
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
                linear.weight = nn.Parameter(dequantize_4bit(read_4bit(child)), requires_grad=False)
                linear.bias = child.bias
                module._modules[name] = linear
    for mark in _MARKS:
        if mark in model.__dict__:
            delattr(model, mark)
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
