"""The differentiable operators: one file each, with reference, schema, gradient and public function.

Importing this package defines `torch.ops.fastpeft.*` and, where the extension `fastpeft._C` was built, loads its CPU
kernels. It imports neither triton nor transformers nor peft.
"""

from __future__ import annotations

from .attention import attention
from .backend import initialise
from .dora_linear import dora_linear, dora_linear_group
from .glu import glu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .lora_embedding import lora_embedding
from .lora_linear import lora_linear
from .lora_linear_group import lora_linear_group
from .nf4 import dequantize_4bit, quantize_4bit
from .nf4_linear import nf4_linear
from .rms_norm import rms_norm
from .rope import rope

__all__ = [
    "attention",
    "dequantize_4bit",
    "dora_linear",
    "dora_linear_group",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "nf4_linear",
    "quantize_4bit",
    "rms_norm",
    "rope",
]

initialise()
