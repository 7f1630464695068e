"""What a patched DoRA layer keeps for its backward beyond a LoRA layer: the outputs of o and down, and vectors."""

from __future__ import annotations

import pytest
import torch
from floors_layer import HEADS, HIDDEN, INTERMEDIATE, KV, RANK, TOKENS, measure

from fastpeft.ops.backend import OPS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

OUTPUTS = 2 * HIDDEN + 2 * KV + 2 * INTERMEDIATE + HIDDEN


@pytest.mark.parametrize("library", ["peft", "fastpeft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(library: str, dtype: torch.dtype) -> None:
    """q and k are kept after RoPE only, which rotates them back."""
    lora, dora = measure(library, 0.0, dtype).saved, measure(library, 0.0, dtype, use_dora=True).saved
    theirs = measure("peft", 0.0, dtype, patched=False, use_dora=True).saved
    outputs = dtype.itemsize * 2 * HIDDEN  # of o and down
    vectors = 2 * 4 * OUTPUTS / TOKENS  # g - 1 and the norm of each output, whatever the number of tokens
    print(f"{library}, {dtype}: {dora:.1f} bytes a token, LoRA {lora:.1f}, PEFT's DoRA {theirs:.1f}")
    assert dora <= lora + outputs + vectors
    assert dora < 0.4 * theirs


def test_dropout_keeps_one_more_tensor_an_output() -> None:
    plain, dropped = measure("peft", 0.0, use_dora=True).saved, measure("peft", 0.05, use_dora=True).saved
    assert dropped - plain <= 4 * OUTPUTS - 4 * 2 * HIDDEN + 7 * 8 / TOKENS
    assert dropped < 0.7 * measure("peft", 0.05, patched=False, use_dora=True).saved


def test_a_layer_of_llama_3_8b() -> None:
    """An eighth of the width measured, at the full width: at most 113,000 bytes a token; PEFT's keeps 358,728."""
    hidden, intermediate, heads, kv = 4096, 14336, 32, 1024
    lora = 2 * (2 * hidden + 4) + 2 * (2 * hidden + 2 * kv) + 4 * heads + 4 * intermediate + 2 * 7 * RANK
    assert lora + 2 * 2 * hidden == 110_952
    patched = measure("peft", 0.0, torch.bfloat16, use_dora=True).saved
    # The log-sum-exp, two rstd and s do not grow with the width; the vectors are a few rows' worth of any batch.
    fixed, vectors = 4 * HEADS + 8 + 2 * 7 * RANK, 2 * 4 * OUTPUTS / TOKENS
    assert 8 * (patched - vectors - fixed) + fixed <= 113_000


def test_products_of_a_layer() -> None:
    """One base product a projection forward and backward; the norms take one narrow product over each weight."""
    theirs, ours = measure("peft", patched=False, use_dora=True), measure("peft", use_dora=True)
    assert (ours.products("forward"), ours.products("backward")) == (7, 7)
    assert theirs.products("forward") >= 35
    assert ours.forward[OPS["auto"].weight_norm._schema.name] == 7
