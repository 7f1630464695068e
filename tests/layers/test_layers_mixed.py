"""A batch in which every sample has its own adapter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_kinds import KINDS, randomise
from torch import nn

import fastpeft.layers as layers
from fastpeft.configs import LoraConfig

NAMES = ["default", "second", "third", "__base__", "nowhere"]


def with_three_adapters(kind="linear", **config):
    kind = KINDS[kind]
    layer = kind.make(kind.base(), **config)
    layer.update_layer("second", 2, lora_alpha=3, config=LoraConfig(**kind.config, **config))
    layer.update_layer("third", 7, lora_alpha=5, config=LoraConfig(use_rslora=True, **kind.config, **config))
    layer.set_adapter(["default", "second", "third"])
    randomise(layer)
    return layer


def one_by_one(layer, x, names):
    """The same, a sample at a time, each with its adapter active."""
    active, rows = layer.active_adapters, []
    for sample, name in zip(x, names):
        layer.set_adapter([] if name == "__base__" else name)
        rows.append(layer(sample[None]))
    layer.set_adapter(active)
    return torch.cat(rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), st.sampled_from([(), (1,), (3, 2), (40,)]))
def test_every_sample_gets_its_own_adapter(names, middle):
    layer = with_three_adapters()
    x = torch.randn(len(names), *middle, 10)
    torch.testing.assert_close(layer(x, adapter_names=names), one_by_one(layer, x, names), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Conv1D", "embedding", "embedding, scaled", "conv1d", "conv2d", "conv2d, groups"])
@pytest.mark.filterwarnings("ignore:LoRA adapter added")
def test_every_kind_of_layer(kind):
    layer = with_three_adapters(kind) if "groups" not in kind else KINDS[kind].make(KINDS[kind].base())
    randomise(layer)
    x = torch.cat([KINDS[kind].x() for _ in range(3)])
    names = (NAMES * 2)[: len(x)]
    torch.testing.assert_close(layer(x, adapter_names=names), one_by_one(layer, x, names), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("change", [{"lora_bias": True}, {"lora_dropout": 0.5}, {}])
def test_biases_gradients_and_dropout(change, rows):
    layer = with_three_adapters(**change).eval()
    x = torch.randn(4, rows, 10)
    names = ["second", "third", "__base__", "second"]
    expected = one_by_one(layer, x, names)
    y = layer(x, adapter_names=names)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert layer.lora_A["second"].weight.grad.abs().sum() > 0
    if layer.lora_A["default"].weight.grad is not None:
        assert not layer.lora_A["default"].weight.grad.any()
    if "lora_dropout" in change:
        layer.train()
        assert not torch.allclose(layer(x, adapter_names=names), expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_a_changed_scale_counts_at_once(rows):
    layer = with_three_adapters()
    x = torch.randn(2, rows, 10)
    names = ["second", "third"]
    first = layer(x, adapter_names=names)
    layer.set_scale("second", 3.0)
    second = layer(x, adapter_names=names)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(second[0] - layer.base_layer(x)[0], 3 * (first[0] - layer.base_layer(x)[0]))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_half_precision(rows, adapter):
    layer = with_three_adapters()
    layer.base_layer.bfloat16()
    layer.lora_A.to(adapter)
    layer.lora_B.to(adapter)
    layer.lora_B["third"].float()  # adapters need not agree
    layer.lora_A["third"].float()
    x = torch.randn(3, rows, 10).bfloat16()
    names = ["second", "third", "__base__"]
    y = layer(x, adapter_names=names)
    native = one_by_one(layer, x, names)
    layer.double()
    exact = one_by_one(layer, x.double(), names)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 * (native - exact).abs().max()


@pytest.mark.parametrize("rows", [1, 64])
def test_the_number_of_products_does_not_grow_with_the_adapters(rows):
    layer = layers.Linear(nn.Linear(10, 7), "a0", LoraConfig(), r=4, lora_alpha=8)
    for i in range(1, 8):
        layer.update_layer(f"a{i}", 4, lora_alpha=8, config=LoraConfig())
    x = torch.randn(8, rows, 10)
    with torch.no_grad(), torch.autograd.profiler.profile() as prof:
        layer(x, adapter_names=[f"a{i}" for i in range(8)])
    products = [
        e.name for e in prof.function_events if e.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    ]
    assert len(products) == 3


def test_after_inference_mode_the_same_batch_trains():
    layer = with_three_adapters()
    x, names = torch.randn(2, 3, 10), ["second", "default"]
    with torch.inference_mode():
        layer(x, adapter_names=names)
    layer(x, adapter_names=names).sum().backward()
    assert layer.lora_B["second"].weight.grad is not None


def test_what_does_not_fit_raises():
    layer = with_three_adapters()
    x = torch.randn(3, 10)
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 3"):
        layer(x, adapter_names=["default", "second"])
    layer.merge()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter` first"):
        layer(x, adapter_names=["default"] * 3)


def test_switched_off_the_names_do_not_count():
    layer = with_three_adapters()
    layer.enable_adapters(False)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x, adapter_names=["default"] * 3), layer.base_layer(x))
