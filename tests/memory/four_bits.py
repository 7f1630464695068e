"""A model's linear layers in NF4, as loading it in 4 bits leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def in_4_bits(model: Any) -> Any:
    """The model with bitsandbytes' layers, nested scales, products in fp32; skips where bitsandbytes is missing."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and "lm_head" not in name:
            options = {"quant_type": "nf4", "compress_statistics": True}
            new = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, compute_dtype=torch.float32, **options
            )
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model
