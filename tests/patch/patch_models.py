"""Tiny models and what the patch tests compare: outputs and gradients, as they are and patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import fastpeft
from fastpeft.patch.forwards import Forward

LIBRARIES = {"peft": peft, "fastpeft": fastpeft}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = (2, 40)  # more elements of input than what the operators compute natively


def llama(**changes: Any) -> nn.Module:
    config = {"vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0} | changes
    return transformers.LlamaForCausalLM(LlamaConfig(**(SIZES | config)))


def gpt2() -> nn.Module:
    sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=128, bos_token_id=1, eos_token_id=1))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(BertConfig(**SIZES, vocab_size=128))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, vocab_size=128, max_position_embeddings=64))


def t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    config = T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(ViTConfig(**SIZES, num_labels=4, image_size=56, patch_size=8))


MODELS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (llama, gpt2, bert, neox, t5, vit)}

# The members of each model's groups by their last name, and how many such groups there are.
GROUPS = {
    "llama": {("q_proj", "k_proj", "v_proj"): 2, ("gate_proj", "up_proj"): 2},
    "gpt2": {},
    "bert": {("query", "key", "value"): 2},
    "neox": {},
    "t5": {("q", "k", "v"): 4, ("k", "v"): 2, ("wi_0", "wi_1"): 4},
    "vit": {("q_proj", "k_proj", "v_proj"): 2},
}


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """A batch with labels for the model, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(base.parameters()).device
    if base.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.randn(2, 3, 56, 56, generator=generator), "labels": torch.tensor([1, 3])}
    else:
        ids = torch.randint(3, 128, TOKENS, generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def lora(model: nn.Module, library: str = "peft", **options: Any) -> Any:
    """The model with a LoRA adapter whose B is not zero."""
    module = LIBRARIES[library]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False} | options
    return module.get_peft_model(model, module.LoraConfig(**settings))


def lora_llama(library: str = "peft", **options: Any) -> Any:
    torch.manual_seed(0)
    return lora(llama(), library, **options)


def run(model: nn.Module, seed: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and every gradient, of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**inputs_of(model))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().clone(), gradients


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Logits and every gradient agree, relative to their size."""
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, a, b in [("logits", ours[0], theirs[0]), *((n, ours[1][n], g) for n, g in theirs[1].items())]:
        error = ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


def groups_of(model: nn.Module) -> dict[tuple[str, ...], int]:
    """Member names of each patched group of several layers to how often there is such a group."""
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    found: dict[tuple[str, ...], int] = {}
    for group in all_groups(model):
        if len(group.members) > 1:
            key = tuple(names[member.module] for member in group.members)
            found[key] = found.get(key, 0) + 1
    return found


def all_groups(model: nn.Module) -> list[Any]:
    """Every group of a patched model."""
    groups = [getattr(m.__dict__.get("forward"), "group", None) for m in model.modules()]
    return list(dict.fromkeys(group for group in groups if group is not None))


def traces(model: nn.Module) -> list[str]:
    """What patch has left on a model: nothing, after unpatch."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, Forward) or key.startswith("_fastpeft")
    ]
