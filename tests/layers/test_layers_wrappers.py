"""`modules_to_save`: a copy of a module for each adapter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastpeft.configs import LoraConfig
from fastpeft.layers import Linear, ModulesToSaveWrapper


def wrapper():
    wrapped = ModulesToSaveWrapper(nn.Linear(3, 2), "a")
    wrapped.update("b")
    wrapped.set_adapter("a")
    for i, module in enumerate(wrapped.modules_to_save.values()):
        nn.init.constant_(module.weight, i + 1.0)
    return wrapped


def test_the_active_copy_is_used_and_trained():
    w, x = wrapper(), torch.randn(4, 3)
    assert torch.equal(w(x), w.modules_to_save["a"](x)) and w.weight is w.modules_to_save["a"].weight
    assert {n for n, p in w.named_parameters() if p.requires_grad} == {
        "modules_to_save.a.weight",
        "modules_to_save.a.bias",
    }
    w.set_adapter(["b"])
    assert torch.equal(w(x), w.modules_to_save["b"](x)) and w.out_features == 2
    assert w.active_adapters == ["b"] and not w.modules_to_save["a"].weight.requires_grad
    w.set_adapter("a", inference_mode=True)
    assert not any(p.requires_grad for p in w.parameters())


def test_switched_off_or_with_none_active_it_is_the_original():
    w, x = wrapper(), torch.randn(4, 3)
    w.enable_adapters(False)
    assert torch.equal(w(x), w.original_module(x)) and w.weight is w.original_module.weight
    assert not any(p.requires_grad for p in w.parameters())
    w.enable_adapters(True)
    assert w.modules_to_save["a"].weight.requires_grad
    w.set_adapter([])
    assert torch.equal(w(x), w.original_module(x)) and w.weight is w.original_module.weight
    assert w.unload_and_optionally_merge_module(False, False, None) is w.original_module


def test_an_adapter_without_a_copy_uses_the_original():
    w, x = wrapper(), torch.randn(4, 3)
    w._active_adapter = "elsewhere"
    assert torch.equal(w(x), w.original_module(x))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        w.weight  # noqa: B018


def test_a_mixed_batch():
    w, x = wrapper(), torch.randn(5, 3)
    names = ["b", "__base__", "a", "b", "a"]
    y = w(x, adapter_names=names)
    for i, name in enumerate(names):
        module = w.original_module if name == "__base__" else w.modules_to_save[name]
        torch.testing.assert_close(y[i], module(x[i]))
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 1 and 5"):
        w(x, adapter_names=["a"])
    with pytest.raises(TypeError, match="Mixed batching is only supported for.*Linear"):
        ModulesToSaveWrapper(nn.LayerNorm(3), "a")(x, adapter_names=["a"] * 5)


def test_what_cannot_be_set_raises():
    w = wrapper()
    with pytest.raises(ValueError, match="Adapter c not found"):
        w.set_adapter("c")
    with pytest.raises(ValueError, match="multiple"):
        w.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        w.check_set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        w.check_set_adapter([])
    assert w.check_set_adapter("x") == "x" and w.check_set_adapter(["x", "b"]) == "b"
    assert w.check_set_adapter(["x"]) is None


@pytest.mark.parametrize("module", [nn.ModuleDict(), nn.ModuleList(), nn.ParameterList(), nn.ParameterDict()])
def test_modules_that_cannot_be_called_are_refused(module):
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        ModulesToSaveWrapper(module, "a")


def test_adapter_layers_are_refused():
    layer = Linear(nn.Linear(3, 2), "default", LoraConfig(), r=2)
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        ModulesToSaveWrapper(layer, "a")


def test_deleting():
    w = wrapper()
    w.delete_adapter("nowhere", [])
    with pytest.raises(ValueError, match="multiple"):
        w.delete_adapter("a", ["b", "c"])
    w.delete_adapter("a", ["b"])
    assert (
        w.active_adapters == ["b"] and w.modules_to_save["b"].weight.requires_grad and list(w.modules_to_save) == ["b"]
    )
    w.delete_adapter("b", ["elsewhere"])
    assert w.active_adapters == [] and not len(w.modules_to_save)


def test_an_adapters_files_have_the_modules_own_names():
    w = wrapper()
    assert w.adapter_state_dict_load_map("a") == {
        "weight": "modules_to_save.a.weight",
        "bias": "modules_to_save.a.bias",
    }
    state = w.adapter_state_dict("b", w.state_dict())
    assert state.keys() == {"weight", "bias"} and torch.equal(state["weight"], w.modules_to_save["b"].weight)
    assert w.adapter_state_dict("c", w.state_dict()) == {} and w._get_available_adapters() == {"a", "b"}


def test_a_tied_module_shares_its_weight():
    embedding = nn.Embedding(3, 2)
    w = ModulesToSaveWrapper(nn.Linear(2, 3, bias=False), "a", tied_module=embedding)
    assert w.modules_to_save["a"].weight is embedding.weight


def test_unloading_gives_the_active_copy():
    w = wrapper()
    assert w.unload_and_optionally_merge_module(True, False, None) is w.modules_to_save["a"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies(how):
    w, x = wrapper(), torch.randn(4, 3)
    assert torch.equal(how(w)(x), w(x))


def test_wrappers_pass_as_pefts():
    peft = pytest.importorskip("peft")
    assert isinstance(wrapper(), peft.utils.ModulesToSaveWrapper)
