"""DoRA over 4-bit weights: models, patched, next to PEFT + bitsandbytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from masks import exchanged_masks
from qlora_tiny import IDS, LIBRARIES, adapted, in_float64, load, outcome
from test_qlora_patch import LINEAR, assert_no_worse, places, rows_of

import fastpeft
from fastpeft.layers.dora import DoraCaching

pytestmark = pytest.mark.filterwarnings("ignore")

BF16 = torch.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "nf4 nested": {},
    "fp4": {"quant_type": "fp4", "use_double_quant": False},
    "nf4 in bf16": {"compute_dtype": BF16},
    "kept as bf16": {"quant_storage": BF16, "dtype": BF16, "compute_dtype": BF16},
}


def dora(library: Any, base: Any, p: float = 0.0) -> Any:
    """With magnitudes that have moved."""
    model = adapted(library, base, use_dora=True, lora_dropout=p)
    model.gradient_checkpointing_disable()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) * 0.6 + 0.7
    return model.train()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_peft_with_bitsandbytes(folder: Path, case: str, p: float) -> None:
    theirs = dora(peft, load(folder, **CASES[case]), p)
    exact = in_float64(theirs)
    for name, library in LIBRARIES.items():
        ours = fastpeft.patch(dora(library, load(folder, **CASES[case]), p))
        rows = rows_of(ours)
        assert [rows[key].fused.partition(" ")[0] for key in LINEAR] == [
            *["dora_linear_group"] * 3, "dora_linear", *["dora_linear_group"] * 2, "dora_linear"
        ], name  # fmt: skip
        where = places(ours)
        with exchanged_masks(theirs, exact, member=lambda name: where.get(name, 0)):  # noqa: B023
            found = outcome(ours)
            assert any("magnitude" in key for key in found)
            assert_no_worse(found, outcome(theirs), outcome(exact))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_fresh_adapter_is_nothing(folder: Path, library: str) -> None:
    base = load(folder).train()
    with torch.no_grad():
        wanted = base(input_ids=IDS).logits
        model = adapted(LIBRARIES[library], base, use_dora=True, init_lora_weights=True)
        fastpeft.patch(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_under_autocast(folder: Path) -> None:
    ours, theirs = fastpeft.patch(dora(peft, load(folder))), dora(peft, load(folder))
    with torch.autocast("cpu", BF16):
        a, b = outcome(ours), outcome(theirs)
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert a[name].dtype == value.dtype and (a[name] - value).norm() <= 0.1 * value.norm(), name


def test_kept_norms_in_evaluation(folder: Path) -> None:
    model = dora(fastpeft, load(folder)).eval()
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        with DoraCaching():
            for _ in range(2):
                torch.testing.assert_close(model(input_ids=IDS).logits, wanted)
    copied = copy.deepcopy(fastpeft.patch(model))
    with torch.no_grad():
        torch.testing.assert_close(copied(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
