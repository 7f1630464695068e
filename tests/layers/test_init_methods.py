"""Initialisations from the weight, its inputs or its gradient: PEFT's tensors from the same seed and data."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft import configs, layers
from fastpeft.configs import LoraConfig

N, K, R = 64, 40, 6
METHODS = ["pissa", "pissa_niter_4", "olora", "corda", "orthogonal", "eva"]
LORA_GA = [(d, "stable") for d in ("ArBr", "A2rBr", "ArB2r", "random")] + [
    ("ArB2r", s) for s in ("weight_svd", "gd_scale", "unit")
]


def base_layer(conv1d=False, dtype=torch.float32):
    torch.manual_seed(0)
    layer = Conv1D(N, K) if conv1d else nn.Linear(K, N)
    return layer.to(dtype).requires_grad_(False)


def build(method, library=layers, config_module=configs, conv1d=False, dtype=torch.float32, **config):
    base = base_layer(conv1d, dtype)
    torch.manual_seed(1)
    if method == "corda":
        base.eigens = SimpleNamespace(U_WC=torch.randn(N, R), S_WC=torch.rand(R), V_WC=torch.randn(K, R))
    if method == "lora_ga" and "lora_ga_config" not in config:
        base._peft_loraga_grad = torch.randn(base.weight.shape)
        direction, scale = config.pop("ga")
        config["lora_ga_config"] = config_module.LoraGAConfig(direction=direction, scale=scale)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`init_lora_weights` is")
        options = config_module.LoraConfig(
            r=R, lora_alpha=9, init_lora_weights=method, target_modules=["x"], fan_in_fan_out=conv1d, **config
        )
    extra = {"is_target_conv_1d_layer": True} if conv1d else {}
    return library.Linear(base, "default", r=R, lora_alpha=9, config=options, **extra)


def assert_same(method, conv1d=False, dtype=torch.float32, **config):
    peft = pytest.importorskip("peft")
    theirs = build(method, peft.tuners.lora.layer, peft.tuners.lora.config, conv1d, dtype, **config)
    after = torch.get_rng_state()
    ours = build(method, conv1d=conv1d, dtype=dtype, **config)
    assert torch.equal(torch.get_rng_state(), after)  # whatever is drawn next is the same too
    want = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert value.dtype == want[name].dtype, name
        torch.testing.assert_close(value, want[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equals_peft(method, conv1d, dtype):
    if method == "olora" and conv1d:
        pytest.skip("PEFT's factors do not fit a layer that stores its weight transposed")
    assert_same(method, conv1d, dtype)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("ga", LORA_GA)
def test_lora_ga_equals_peft(ga, conv1d):
    assert_same("lora_ga", conv1d, ga=ga)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "lora_ga"])
def test_layer_computes_at_first_what_it_did_without_adapter(method, conv1d):
    layer = build(method, conv1d=conv1d, **({"ga": ("ArB2r", "stable")} if method == "lora_ga" else {}))
    x = torch.randn(5, K)
    torch.testing.assert_close(layer(x), base_layer(conv1d)(x), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_base_layer().weight.stride(), base_layer(conv1d).weight.stride())


def test_loading_leaves_factors_on_meta_but_changes_the_base():
    # The file fills A and B afterwards; the base weight they belong to must be the changed one.
    want = build("pissa")
    base = base_layer()
    config = LoraConfig(r=R, lora_alpha=9, init_lora_weights="pissa", target_modules=["x"])
    with torch.device("meta"):
        layer = layers.Linear(base, "default", r=R, lora_alpha=9, config=config)
    assert layer.lora_A["default"].weight.is_meta
    torch.testing.assert_close(layer.get_base_layer().weight, want.get_base_layer().weight)


def test_embeddings_start_as_always_and_convolutions_refuse():
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["x"])
    embedding = layers.Embedding(nn.Embedding(20, 8), "default", r=4, lora_alpha=4, config=config)
    assert not embedding.lora_embedding_A["default"].any()
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='pissa' for lora.Conv2d"):
        layers.Conv2d(nn.Conv2d(4, 8, 3), "default", r=4, lora_alpha=4, config=config)


@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("orthogonal", {"r": 5}, "rank to be even, got 5"),
        ("corda", {}, "run `preprocess_corda` first"),
        ("lora_ga", {"grad": True}, "lora_ga_config must be provided"),
        ("lora_ga", {"grad": True, "lora_ga_config": {}, "r": 24}, "r=24 is too much"),
    ],
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")
def test_errors(method, damage, message):
    base, r = base_layer(), damage.pop("r", 4)
    if damage.pop("grad", False):
        base._peft_loraga_grad = torch.randn(N, K)
    before = base.weight.clone()
    config = LoraConfig(r=r, init_lora_weights=method, target_modules=["x"], **damage)
    with pytest.raises(ValueError, match=message):
        layers.Linear(base, "default", r=r, lora_alpha=4, config=config)
    assert torch.equal(base.weight, before)


def test_quantised_storage_is_refused():
    base = nn.Linear(8, 8, bias=False)
    base.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    config = LoraConfig(r=2, init_lora_weights="pissa", target_modules=["x"])
    with pytest.raises(TypeError, match="initialize PiSSA under float32, float16, or bfloat16, not torch.int8"):
        layers.Linear(base, "default", r=2, lora_alpha=4, config=config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_equals_peft(monkeypatch, bits, iterations):
    utils = pytest.importorskip("peft.utils.loftq_utils")
    theirs = inspect.unwrap(utils.loftq_init)  # which computes on "cuda", and is to be compared here
    consts = tuple("cpu" if const == "cuda" else const for const in theirs.__code__.co_consts)
    monkeypatch.setattr(theirs, "__code__", theirs.__code__.replace(co_consts=consts))
    weight = base_layer().weight
    want_weight, want_A, want_B = utils.loftq_init(weight, num_bits=bits, reduced_rank=R, num_iter=iterations)
    config = LoraConfig(
        r=R,
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": bits, "loftq_iter": iterations},
        target_modules=["x"],
    )
    layer = layers.Linear(base_layer(), "default", r=R, lora_alpha=R, config=config)
    for got, want in (
        (layer.get_base_layer().weight, want_weight),
        (layer.lora_A["default"].weight.abs(), want_A.abs()),  # up to the sign of the singular vectors
        (layer.lora_B["default"].weight.abs(), want_B.abs()),
        (layer.get_delta_weight("default"), want_B @ want_A),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_quantisation(bits):
    pytest.importorskip("bitsandbytes")
    base = base_layer()
    original = base.weight.clone()
    config = LoraConfig(
        r=16, init_lora_weights="loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 3}, target_modules=["x"]
    )
    layer = layers.Linear(base, "default", r=16, lora_alpha=16, config=config)
    alone = (layer.get_base_layer().weight - original).norm()
    assert (layer.get_base_layer().weight + layer.get_delta_weight("default") - original).norm() < 0.8 * alone
