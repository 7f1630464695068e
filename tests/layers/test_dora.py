"""DoRA layers against PEFT's, and against themselves: merged, unmerged, rounded, several at once."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from masks import exchanged_masks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fastpeft import layers
from fastpeft.configs import LoraConfig
from fastpeft.layers.dora import DoraCaching

KINDS = {
    "linear": ("Linear", lambda: nn.Linear(24, 36), (3, 5, 24)),
    "no bias": ("Linear", lambda: nn.Linear(24, 36, bias=False), (3, 24)),
    "Conv1D": ("Linear", lambda: Conv1D(36, 24), (3, 5, 24)),
    "embedding": ("Embedding", lambda: nn.Embedding(50, 16), (3, 7)),
    "conv1d": ("Conv1d", lambda: nn.Conv1d(6, 10, 3), (2, 6, 9)),
    "conv2d": ("Conv2d", lambda: nn.Conv2d(6, 10, 3, padding=1, stride=2), (2, 6, 9, 9)),
    "grouped": ("Conv2d", lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 9, 9)),
    "conv3d": ("Conv3d", lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 5, 5)),
}


def options(kind, **changes):
    conv1d = kind == "Conv1D"
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["x"], "fan_in_fan_out": conv1d, **changes}
    return config, {"is_target_conv_1d_layer": True} if conv1d else {}


def build(kind, library=layers, config=LoraConfig, dtype=torch.float32, **changes):
    name, base, _ = KINDS[kind]
    torch.manual_seed(0)
    base = base().to(dtype).requires_grad_(False)
    config_options, extra = options(kind, **changes)
    layer = getattr(library, name)(base, "default", r=4, lora_alpha=6, config=config(**config_options), **extra)
    return layer


def example(kind, dtype=torch.float32):
    torch.manual_seed(1)
    shape = KINDS[kind][2]
    return torch.randint(0, 50, shape) if kind == "embedding" else torch.randn(shape).to(dtype)


def shake(layer):
    """Give every trainable parameter another value, so that no part of the formula is at its neutral start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "magnitude" in name:
                parameter *= torch.empty(parameter.shape).uniform_(0.7, 1.5).to(parameter.dtype)
            elif "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape).to(parameter.dtype)


def run(layer, x):
    """Output and the gradients of the adapter, for a fixed output gradient."""
    torch.manual_seed(3)
    y = layer(x)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return {"y": y.detach(), **{n: p.grad for n, p in layer.named_parameters() if p.requires_grad}}


def error(got, want):
    return max((got[k].double() - want[k].double()).norm() / want[k].double().norm().clamp_min(1e-12) for k in want)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(kind, dropout):
    peft = pytest.importorskip("peft")
    theirs = build(kind, peft.tuners.lora.layer, peft.LoraConfig, lora_dropout=dropout)
    ours = build(kind, lora_dropout=dropout)
    state = theirs.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert error(ours.state_dict(), state) < 1e-6
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    linear = kind in ("linear", "no bias", "Conv1D")  # other kinds draw their masks as PEFT does
    with exchanged_masks(theirs) if linear else contextlib.nullcontext():
        assert error(run(ours, example(kind)), run(theirs, example(kind))) < 1e-6


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d", "grouped"])
def test_nothing_as_large_as_the_weight_is_made(kind):
    """No B A, no identity, no copy of W: the norms take N r + r² numbers, and the rest is the size of the output."""
    wide = {
        "linear": (lambda: nn.Linear(128, 160), (2, 128)),
        "Conv1D": (lambda: Conv1D(160, 128), (2, 128)),
        "embedding": (lambda: nn.Embedding(900, 32), (3,)),
        "conv2d": (lambda: nn.Conv2d(48, 64, 3), (1, 48, 3, 3)),
        "grouped": (lambda: nn.Conv2d(48, 64, 3, groups=2), (1, 48, 3, 3)),
    }
    name, base, shape = KINDS[kind][0], *wide[kind]
    config, extra = options(kind)
    base = base().requires_grad_(False)
    layer = getattr(layers, name)(base, "default", r=4, lora_alpha=6, config=LoraConfig(**config), **extra)
    shake(layer)
    x = torch.randint(0, 900, shape) if kind == "embedding" else torch.randn(shape)
    known = {p.data_ptr() for p in layer.parameters()}
    made = [0]

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    made.append(t.untyped_storage().nbytes())
            return out

    with Made():
        y = layer(x)
        y.sum().backward()
    gradients = max(p.grad.nbytes for n, p in layer.named_parameters() if "lora" in n)
    assert max(made) <= max(gradients, y.nbytes, x.nbytes)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_bf16_is_no_less_accurate_than_peft(kind, adapter):
    peft = pytest.importorskip("peft")

    def made(library, config):
        layer = build(kind, library, config, torch.bfloat16, init_lora_weights=False)
        if adapter == torch.float32:  # as get_peft_model makes it
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        return layer

    theirs, ours = made(peft.tuners.lora.layer, peft.LoraConfig), made(layers, LoraConfig)
    assert {k: v.dtype for k, v in theirs.state_dict().items()} == {k: v.dtype for k, v in ours.state_dict().items()}
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = example(kind, torch.bfloat16)
    wide = copy.deepcopy(theirs).double()
    want = run(wide, x if kind == "embedding" else x.double())
    assert error(run(ours, x), want) <= 2 * error(run(theirs, x), want)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_nothing(kind, dtype):
    # to the bit: m is as exact as the norm it is divided by
    layer = build(kind, dtype=dtype)
    x = example(kind, dtype)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped"])
def test_merged_computes_the_same(kind, safe):
    layer = build(kind, init_lora_weights=False).eval()
    shake(layer)
    x, weight = example(kind), layer.get_base_layer().weight.clone()
    want = layer(x)
    layer.merge(safe_merge=safe)
    assert not torch.equal(layer.get_base_layer().weight, weight)
    torch.testing.assert_close(layer(x), want, atol=2e-6, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, weight, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("plain", [None, "default", "b", "c"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_several_active_adapters_merge_and_come_apart(kind, plain):
    # Each adapter's norm is that of the base weight alone, whatever has been merged before it.
    layer = build(kind, init_lora_weights=False, use_dora=plain != "default").eval()
    for name in ("b", "c"):
        config, extra = options(kind, init_lora_weights=False, use_dora=plain != name)
        layer.update_layer(name, 4, lora_alpha=6, config=LoraConfig(**config), **extra)
    layer.set_adapter(["default", "b", "c"])
    shake(layer)
    x, weight = example(kind), layer.get_base_layer().weight.clone()
    want = layer(x)
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["b", "c"])
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_safe_merge_leaves_the_base_alone_if_the_adapter_is_broken():
    layer = build("linear", init_lora_weights=False)
    weight = layer.get_base_layer().weight.clone()
    layer.lora_magnitude_vector["default"].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight) and not layer.merged


def test_row_of_zeros_gives_finite_numbers():
    base = nn.Linear(8, 4).requires_grad_(False)
    base.weight.data[1] = 0
    config = LoraConfig(r=2, use_dora=True, target_modules=["x"])
    layer = layers.Linear(base, "default", r=2, lora_alpha=2, config=config)
    assert all(value.isfinite().all() for value in run(layer, torch.randn(3, 8)).values())


def test_magnitude_learns_after_every_kind_of_step():
    # A norm remembered across a step would make this run differ from the one that recomputes everything densely.
    losses = []
    for dense in (False, True):
        layer = build("linear").train()
        x, target = example("linear"), torch.zeros(3, 5, 36)
        optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, fused=True)
        for _ in range(6):
            if dense:
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                weight = layer.get_base_layer().weight + layer.scaling["default"] * B @ A
                m = layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1).detach()
                y = nn.functional.linear(x, m.unsqueeze(1) * weight, layer.get_base_layer().bias)
            else:
                y = layer(x)
            loss = nn.functional.mse_loss(y, target)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-5)


def test_kept_for_the_backward():
    # x for dA, s for dB, the output itself for dm and two numbers an output; PEFT keeps four more like the weight and
    # the output.
    layer, x = build("linear"), torch.randn(64, 24)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    activations = sum(t.numel() for pointer, t in kept.items() if pointer not in own and t.numel() >= 64)
    assert activations == 64 * (24 + 4 + 36) + 2 * 36


def test_trains_after_inference_mode():
    # what was remembered in inference mode must not be a tensor that training cannot use
    layer = build("linear", init_lora_weights=False)
    with torch.inference_mode():
        want = layer(example("linear"))
    got = run(layer, example("linear"))
    torch.testing.assert_close(got["y"], want)


def test_no_adapter_by_sample():
    layer = build("linear")
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        layer(torch.randn(2, 24), adapter_names=["default", "__base__"])
    config = LoraConfig(r=4, target_modules=["x"], init_lora_weights=False)
    layer.update_layer("plain", 4, lora_alpha=4, config=config)
    layer(torch.randn(2, 24), adapter_names=["plain", "__base__"])


def test_trained_bias_gets_the_gradient_of_a_bias():
    layer = build("linear")
    layer.get_base_layer().bias.requires_grad_(True)
    shake(layer)
    y = layer(torch.randn(5, 24))
    y.sum().backward()
    torch.testing.assert_close(layer.get_base_layer().bias.grad, torch.full((36,), 5.0))


def test_compiles_into_one_graph():
    layer, x = build("linear", init_lora_weights=False), example("linear")
    shake(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_caching_in_evaluation(kind):
    layer, x = build(kind, init_lora_weights=False).eval(), example(kind)
    want = layer(x)
    with DoraCaching():
        assert torch.equal(layer(x), want)
        factors = layer.lora_embedding_B if kind == "embedding" else layer.lora_B
        factor = factors["default"] if kind == "embedding" else factors["default"].weight
        factor.data.mul_(2)
        kept = layer(x)  # the norm of before, as in PEFT
        assert not torch.equal(kept, build(kind, init_lora_weights=False).eval()(x))
        layer.train()
        new = layer(x)
        assert not torch.allclose(new, kept)
        layer.eval()
        assert torch.equal(layer(x), new)
    factor.data.mul_(0.5)
    assert torch.equal(layer(x), want)
    with DoraCaching():
        assert torch.equal(layer(x), want)
