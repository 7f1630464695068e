"""Small models of every kind that adapters are put into."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Mlp(nn.Module):
    """Linear layers with biases, and one output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.relu(self.lin0(x)))


class Mixed(nn.Module):
    """Embedding, Conv2d and Linear; takes token ids (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.lin = nn.Linear(4 * 8 * 8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.conv(self.emb(ids)[:, None]).flatten(1))


class Deep(nn.Module):
    """Blocks in a ModuleList, as in a transformer."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(blocks))


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture
def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


@pytest.fixture
def deep() -> Deep:
    torch.manual_seed(0)
    return Deep()


@pytest.fixture
def llama():
    """Makes tiny Llamas, the same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 2, cls: type = LlamaForCausalLM, **options):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            pad_token_id=0,
            **options,
        )
        return cls(config).eval()

    return make
