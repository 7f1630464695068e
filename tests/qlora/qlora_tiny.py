"""A tiny Llama loaded in 4 bits as a user loads one, adapters of either library on it, and the same in float64."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.layers.bnb import is_plain_4bit, read_4bit
from fastpeft.ops.nf4 import dequantize_4bit

LIBRARIES = {"fastpeft": fastpeft, "peft": peft}
IDS = torch.arange(3, 83).view(2, 40) * 7 % 125 + 3  # more elements of input than what the operators compute natively


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,  # rows of whole blocks: else bitsandbytes' own kernel decodes with wrong scales
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        attention_bias=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, bits: int = 4, **options: Any) -> Any:
    """`from_pretrained` with a BitsAndBytesConfig; options without their prefix `bnb_4bit_`."""
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        chosen = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": torch.float32} | options
        config = BitsAndBytesConfig(load_in_4bit=True, **{f"bnb_4bit_{key}": value for key, value in chosen.items()})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(library: Any, base: Any, prepare: bool = True, reentrant: bool = False, **options: Any) -> Any:
    """prepare_model_for_kbit_training and get_peft_model; an adapter whose B is not zero, one for both libraries."""
    if prepare:
        base = library.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False} | options
    return library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM", **settings))


def outcome(model: Any) -> dict[str, Tensor]:
    """Logits and every gradient of one step."""
    model.zero_grad(set_to_none=True)
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach().clone(), **found}


def in_float64(model: Any) -> Any:
    """A copy of peft's model whose 4-bit layers are decoded and whose numbers are float64: the formula itself."""
    exact = copy.deepcopy(model)
    exact.gradient_checkpointing_disable()
    for layer in [m for m in exact.modules() if is_plain_4bit(getattr(m, "base_layer", None))]:
        quantised = layer.base_layer
        layer.base_layer = dense(quantised).double()
        layer.__class__ = peft.tuners.lora.layer.Linear
        layer.fan_in_fan_out = False
    return exact.double()


def dense(quantised: Any) -> nn.Linear:
    """The nn.Linear whose fp32 weight a Linear4bit holds."""
    linear = nn.Linear(quantised.in_features, quantised.out_features, quantised.bias is not None)
    linear.weight.data = dequantize_4bit(read_4bit(quantised), torch.float32)
    if quantised.bias is not None:
        linear.bias.data = quantised.bias.data.float()
    return linear.requires_grad_(False)


def quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    """Called without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)
