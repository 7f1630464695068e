"""DoRA layers of both libraries, patched: one operator call each, whatever is done to the adapters afterwards."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import fastpeft
from fastpeft.ops.backend import OPS

pytestmark = pytest.mark.filterwarnings("ignore")
LIBRARIES = {"peft": peft, "fastpeft": fastpeft}


def model(library, **options):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=80,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            attention_bias=True,
        )
    )
    library = LIBRARIES[library]
    config = library.LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False, **options)
    return library.get_peft_model(base, config).eval()


IDS = torch.arange(120).view(2, 60) % 64


def outcome(model):
    model.zero_grad()
    output = model(IDS, labels=IDS)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def layers_of(model):
    """The report's rows of linear layers with adapters."""
    return [row for row in fastpeft.report(model).rows if row.kind in ("peft Linear", "fastpeft Linear")]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_layer_is_one_operator_call(library):
    theirs = model(library)
    ours = fastpeft.patch(copy.deepcopy(theirs))
    rows = layers_of(ours)
    assert len(rows) == 7 and all(row.fused == "dora_linear" for row in rows)
    assert_same(outcome(ours), outcome(theirs))
    fastpeft.unpatch(ours)
    assert_same(outcome(ours), outcome(theirs))


@pytest.mark.parametrize("library", LIBRARIES)
def test_switching_between_lora_and_dora(library):
    theirs = model(library)
    theirs.add_adapter(
        "plain", LIBRARIES[library].LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    for first in ("default", "plain"):
        theirs.set_adapter(first)
        ours = fastpeft.patch(copy.deepcopy(theirs))
        for name in ("plain", "default", "plain"):
            theirs.set_adapter(name)
            ours.set_adapter(name)
            assert_same(outcome(ours), outcome(theirs))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-6)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)


def test_a_wrong_operator_is_found_out(monkeypatch):
    """Verification would leave the layers as they are if the norms were stale."""
    right = OPS["auto"].weight_norm
    monkeypatch.setattr(OPS["auto"], "weight_norm", lambda W, A, B, c: right(W, A, B, 0.0))
    rows = layers_of(fastpeft.patch(model("peft")))
    assert rows and all(row.fused is None and row.reason for row in rows)


@pytest.mark.parametrize("library", LIBRARIES)
def test_copied_and_moved(library):
    theirs = model(library)
    ours = copy.deepcopy(fastpeft.patch(copy.deepcopy(theirs)))
    assert_same(outcome(ours), outcome(theirs))
    assert torch.allclose(ours.double()(IDS).logits, theirs.double()(IDS).logits, atol=1e-12)
