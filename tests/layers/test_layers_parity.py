"""Every kind of layer against PEFT's: the same random start, outputs, gradients, and weights when merged."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_kinds import KINDS, call, randomise
from torch import nn

import fastpeft.layers as layers
from fastpeft.configs import LoraConfig

peft = pytest.importorskip("peft")
import peft.tuners.lora.layer as their_layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(kind, **options):
    """(fastpeft's layer, PEFT's), made from the same seed around copies of one base layer."""
    base = kind.base().requires_grad_(False)
    made = []
    for module, config_cls in ((layers, LoraConfig), (their_layers, peft.LoraConfig)):
        torch.manual_seed(7)
        made.append(kind.make(copy.deepcopy(base), module, config_cls, **options))
        made.append(torch.rand(1))  # where the generator was left
    assert torch.equal(made[1], made[3])
    return made[0], made[2]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_layer(name, init):
    ours, theirs = pair(KINDS[name], init_lora_weights=init)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert repr(ours) == repr(theirs)
    flags = [{key: p.requires_grad for key, p in layer.named_parameters()} for layer in (ours, theirs)]
    assert flags[0] == flags[1]
    assert isinstance(ours, type(theirs))


@pytest.mark.parametrize("name", KINDS)
def test_outputs_gradients_and_merging_are_pefts(name):
    kind = KINDS[name]
    ours, theirs = pair(kind)
    randomise(ours)
    randomise(theirs)
    x = kind.x()
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    y = [call(layer, z) for layer, z in zip((ours, theirs), inputs)]
    close(y[0], y[1])
    dy = torch.randn_like(y[0])
    for out in y:
        out.backward(dy)
    grads = [{key: p.grad for key, p in layer.named_parameters() if p.grad is not None} for layer in (ours, theirs)]
    assert grads[0].keys() == grads[1].keys()
    for key in grads[0]:
        close(grads[0][key], grads[1][key])
    if x.is_floating_point():
        close(inputs[0].grad, inputs[1].grad)

    with torch.no_grad():
        if kind.mergeable:
            for layer in (ours, theirs):
                layer.merge()
            close(call(ours, x), call(theirs, x))
            for layer in (ours, theirs):
                layer.unmerge()
            close(call(ours, x), call(theirs, x))
        for layer in (ours, theirs):
            layer.enable_adapters(False)
        close(call(ours, x), call(theirs, x))


@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "conv2d", "attention", "experts", "matrix"])
def test_several_active_adapters_of_different_rank_are_pefts(name):
    kind = KINDS[name]
    ours, theirs = pair(kind)
    for layer, config_cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        layer.update_layer("second", 2, lora_alpha=3, config=config_cls(use_rslora=True, **kind.config))
        layer.update_layer("idle", 3, lora_alpha=3, config=config_cls(**kind.config))
        layer.set_adapter(["second", "default", "elsewhere"])
        if name == "attention":
            layer.base_layer.out_proj.set_adapter(["second", "default", "elsewhere"])
        randomise(layer)
    x = kind.x()
    y = [call(layer, x) for layer in (ours, theirs)]
    close(y[0], y[1])
    if name == "attention":
        return  # PEFT's attention gives a gradient to the last adapter only
    for out in y:
        out.square().sum().backward()
    for (key, p), (their_key, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        assert key == their_key and p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_an_adapter_with_a_bias_is_pefts(name):
    kind = KINDS[name]
    ours, theirs = pair(kind, lora_bias=True)
    randomise(ours)
    randomise(theirs)
    x = kind.x()
    close(call(ours, x), call(theirs, x))
    for layer in (ours, theirs):
        layer.merge(safe_merge=True)
    close(call(ours, x), call(theirs, x))
    ours.unmerge()
    theirs.unmerge()
    close(ours.base_layer.bias, theirs.base_layer.bias)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_a_mixed_batch_is_pefts(name):
    kind = KINDS[name]
    ours, theirs = pair(kind)
    for layer, config_cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        layer.update_layer("second", 2, lora_alpha=3, config=config_cls())
        randomise(layer)
    x = torch.cat([kind.x(), kind.x(), kind.x()])
    names = (["default", "__base__", "second", "default", "nowhere", "second"] * 2)[: len(x)]
    with torch.no_grad():
        close(ours(x, adapter_names=names), theirs(x, adapter_names=names))


def test_scales_are_pefts():
    ours, theirs = pair(KINDS["linear"], use_rslora=True)
    for change in (
        lambda layer: layer.set_scale("default", 2.5),
        lambda layer: layer.set_scale("nowhere", 2.5),
        lambda layer: layer.scale_layer(3),
        lambda layer: layer.unscale_layer(1.5),
        lambda layer: layer.unscale_layer(),
    ):
        change(ours)
        change(theirs)
        assert ours.scaling == theirs.scaling


def test_deleting_adapters_chooses_the_next_as_peft_does():
    ours, theirs = pair(KINDS["linear"])
    for layer, config_cls in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        for name in ("b", "a"):
            layer.update_layer(name, 2, lora_alpha=3, config=config_cls())
    for name in ("default", "a", "b"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ours.delete_adapter(name)
        with warnings.catch_warnings(record=True) as expected:
            warnings.simplefilter("always")
            theirs.delete_adapter(name)
        assert [str(w.message) for w in seen] == [str(w.message) for w in expected]
        assert ours.active_adapters == theirs.active_adapters
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert ours._all_available_adapter_names() == theirs._all_available_adapter_names()


def test_an_adapter_for_inference_freezes_what_peft_freezes():
    ours, theirs = pair(KINDS["linear"], inference_mode=True)
    flags = [{key: p.requires_grad for key, p in layer.named_parameters()} for layer in (ours, theirs)]
    assert flags[0] == flags[1] and not any(flags[0].values())


@pytest.mark.parametrize(
    ("name", "options", "r"),
    [
        ("linear", {}, 0),
        ("embedding", {"lora_bias": True}, 4),
        ("conv2d, groups", {}, 3),
        ("experts", {"lora_dropout": 0.1}, 4),
        ("experts", {"fan_in_fan_out": True}, 4),
        ("experts", {"lora_bias": True}, 4),
    ],
)
def test_what_a_kind_cannot_do_raises_what_peft_raises(name, options, r):
    kind = KINDS[name]
    with pytest.raises(ValueError) as theirs:
        kind.make(kind.base(), their_layers, peft.LoraConfig, r=r, **options)
    with pytest.raises(ValueError) as ours:
        kind.make(kind.base(), r=r, **options)
    assert str(ours.value) == str(theirs.value)


def test_attention_with_other_widths_raises_what_peft_raises():
    base = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    for module, config_cls in ((layers, LoraConfig), (their_layers, peft.LoraConfig)):
        with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
            module.MultiheadAttention(base, "default", config=config_cls(), r=2)
