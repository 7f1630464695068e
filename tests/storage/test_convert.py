"""Adapters written as plain LoRA adapters of another rank: what PEFT reads back computes the same."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.convert import convert_to_lora, save_as_lora

pytestmark = pytest.mark.filterwarnings("ignore:Converting a PEFT adapter:UserWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 32), nn.Linear(32, 12)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def adapted(**options):
    base = Net()
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["first", "second"], "init_lora_weights": False}
    return base, fastpeft.get_peft_model(copy.deepcopy(base), fastpeft.LoraConfig(**(settings | options)))


def test_full_rank_file_is_the_adapter(tmp_path):
    base, model = adapted()
    save_as_lora(tmp_path / "a", model, 6)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    x = torch.randn(5, 20)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert again.peft_config["default"].r == 6


def test_lower_rank_is_the_nearest_matrix():
    _, model = adapted()
    config, state = convert_to_lora(model, 2)
    assert (config.r, config.lora_alpha) == (2, 2)
    for name in ("first", "second"):
        A, B = (state[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        left = torch.linalg.svdvals(delta)[2:].square().sum().sqrt()
        torch.testing.assert_close((delta - B @ A).norm(), left, rtol=1e-4, atol=1e-5)


def test_threshold_gives_each_layer_its_rank(tmp_path):
    base, model = adapted()
    config, state = convert_to_lora(model, 0.8)
    ranks = {n: state[f"base_model.model.{n}.lora_A.weight"].shape[0] for n in ("first", "second")}
    assert config.rank_pattern == config.alpha_pattern == ranks and all(0 < r < 6 for r in ranks.values())
    save_as_lora(tmp_path / "a", model, 0.8)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert loaded.base_model.model.first.r["default"] == ranks["first"]


def test_modules_to_save_go_along(tmp_path):
    base, model = adapted(target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.add_(1)
    save_as_lora(tmp_path / "a", model, 6)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    x = torch.randn(5, 20)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be():
    _, model = adapted()
    for rank, message in ((0, "rank of 0"), (1.5, "threshold"), (40, "larger than the weight")):
        with pytest.raises(ValueError, match=message):
            convert_to_lora(model, rank)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(use_dora=True)[1], 2)
    with pytest.raises(TypeError, match="Could not detect"):
        convert_to_lora(Net(), 2)
