"""EVA: the directions of the layers' inputs and the ranks that PEFT finds from the same data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fastpeft
from fastpeft.prepare.eva import get_eva_state_dict
from fastpeft.prepare.pca import IncrementalPCA


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=2, vocab_size=50, **sizes)).eval()


def batches():
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(4):
        ids = torch.randint(0, 50, (4, 24), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, -5:], labels[:, :2] = 0, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def make(library, targets=("q_proj", "v_proj", "o_proj", "up_proj"), **options):
    parts = library if library is fastpeft else library.tuners.lora.config
    config = library.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(targets),
        init_lora_weights="eva",
        eva_config=parts.EvaConfig(**{"tau": 0.4, **options}),
        task_type="CAUSAL_LM",
    )
    return library.get_peft_model(base(), config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rho": 1.0},
        {"rho": 3.0, "adjust_scaling_factors": False},
        # PEFT whitens in place, so layers that share an input are whitened again and again; here there are none
        {"whiten": True, "targets": ["o_proj", "down_proj"]},
    ],
)
def test_equals_peft(options):
    peft = pytest.importorskip("peft")
    ours, theirs = make(fastpeft, **options), make(peft, **options)
    for library, model in ((fastpeft, ours), (peft, theirs)):
        library.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    want = peft.get_peft_model_state_dict(theirs)
    got = fastpeft.get_peft_model_state_dict(ours)
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name].abs(), want[name].abs(), atol=1e-5, rtol=1e-4, msg=name)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    assert set(ours.peft_config["default"].target_modules) == set(theirs.peft_config["default"].target_modules)
    ids = batches()[0]["input_ids"]
    torch.testing.assert_close(ours.eval()(ids).logits, base()(ids).logits)  # B is zero


def test_file_of_moved_ranks(tmp_path):
    peft = pytest.importorskip("peft")
    model = make(fastpeft)
    fastpeft.initialize_lora_eva_weights(model, batches(), show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    ids, want = batches()[0]["input_ids"], model.eval()(batches()[0]["input_ids"]).logits
    for library in (fastpeft, peft):
        again = library.PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(again(ids).logits, want, atol=1e-4, rtol=1e-4)


def test_measured_before_there_is_an_adapter():
    config = make(fastpeft).peft_config["default"]
    measured = get_eva_state_dict(base(), batches(), config, show_progress_bar=False)
    model = make(fastpeft)
    inside = get_eva_state_dict(model, batches(), show_progress_bar=False)
    assert {f"base_model.model.{name}" for name in measured} == inside.keys()
    for name, rows in measured.items():
        torch.testing.assert_close(rows, inside[f"base_model.model.{name}"])
    fastpeft.initialize_lora_eva_weights(model, eva_state_dict=inside)


def test_layers_without_directions_start_as_usual():
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    options = {"init_lora_weights": "eva", "eva_config": fastpeft.EvaConfig()}
    model = fastpeft.get_peft_model(net, fastpeft.LoraConfig(r=2, target_modules=["0", "1"], **options))
    with pytest.warns(UserWarning, match="init_lora_weights=True because they were not found"):
        fastpeft.initialize_lora_eva_weights(model, eva_state_dict={"base_model.model.1": torch.eye(8)[:3]})
    assert torch.equal(model.base_model.model[1].lora_A["default"].weight, torch.eye(8)[:3])
    assert model.peft_config["default"].rank_pattern == {"1": 3}


def test_what_cannot_be():
    plain = fastpeft.get_peft_model(base(), fastpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        fastpeft.initialize_lora_eva_weights(plain, batches())
    with pytest.raises(ValueError, match="dataloader is empty"):
        fastpeft.initialize_lora_eva_weights(make(fastpeft), [])
    with pytest.raises(ValueError, match="names were not found in the model"):
        get_eva_state_dict(make(fastpeft), batches(), prepare_layer_inputs_fn={"absent": None})
    with pytest.raises(ValueError, match="components cannot be had of 3 rows"):
        IncrementalPCA(4).partial_fit(torch.randn(3, 8))


def test_components_of_batches_are_those_of_all_rows():
    x = torch.randn(300, 12) * torch.linspace(3, 0.1, 12) + 1
    pca = IncrementalPCA(12)  # nothing is cut off, so nothing is lost between batches
    for part in x.split(60):
        pca.partial_fit(part)
    _, S, Vh = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular_values, S, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pca.components.abs(), Vh.abs(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pca.explained_variance_ratio.sum().item(), 1.0, atol=1e-4, rtol=1e-4)
