"""Merging into 4 bits: exactly, in the weight's own 16 or 32 bits, or quantised again, as PEFT does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_tiny import IDS, LIBRARIES, adapted, load, quietly
from torch import nn
from transformers import AutoModelForCausalLM

import fastpeft
from fastpeft.errors import PeftWarning

KINDS = {"Linear4bit": 4, "Linear8bitLt": 8}


def logits(model: Any) -> torch.Tensor:
    """In training mode, without dropout: in evaluation bitsandbytes' own layers may round their scales."""
    with torch.no_grad():
        return model.train()(input_ids=IDS).logits


def assert_near(a: torch.Tensor, b: torch.Tensor, bound: float) -> None:
    assert (a - b).norm() <= bound * b.norm(), (a - b).norm() / b.norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_16_bits_and_onto_the_disk(folder: Path, tmp_path: Path, dtype: torch.dtype, patched: bool) -> None:
    """The sum is exact up to its own rounding; what is saved is an ordinary model, that loads without bitsandbytes."""
    model = adapted(fastpeft, load(folder, dtype=dtype), prepare=False)
    if patched:
        fastpeft.patch(model)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    exact = (layer.dequantized_weight().double() + layer.get_delta_weight("default").double()).to(dtype)
    adapted_logits = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    down = merged.model.layers[1].mlp.down_proj
    assert type(down) is nn.Linear and down.weight.dtype == dtype
    assert ((down.weight - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()  # at most one unit: a double tie
    assert not getattr(merged, "is_loaded_in_4bit", False)
    assert getattr(merged.config, "quantization_config", None) is None
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert_near(logits(merged), adapted_logits, bound)
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not getattr(plain, "is_quantized", False)
    for name, parameter in merged.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name
    assert_near(logits(plain), logits(merged), bound)  # to the bit only unpatched: norms stay fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_requantised_as_peft_does_with_a_warning(folder: Path, kind: str) -> None:
    models = [adapted(library, load(folder, bits=KINDS[kind]), prepare=False) for library in LIBRARIES.values()]
    with pytest.warns(PeftWarning, match=r"moved it by \d+\.\d% of its norm"):
        ours = models[0].merge_and_unload()
    theirs = quietly(models[1].merge_and_unload)
    for name, theirs_layer in theirs.named_modules():
        if type(theirs_layer).__name__ == kind:
            layer = ours.get_submodule(name)
            assert type(layer) is type(theirs_layer)
            apart = (layer.weight.data != theirs_layer.weight.data).float().mean()
            assert apart <= (0 if KINDS[kind] == 4 else 1e-3), name
    assert_near(logits(ours), logits(theirs), 1e-5 if KINDS[kind] == 4 else 2e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_error_that_is_reported_is_the_error(folder: Path) -> None:
    model = adapted(fastpeft, load(folder), prepare=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    total = layer.dequantized_weight() + layer.get_delta_weight("default")
    with pytest.warns(PeftWarning, match="moved it by") as said:
        layer.merge()
    error = ((layer.dequantized_weight() - total).norm() / total.norm()).item()
    assert f"moved it by {error:.1%} of its norm" in str(said[0].message) and 0.01 < error < 0.2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", LIBRARIES)
def test_merging_and_unmerging_under_a_patch(folder: Path, library: str) -> None:
    ours = fastpeft.patch(adapted(LIBRARIES[library], load(folder)))
    theirs = adapted(LIBRARIES["peft"], load(folder))
    for step in ("merge_adapter", "unmerge_adapter"):  # quantised once, and again
        for model in (ours, theirs):
            getattr(model, step)()
        assert_near(logits(ours), logits(theirs), 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_was_quantised_cannot_be_kept_exactly(folder: Path) -> None:
    model = adapted(fastpeft, load(folder))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.merge_and_unload(dequantize=True)
