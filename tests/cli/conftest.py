"""A tokenizer and a Llama small enough to train in seconds, and the command line run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tiny import make_tokenizer, rows, write_rows


@pytest.fixture(autouse=True)
def _small(one_thread: None) -> None:
    """These models gain nothing from threads."""


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return write_llama(tmp_path_factory.mktemp("tiny-model"), tokenizer, 32)


@pytest.fixture(scope="session")
def tiny_model_of_blocks(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Rows of whole blocks of 64: others bitsandbytes' own kernel for CPUs decodes with wrong scales."""
    return write_llama(tmp_path_factory.mktemp("tiny-model-of-blocks"), tokenizer, 64)


def write_llama(folder: Path, tokenizer: Any, width: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", rows())
