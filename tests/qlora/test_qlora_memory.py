"""A training step over 4-bit weights holds no decoded weight: at no moment, and no scratch above 4 MiB."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_tiny import LIBRARIES, adapted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.ops.decisions import MAX_PANEL_BYTES

WIDE, NARROW = 4096, 1024  # decoded, a weight is 16 MiB in fp32; the activations of 160 tokens are at most 2.5
IDS = torch.arange(160).view(2, 80) % 64


class LargestStorage(TorchDispatchMode):
    """`bytes` of the largest storage that an operator returned within, and which operator it was."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage() for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        for storage in made:
            if storage._cdata not in given and storage.nbytes() > self.bytes:
                self.bytes, self.operator = storage.nbytes(), str(func)
        return outputs


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        hidden_size=NARROW,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.02,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_no_decoded_weight_is_ever_held(library: str, options: dict[str, Any], wide: Any) -> None:
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=quantised, dtype=torch.float32)
    model = fastpeft.patch(adapted(LIBRARIES[library], base, **options)).train()
    with LargestStorage() as largest:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert 0 < largest.bytes <= MAX_PANEL_BYTES, largest.operator
