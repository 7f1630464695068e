"""patch over 4-bit layers: what is fused, as exact as PEFT + bitsandbytes, and everything as before afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from masks import exchanged_masks
from qlora_tiny import IDS, LIBRARIES, adapted, in_float64, load, outcome
from torch import Tensor

import fastpeft
from fastpeft.layers.bnb import kind_of

pytestmark = pytest.mark.filterwarnings("ignore")

BF16, FP32 = torch.bfloat16, torch.float32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows_of(model: Any) -> dict[str, Any]:
    """The report's rows of the first layer's projections, by their last name."""
    rows = fastpeft.report(model).rows
    return {row.module.rpartition(".")[2]: row for row in rows if ".layers.0." in row.module and "_proj" in row.module}


def places(model: Any) -> dict[str, int]:
    """The place of each layer in its group."""
    forwards = ((name, m.__dict__.get("forward")) for name, m in model.named_modules())
    return {name: f.index for name, f in forwards if getattr(f, "group", None) is not None and hasattr(f, "index")}


def assert_no_worse(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Logits, A's and B's gradients: each kind errs at most twice as much as PEFT + bitsandbytes, against float64."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for kind in ("logits", "lora_A", "lora_B", "magnitude"):
        names = [name for name in exact if kind in name]
        assert names or kind == "magnitude"
        if not names:
            continue
        mine, other = (
            torch.stack([(found[n].double() - exact[n]).norm() / exact[n].norm() for n in names]).square().mean().sqrt()
            for found in (ours, theirs)
        )
        assert mine <= 2 * other, f"{kind}: {mine:.1e}, PEFT's {other:.1e}"


CASES: dict[str, dict[str, Any]] = {
    "nf4 nested": {},
    "nf4": {"use_double_quant": False},
    "fp4 nested": {"quant_type": "fp4"},
    "fp4 in bf16": {"quant_type": "fp4", "use_double_quant": False, "compute_dtype": BF16},
    "nf4 in bf16": {"compute_dtype": BF16},
    "kept as bf16": {"quant_storage": BF16, "dtype": BF16, "compute_dtype": BF16},
    "kept as fp32": {"quant_storage": FP32},
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_peft_with_bitsandbytes(folder: Path, case: str, p: float) -> None:
    theirs = adapted(peft, load(folder, **CASES[case]), lora_dropout=p)
    theirs.gradient_checkpointing_disable()
    theirs.train()
    exact = in_float64(theirs)
    for name, library in LIBRARIES.items():
        ours = adapted(library, load(folder, **CASES[case]), lora_dropout=p)
        ours.gradient_checkpointing_disable()
        fastpeft.patch(ours.train())
        assert not fastpeft.report(ours).left, name
        assert rows_of(ours)["q_proj"].fused.startswith("lora_linear_group of q_proj, k_proj, v_proj")
        where = places(ours)
        with exchanged_masks(theirs, exact, member=lambda name: where.get(name, 0)):  # noqa: B023
            assert_no_worse(outcome(ours), outcome(theirs), outcome(exact))


def test_a_model_in_bf16_with_adapters_in_fp32(folder: Path) -> None:
    """Without prepare_model_for_kbit_training: hidden states and norms are bf16."""
    options = {"dtype": BF16, "compute_dtype": BF16}
    theirs = adapted(peft, load(folder, **options), prepare=False)
    exact = in_float64(theirs)
    ours = fastpeft.patch(adapted(peft, load(folder, **options), prepare=False))
    assert ours.base_model.model.model.layers[0].input_layernorm.weight.dtype == BF16
    assert all(row.fused for row in rows_of(ours).values())
    assert_no_worse(outcome(ours), outcome(theirs), outcome(exact))


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_fused(folder: Path, library: str) -> None:
    model = fastpeft.patch(adapted(LIBRARIES[library], load(folder)))
    rows = rows_of(model)
    assert tuple(rows) == LINEAR
    assert {row.kind for row in rows.values()} == {f"{library} Linear4bit (nf4, nested scales)"}
    q, k, v, o, gate, up, down = (rows[name].fused for name in LINEAR)
    assert q == k == v == "lora_linear_group of q_proj, k_proj, v_proj, joined to input_layernorm"
    assert gate == up == "lora_linear_group of gate_proj, up_proj, joined to post_attention_layernorm"
    assert (o, down) == ("nf4_linear", "nf4_linear, joined to act_fn")
    assert "weights of 4 bits are decoded one by one" in rows["q_proj"].form
    assert all(row.fused == "rms_norm" for row in fastpeft.report(model).rows if "layernorm" in row.module)


@pytest.mark.parametrize("library", LIBRARIES)
def test_unpatched_to_the_bit(folder: Path, library: str) -> None:
    model = adapted(LIBRARIES[library], load(folder))
    model.gradient_checkpointing_disable()
    before = outcome(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    fastpeft.patch(model)
    outcome(model)
    fastpeft.unpatch(model)
    after = outcome(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert not fastpeft.report(model).fused


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("change", ["switched", "two active", "disabled", "deleted", "merged and unmerged"])
def test_adapters_change_under_the_patch(folder: Path, library: str, change: str) -> None:
    def make() -> Any:
        model = adapted(LIBRARIES[library], load(folder))
        model.gradient_checkpointing_disable()
        torch.manual_seed(9)
        settings = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        model.add_adapter("b", LIBRARIES[library].LoraConfig(**settings))
        return model

    theirs, ours = make(), fastpeft.patch(make())
    for model in (theirs, ours):
        if change == "switched":
            model.set_adapter("b")
        elif change == "two active":
            model.base_model.set_adapter(["default", "b"])
        elif change == "deleted":
            model.delete_adapter("default")
            model.set_adapter("b")
        elif change == "merged and unmerged":
            model.merge_adapter()
            model.unmerge_adapter()
    if change == "disabled":
        with ours.disable_adapter(), theirs.disable_adapter():
            a, b = (model(input_ids=IDS).logits for model in (ours, theirs))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    a, b = outcome(ours), outcome(theirs)
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_trying_a_model_in_evaluation_keeps_its_scales(folder: Path, targets: Any) -> None:
    """On processors with bf16 arithmetic bitsandbytes would repack what runs in evaluation, rounding the scales."""
    model = adapted(peft, load(folder), target_modules=targets).eval()
    layers = [m for m in model.modules() if kind_of(m) == "4bit"]
    repacks = [m.support_avx512bf16_for_cpu for m in layers]
    before = [(m.weight.data.clone(), m.weight.quant_state.absmax.clone()) for m in layers]
    fastpeft.patch(model)
    for m, (packed, absmax) in zip(layers, before):
        assert torch.equal(m.weight.data, packed) and torch.equal(m.weight.quant_state.absmax, absmax)
    alone = [m for m in layers if m not in {layer.base_layer for layer in model.modules() if hasattr(layer, "lora_A")}]
    assert [m.support_avx512bf16_for_cpu for m in alone] == [s for m, s in zip(layers, repacks) if m in alone]
    fastpeft.unpatch(model)
    assert [m.support_avx512bf16_for_cpu for m in layers] == repacks


def test_a_copied_and_a_compiled_model_compute_the_same(folder: Path) -> None:
    model = fastpeft.patch(adapted(peft, load(folder)).eval())
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        torch.testing.assert_close(copy.deepcopy(model)(input_ids=IDS).logits, wanted)
        mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(2, 40, 64)
        torch.testing.assert_close(torch.compile(mlp, backend="aot_eager")(x), mlp(x), atol=1e-5, rtol=1e-5)


def test_the_report_names_what_it_leaves(folder: Path) -> None:
    left = {
        "lora_bias": adapted(peft, load(folder), lora_bias=True),
        "the base weight is int8: bitsandbytes multiplies it": adapted(peft, load(folder, bits=8)),
    }
    for reason, model in left.items():
        rows = rows_of(fastpeft.patch(model))
        assert tuple(rows) == LINEAR
        assert all(row.fused is None and reason in row.reason for row in rows.values()), rows
