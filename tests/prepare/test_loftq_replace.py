"""Adapters of a quantised model replaced so that they make up for quantising, from the unquantised file."""

from __future__ import annotations

import inspect

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastpeft import replace_lora_weights_loftq

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.one, self.two = linear(64, 128), linear(128, 64)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.fixture
def models(tmp_path):
    """The exact model, a quantised one with adapters, and where the exact weights are."""
    exact = Net(nn.Linear)
    quantised = Net(lambda k, n: bnb.nn.Linear4bit(k, n, compute_dtype=torch.float32, quant_type="nf4"))
    quantised.load_state_dict(exact.state_dict())
    quantised = quantised.to("cpu")
    quantised.is_loaded_in_4bit = True  # as Transformers sets it; by it peft knows what it adapts
    model = peft.get_peft_model(quantised, peft.LoraConfig(r=16, lora_alpha=16, target_modules=["one", "two"]))
    save_file(exact.state_dict(), tmp_path / "model.safetensors")
    return exact, model, tmp_path


def test_nearer_to_the_exact_model(models):
    exact, model, path = models
    x = torch.randn(50, 64)
    before = (model(x) - exact(x)).norm()
    replace_lora_weights_loftq(model, str(path))
    assert (model(x) - exact(x)).norm() < 0.8 * before
    layer = model.base_model.model.one
    weight = layer.base_layer.weight
    residual = exact.one.weight - bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    left = torch.linalg.svdvals(residual)[16:].square().sum().sqrt()
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close((residual - product).norm(), left, rtol=1e-3, atol=1e-6)


def test_callback_puts_layers_back(models):
    _, model, path = models
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    seen = []
    replace_lora_weights_loftq(model, str(path), callback=lambda m, name: seen.append(name) or name == "two")
    assert seen == ["one", "two"]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert torch.equal(parameter, before[name]) == (".one." in name)


def test_what_cannot_be(models, tmp_path):
    _, model, _ = models
    with pytest.raises(FileNotFoundError):
        replace_lora_weights_loftq(model, str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="model_path"):
        replace_lora_weights_loftq(model)
    with pytest.raises(ValueError, match="No bnb LoRA module"):
        replace_lora_weights_loftq(peft.get_peft_model(Net(nn.Linear), peft.LoraConfig(target_modules=["one"])))


def test_equals_peft(models, monkeypatch):
    exact, model, path = models
    utils = peft.utils.loftq_utils
    theirs = inspect.unwrap(utils._loftq_init_new)  # which computes on "cuda", and is to be compared here
    consts = tuple("cpu" if const == "cuda" else const for const in theirs.__code__.co_consts)
    monkeypatch.setattr(theirs, "__code__", theirs.__code__.replace(co_consts=consts))
    found = []
    for replace in (utils.replace_lora_weights_loftq, replace_lora_weights_loftq):
        replace(model, str(path / "model.safetensors") if replace is not replace_lora_weights_loftq else str(path))
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n})
    for name, value in found[0].items():  # up to the sign of the singular vectors
        torch.testing.assert_close(found[1][name].abs(), value.abs(), atol=1e-5, rtol=1e-3)
