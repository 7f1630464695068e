"""A tiny model and adapters of it, in memory and in files."""

from __future__ import annotations

import pytest
import torch

import fastpeft


@pytest.fixture
def llama():
    """Makes tiny Llamas, the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**options):
        torch.manual_seed(0)
        options = {"vocab_size": 64, "tie_word_embeddings": False, **options}
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            **options,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def adapter(llama, tmp_path):
    """A saved adapter (rank 4 on q_proj and v_proj), and its directory."""
    torch.manual_seed(5)
    config = fastpeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    fastpeft.get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
