"""One Llama layer, run once: the bytes autograd keeps per token, and the operator calls of forward and backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.measure.saved import SavedActivations

# Llama-3-8B's proportions, an eighth of its width: 32 heads of 16, 8 of them for keys and values.
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, RANK = 512, 1792, 32, 8, 16
KV = HIDDEN * KV_HEADS // HEADS
BATCH, LENGTH = 2, 32
TOKENS = BATCH * LENGTH


class Count(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "fastpeft::gemm", "fastpeft::gemm_")


@dataclass
class Measured:
    """Of one layer: bytes kept per token, and how often each operator ran."""

    saved: float
    forward: Counter[str]
    backward: Counter[str]

    def products(self, which: str) -> int:
        """Products of whole matrices, the vendor's and `gemm`, "forward" or "backward"."""
        calls: Counter[str] = getattr(self, which)
        return sum(calls[name] for name in PRODUCTS)


def lora_layer(
    library: str, p: float, dtype: torch.dtype, patched: bool, use_dora: bool = False, **options: Any
) -> tuple[Any, Any]:
    """(model, its first layer) with adapters on all seven projections."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=64,
        attn_implementation="sdpa",
    )
    module = {"peft": peft, "fastpeft": fastpeft}[library]
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model = module.get_peft_model(
        model,
        module.LoraConfig(
            r=RANK, target_modules="all-linear", lora_dropout=p, init_lora_weights=False, use_dora=use_dora
        ),
    )
    model = model.to(dtype).train()
    if patched:
        fastpeft.patch(model, verify=False, **options)  # what is counted shall not hang on how a kernel rounds
    return model, model.base_model.model.model.layers[0]


def measure(
    library: str, p: float = 0.0, dtype: torch.dtype = torch.float32, patched: bool = True, **options: Any
) -> Measured:
    """Run the layer forward and backward, counted."""
    model, layer = lora_layer(library, p, dtype, patched, **options)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype).requires_grad_()
    rope = model.base_model.model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    with Count() as forward, SavedActivations(model) as saved:
        y = layer(x, position_embeddings=rope)
        kept = saved.bytes - sum(t.untyped_storage().nbytes() for t in rope)  # shared by all layers
    with Count() as backward:
        y.sum().backward()
    return Measured(kept / TOKENS, forward.calls, backward.calls)
