"""What adapter layers do by themselves, whether or not PEFT is there to compare with."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import KINDS, ScaledEmbedding, call, randomise
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fastpeft.layers as layers
from fastpeft.configs import LoraConfig
from fastpeft.errors import PeftWarning
from fastpeft.layers.variants import LoraVariant

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")


def linear(base=None, r=4, **config):
    layer = layers.Linear(base or nn.Linear(10, 7), "default", LoraConfig(**config), r=r, lora_alpha=8)
    layer.base_layer.requires_grad_(False)
    randomise(layer)
    return layer


def formula(layer, x, name="default"):
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, A), B) * layer.scaling[name]


# Forward


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.mergeable])
def test_merged_the_layer_computes_the_same_and_unmerged_it_is_as_before(name):
    kind = KINDS[name]
    layer = kind.make(kind.base().double())
    layer.double()
    randomise(layer)
    x = kind.x()
    x = x.double() if x.is_floating_point() else x
    before = {key: p.clone() for key, p in layer.named_parameters()}
    y = call(layer, x)
    layer.merge(safe_merge=True)
    assert layer.merged
    torch.testing.assert_close(call(layer, x), y)
    layer.unmerge()
    assert not layer.merged
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p, before[key])


@pytest.mark.parametrize("name", KINDS)
def test_a_forward_leaves_the_base_weights_to_the_bit(name):
    kind = KINDS[name]
    layer = kind.make(kind.base())
    randomise(layer)
    before = {key: p.clone() for key, p in layer.named_parameters() if "max norm" not in name}
    call(layer, kind.x()).sum().backward()
    after = dict(layer.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_convolution_with_dilation_is_adapted():
    layer = layers.Conv2d(nn.Conv2d(3, 4, 3, dilation=2, padding=1), "default", LoraConfig(), r=2, lora_alpha=2)
    randomise(layer)
    x = torch.randn(1, 3, 9, 9)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 600])
def test_any_rank(r):
    layer = linear(r=r)
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-4, atol=1e-3)


def test_a_scale_that_is_a_tensor():
    layer = linear()
    layer.scaling["default"] = torch.tensor(2.0)
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_dropout_acts_in_training_only_and_follows_its_module():
    layer = linear(lora_dropout=0.5)
    x = torch.randn(4, 10)
    assert not torch.allclose(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), formula(layer, x))
    layer.train()
    layer.lora_dropout["default"].p = 0.0  # as TRL's disable_dropout does
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.lora_dropout["default"] = nn.ReLU()  # whatever stands there is called
    torch.testing.assert_close(layer(x) - layer.base_layer(x), formula(layer, x.relu()) - layer.base_layer(x.relu()))


def test_a_layer_without_the_active_adapter_is_its_base():
    layer = linear()
    layer.set_adapter("elsewhere")
    x = torch.randn(2, 10)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_switched_off_a_merged_layer_is_unmerged():
    layer = linear()
    x = torch.randn(2, 10)
    y = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    assert not layer.merged


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "global hook", "forward"])
def test_what_users_put_on_a_module_runs(part, how):
    layer = linear()
    module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    seen = []

    def note(*args):
        seen.append(args[0])

    remove = None
    if how == "hook":
        module.register_forward_hook(note)
    elif how == "pre-hook":
        module.register_forward_pre_hook(note)
    elif how == "backward hook":
        module.register_full_backward_hook(note)
    elif how == "global hook":
        remove = register_module_forward_hook(note)
    else:  # as accelerate's offloading does
        own = module.forward
        module.forward = lambda x: (note(module), own(x))[1]
    try:
        x = torch.randn(2, 10, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    finally:
        if remove is not None:
            remove.remove()
    assert any(m is module for m in seen)
    torch.testing.assert_close(y, formula(layer, x))


def test_a_subclass_of_linear_keeps_its_own_forward():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = linear(Doubling(10, 7))
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), formula(layer, x) + F.linear(x, layer.weight, layer.bias))


def test_arguments_that_are_not_the_adapters_reach_the_base():
    class Shifting(nn.Linear):
        def forward(self, x, shift=0.0):
            return super().forward(x) + shift

    layer = linear(Shifting(10, 7))
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x, shift=3.0), layer(x) + 3)


def test_no_graph_break():
    layer = linear(lora_dropout=0.2).eval()
    x = torch.randn(2, 3, 10)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# Dtypes


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_another_precision_are_as_exact_as_pytorch_allows(base, adapter, autocast, device):
    layer = linear(nn.Linear(64, 48).to(base), r=8)
    layer.lora_A.to(adapter)
    layer.lora_B.to(adapter)
    x = torch.randn(5, 64).to(base)
    with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        plain = layer.base_layer(x)
        native = (plain + F.linear(F.linear(x.to(adapter), A), B)).to(plain.dtype)
    assert y.dtype == native.dtype
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = exact + F.linear(F.linear(x.double(), A.double()), B.double())
    assert (y - exact).abs().max() <= 2 * (native - exact).abs().max()


def test_the_adapter_takes_the_bases_dtype_and_integers_do_not_count():
    assert linear(nn.Linear(4, 4, dtype=torch.bfloat16)).lora_A["default"].weight.dtype == torch.bfloat16
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    layer = layers.Linear(base, "default", LoraConfig(), r=2, lora_alpha=2)
    assert layer.lora_A["default"].weight.dtype == torch.float32


def test_without_input_casting_the_caller_casts():
    layer = linear()
    layer.cast_input_dtype_enabled = False
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.lora_A.double()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@pytest.mark.parametrize("name", KINDS)
def test_a_base_on_the_meta_device_takes_its_adapter_there(name):
    with torch.device("meta"):
        base = KINDS[name].base()
    layer = KINDS[name].make(base)
    assert all(p.is_meta for p in layer.parameters())


# Adapters


def test_adding_an_adapter_touches_only_itself_and_the_active_one():
    layer = linear()
    for i in range(30):
        layer.update_layer(f"a{i}", 2, lora_alpha=2, config=LoraConfig())
    calls = [0, 0]
    for i, name in enumerate(("one of many", "a31")):
        fresh = linear() if i else layer
        sys.setprofile(lambda frame, event, arg, i=i: calls.__setitem__(i, calls[i] + event.endswith("call")))
        fresh.update_layer(name, 2, lora_alpha=2, config=LoraConfig())
        sys.setprofile(None)
    assert calls[0] <= calls[1] + 5
    assert not layer.lora_A["a3"].weight.requires_grad and layer.lora_A["default"].weight.requires_grad


def test_an_adapter_made_anew_replaces_its_weights():
    layer = linear()
    layer.update_layer("default", 2, lora_alpha=2, config=LoraConfig(lora_dropout=0.1))
    assert layer.lora_A["default"].weight.shape == (2, 10) and layer.r == {"default": 2}
    assert layer.lora_dropout["default"].p == 0.1


def test_only_active_adapters_are_trainable():
    layer = linear()
    layer.update_layer("b", 2, lora_alpha=2, config=LoraConfig())
    layer.set_adapter("b")
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A.b.weight", "lora_B.b.weight"}
    layer.enable_adapters(False)
    assert not any(p.requires_grad for p in layer.parameters())
    layer.enable_adapters(True)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == trainable
    layer.set_requires_grad(["default", "elsewhere"])
    assert layer.lora_A["default"].weight.requires_grad
    layer.set_adapter(["b"], inference_mode=True)
    assert not any(p.requires_grad for p in layer.parameters())


def test_layers_are_copied_and_pickled():
    layer = linear()
    x = torch.randn(2, 10)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_a_users_own_layer_class():
    class Mine(nn.Module, layers.LoraLayer):
        def __init__(self, base_layer, adapter_name, config, r, lora_alpha):
            nn.Module.__init__(self)
            layers.LoraLayer.__init__(self, base_layer)
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha, config=config)

        _make_factors = layers.Linear._make_factors

        def forward(self, x):
            return self.base_layer(x) + self._adapter_product("default", x)

    layer = Mine(nn.Linear(3, 3), "default", LoraConfig(), r=2, lora_alpha=2)
    assert layer(torch.randn(1, 3)).shape == (1, 3)


def test_the_seam_of_variants(monkeypatch):
    monkeypatch.setattr("fastpeft.layers.variants.VARIANT_OPTIONS", ("shout",))

    class Shout(LoraVariant):
        def init(self, layer, adapter_name, config, **kwargs):
            layer.lora_magnitude_vector[adapter_name] = nn.Linear(1, 1)

        def forward(self, layer, adapter_name, x, result, **kwargs):
            return result + 10

        def merge(self, layer, adapter_name, weight):
            return weight + 1

        def unmerge(self, layer, adapter_name, weight):
            return weight - 1

        name, supports_mixed_batch = "shouting", False

    class Loud(layers.Linear):
        lora_variants = {"shout": Shout}

    config = LoraConfig()
    config.shout = True
    with pytest.raises(ValueError, match="lora.Conv1d does not support shout"):
        layers.Conv1d(nn.Conv1d(3, 3, 1), "default", config, r=2, lora_alpha=2)
    layer = Loud(nn.Linear(3, 3), "default", config, r=2, lora_alpha=2)
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 10)
    weight = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer.weight, weight + 1)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, weight)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when shouting is enabled"):
        layer(x, adapter_names=["default", "__base__"])
    layer.update_layer("default", 2, lora_alpha=2, config=LoraConfig())  # and plain again
    torch.testing.assert_close(layer(x), layer.base_layer(x))


# Merging


def test_a_broken_adapter_does_not_reach_the_base():
    layer = linear()
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_an_adapter_with_a_bias_needs_one_in_the_base_to_merge():
    with pytest.warns(PeftWarning, match="has no bias"):
        layer = linear(nn.Linear(10, 7, bias=False), lora_bias=True)
    weight = layer.weight.clone()
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        layer.merge()
    assert torch.equal(layer.weight, weight) and not layer.merged
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), formula(layer, x) + layer.lora_B["default"].bias * 2)


def test_merging_says_what_is_merged_already():
    layer = linear()
    layer.update_layer("b", 2, lora_alpha=2, config=LoraConfig())
    layer.merge()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()
    with pytest.warns(UserWarning, match="Already following adapters were merged default.*additionally merging b"):
        layer.merge(adapter_names=["default", "b"])
    assert layer.merged_adapters == ["default", "b"]
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    with pytest.raises(TypeError, match="should be a list of strings"):
        layer.merge(adapter_names="default")


def test_grouped_convolutions_do_not_merge():
    kind = KINDS["conv2d, groups"]
    layer = kind.make(kind.base())
    with pytest.raises(NotImplementedError, match="groups > 1"):
        layer.merge()
    assert not layer.merged


# Embedding


def test_a_scaled_embedding_scales_its_adapter():
    layer = layers.Embedding(ScaledEmbedding(11, 6), "default", LoraConfig(), r=2, lora_alpha=4)
    randomise(layer)
    i = torch.arange(5)
    delta = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T[i] * 2
    torch.testing.assert_close(layer(i), 3 * (layer.weight[i] + delta))
    layer.base_layer.embed_scale = torch.ones(6)
    with pytest.warns(PeftWarning, match="expected scalar"):
        layer(i)


# What Python costs


def test_the_way_of_one_plain_adapter_is_short():
    layer, x = linear(), torch.randn(2, 10)
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    layer(x)
    sys.setprofile(count)
    layer(x)
    sys.setprofile(None)
    assert calls <= 40, "the hot path of Linear.forward has grown"


def test_making_a_layer_fills_each_factor_twice_at_most():
    base = nn.Linear(10, 7)
    with torch.autograd.profiler.profile() as prof:
        layers.Linear(base, "default", LoraConfig(), r=4, lora_alpha=8)
    drawn = [e.name for e in prof.function_events if e.name in ("aten::uniform_", "aten::normal_")]
    assert len(drawn) == 3
