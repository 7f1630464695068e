"""DoRA layers of both libraries, patched: joined as LoRA's are, whatever is done to the adapters afterwards."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import fastpeft
from fastpeft.ops.backend import OPS
from fastpeft.patch import rope as rotations

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
def test_layers_are_joined_as_loras_are(library):
    theirs = model(library)
    ours = fastpeft.patch(copy.deepcopy(theirs))
    rows = layers_of(ours)
    q, k, v, o, gate, up, down = (row.fused for row in rows)
    assert q == k == v == "dora_linear_group of q_proj, k_proj, v_proj, joined to input_layernorm"
    assert gate == up == "dora_linear_group of gate_proj, up_proj, joined to post_attention_layernorm"
    assert (o, down) == ("dora_linear", "dora_linear, joined to act_fn")
    assert_same(outcome(ours), outcome(theirs))
    fastpeft.unpatch(ours)
    assert_same(outcome(ours), outcome(theirs))


def test_a_step_compares_no_tensor_with_none(monkeypatch):
    """`[m, …].count(None)` asks each tensor whether it equals None: 0.1 ms a time, of every group in every step."""
    ours = fastpeft.patch(model("peft"))

    equal = torch.Tensor.__eq__

    def compared(self, other):
        assert other is not None, "a tensor was compared with None"
        return equal(self, other)

    monkeypatch.setattr(torch.Tensor, "__eq__", compared)
    ours.base_model(inputs_embeds=torch.randn(2, 60, 64)).logits.square().mean().backward()


@pytest.mark.parametrize("verify", [True, False])
def test_queries_and_keys_are_told_by_their_rotation(verify):
    """In a copy too; v and the others are kept, which costs nothing. Whatever becomes of them, gradients are right."""
    theirs = model("peft")
    ours = copy.deepcopy(fastpeft.patch(copy.deepcopy(theirs), verify=verify))
    layer = ours.base_model.model.model.layers[0]
    assert layer.input_layernorm.forward.group.told == (True, True, False)
    assert layer.mlp.act_fn.forward.group.told == (False,)
    assert_same(outcome(ours), outcome(theirs))
    for rotation in rotations.of(ours):  # the model's own function rotates them now
        rotation.kinds = dict.fromkeys(rotation.kinds, False)
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


def test_lora_and_dora_are_never_in_one_group():
    """q and v with DoRA, k with LoRA, o with neither: q and v are joined, k computes alone."""
    theirs = model("peft")
    layer = theirs.base_model.model.model.layers[0].self_attn.k_proj
    layer.lora_variant.clear()
    layer.lora_magnitude_vector = torch.nn.ModuleDict()
    ours = fastpeft.patch(copy.deepcopy(theirs))
    q, k, v, *_ = (row.fused for row in layers_of(ours))
    assert q == v == "dora_linear_group of q_proj, v_proj, joined to input_layernorm" and k == "lora_linear"
    assert_same(outcome(ours), outcome(theirs))


@pytest.mark.parametrize("library", LIBRARIES)
def test_projections_without_an_adapter_stay_out(library):
    theirs = model(library)
    theirs.delete_adapter("default")
    options = {"r": 4, "use_dora": True, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    theirs.add_adapter("some", LIBRARIES[library].LoraConfig(**options))
    theirs.set_adapter("some")
    ours = fastpeft.patch(copy.deepcopy(theirs))
    rows = [row.fused for row in layers_of(ours) if row.fused]
    assert rows[:2] == ["dora_linear_group of q_proj, v_proj, joined to input_layernorm"] * 2
    assert rows[2] == "dora_linear, joined to post_attention_layernorm"
    assert_same(outcome(ours), outcome(theirs))


def test_a_wrong_gradient_of_the_magnitude_is_found_out(monkeypatch):
    """Groups are compared in the magnitude's gradient too."""
    right = OPS["auto"].dora_expand_backward
    monkeypatch.setattr(
        OPS["auto"], "dora_expand_backward", lambda *a: (*right(*a)[:2], right(*a)[2] * 1.1 if len(a) else None)
    )
    rows = layers_of(fastpeft.patch(model("peft")))
    assert rows and all(row.fused is None and "gradient" in row.reason for row in rows)


def test_kept_norms_are_used():
    """Within DoraCaching a layer of ours computes by itself, from the norm that it keeps."""
    ours = fastpeft.patch(model("fastpeft"))
    expected = ours(IDS).logits
    layer = ours.base_model.model.model.layers[0].mlp.gate_proj
    with torch.no_grad(), fastpeft.layers.dora.DoraCaching():
        assert torch.allclose(ours(IDS).logits, expected, atol=1e-5)
        assert layer.lora_magnitude_vector["default"].known_norm is not None


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_under_checkpoints_and_training(p):
    """The same loss and gradients with gradient checkpointing, masks included."""
    ours = fastpeft.patch(model("peft", lora_dropout=p)).train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
            ours.enable_input_require_grads()
        torch.manual_seed(0)
        results.append(outcome(ours))
    assert_same(*results)
