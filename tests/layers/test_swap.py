"""Tensors lent to a module in place of its parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

import fastpeft
from fastpeft.layers.swap import swapped


class PlusOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_parametrized_parameter_is_lent_past_its_parametrization() -> None:
    """Adapters on a parameter that somebody parametrized before see, and change, what the parametrization yields."""
    layer = nn.Linear(3, 3, bias=False)
    plain = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", PlusOne())
    with swapped((layer, "weight", torch.eye(3))):
        assert torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3))
    torch.testing.assert_close(layer.weight, plain + 1)
    assert [name for name, _ in layer.named_parameters()] == ["parametrizations.weight.original"]

    config = fastpeft.LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False)
    model = fastpeft.get_peft_model(nn.Sequential(layer), config)
    delta = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(model(torch.eye(3)), (plain + 1 + delta).T)


def test_a_plain_attribute_stands_before_the_parameter() -> None:
    """FSDP shows a module its gathered weight as an attribute; the loan replaces that and gives it back."""
    layer = nn.Linear(3, 3, bias=False)
    gathered = torch.zeros(3, 3)
    layer.__dict__["weight"] = gathered
    with swapped((layer, "weight", torch.eye(3))):
        assert torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 3))
    assert layer.weight is gathered
