"""Tiny models of every family that fastpeft is compared with PEFT on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2}
MOE: dict[str, Any] = GROUPED | {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """How to make one tiny model, and what is peculiar about adapting it."""

    model_type: str
    config: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    target_modules: Any = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)  # of LoraConfig
    groups: int = 0  # groups of several layers that patch finds in the whole model
    joined: int = 6  # norms and activations that are one operator with the layers they feed

    def make(self) -> nn.Module:
        """The model, in eval mode (no dropout) with parameters that are all random."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        config._attn_implementation = "eager"
        model = getattr(transformers, self.auto).from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and "bias" not in name else 0.0, 0.1)
        return model.eval()

    def batch(self) -> dict[str, Tensor]:
        """Inputs with labels."""
        generator = torch.Generator().manual_seed(1)
        if self.model_type == "vit":
            pixels = torch.randn(2, 3, 56, 56, generator=generator)
            return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
        ids = torch.randint(3, VOCABULARY, (2, 40), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 33:] = 0  # padded on the right
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


FAMILIES = {
    "llama": Family("llama", GROUPED, groups=4),
    "mistral": Family("mistral", GROUPED | {"sliding_window": 16}, groups=4),
    "qwen2": Family("qwen2", GROUPED, groups=4),
    "qwen3": Family("qwen3", GROUPED | {"head_dim": 16}, groups=4),
    "gemma": Family("gemma", GROUPED | {"head_dim": 16}, groups=4),
    "gemma2": Family("gemma2", GROUPED | {"head_dim": 16, "sliding_window": 16}, groups=4),
    "gemma3": Family("gemma3_text", GROUPED | {"head_dim": 16, "sliding_window": 16}, groups=4),
    "phi": Family("phi", COMMON, groups=2, joined=4),
    "phi3": Family("phi3", GROUPED),
    "olmo2": Family("olmo2", GROUPED, groups=4, joined=2),
    "granite": Family("granite", GROUPED | {"attention_multiplier": 0.2}, groups=4),
    "smollm3": Family("smollm3", GROUPED, groups=4),
    "starcoder2": Family("starcoder2", GROUPED, groups=2),
    "stablelm": Family("stablelm", GROUPED, groups=4),
    "cohere": Family("cohere", GROUPED, groups=2, joined=4),
    "glm4": Family("glm4", GROUPED | {"head_dim": 16}, groups=2),
    "gpt_neox": Family("gpt_neox", COMMON),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}),
    "opt": Family("opt", COMMON | {"ffn_dim": 80, "word_embed_proj_dim": 64}, groups=2),
    "falcon": Family("falcon", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": Family("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "gptj": Family(
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": VOCABULARY},
        groups=2,
        joined=4,
    ),
    "mixtral": Family(
        "mixtral",
        MOE | {"num_local_experts": 4},
        options={"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        groups=2,
        joined=2,
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        MOE | {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
        options={"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        groups=2,
        joined=2,
    ),
    "bert": Family("bert", COMMON, "AutoModelForMaskedLM", groups=2),
    "roberta": Family("roberta", COMMON, "AutoModelForMaskedLM", groups=2),
    "t5": Family(
        "t5",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
        groups=6,
        joined=10,
    ),
    "vit": Family(
        "vit",
        {
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 8,
            "num_labels": 3,
        },
        "AutoModelForImageClassification",
        groups=2,
    ),
}
