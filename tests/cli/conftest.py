"""A tokenizer and a Llama small enough to train in seconds, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tiny import make_tokenizer, rows, write_rows
from typer.testing import CliRunner, Result


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses much where other processes compete for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def fastpeft_command() -> Callable[..., Result]:
    """`fastpeft_command("finetune", "--out", …)`: the command in this process; an unexpected exception is raised."""
    from fastpeft.cli.app import app

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run
