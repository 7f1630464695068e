"""A tiny Llama in a folder. Its tensors are so small that a second thread only waits for the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from qlora_tiny import write_model

pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as `save_pretrained` writes it, not quantised."""
    return write_model(tmp_path_factory.mktemp("tiny-llama"))
