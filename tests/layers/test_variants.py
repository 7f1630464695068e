"""LoRA's smaller relatives (BD-LoRA, VeLoRA, KaSA, MiCA) against PEFT's: same tensors, outputs, gradients, files."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft import configs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(24, 32)
        self.outer = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


METHODS = {
    "bd": {
        "use_bdlora": (
            "BdLoraConfig",
            {"target_modules_bd_a": ["outer"], "target_modules_bd_b": ["inner"], "nblocks": 4},
        )
    },
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 5})},
    "velora once": {"velora_config": ("VeloraConfig", {"num_groups": 4, "init_type": "batch_average_once"})},
    "velora random": {"velora_config": ("VeloraConfig", {"num_groups": 7, "init_type": "random", "scale": 1.5})},
    "kasa": {"kasa_config": ("KasaConfig", {})},
    "mica": {"init_lora_weights": "mica"},
}


def make(library, method, model=None, **changes):
    parts = configs if library is fastpeft else library.tuners.lora.config
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["inner", "outer"], "lora_dropout": 0.0, **changes}
    for name, value in METHODS[method].items():
        options[name] = getattr(parts, value[0])(**value[1]) if isinstance(value, tuple) else value
    torch.manual_seed(1)
    return library.get_peft_model(model or Net(), library.LoraConfig(**options))


def batch():
    return torch.randn(10, 24, generator=torch.Generator().manual_seed(2))


def train(model, steps=3):
    """Losses, and the gradients of the last step."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.train()(batch()).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_equals_peft(method, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = make(peft, method), make(fastpeft, method)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-5, msg=name)
    (losses, grads), (their_losses, their_grads) = train(ours), train(theirs)
    assert losses == pytest.approx(their_losses, rel=1e-5)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], atol=1e-6, rtol=1e-4, msg=name)
    want = ours.eval()(batch())
    for saver, loader, folder in ((ours, peft, "ours"), (theirs, fastpeft, "theirs")):
        saver.save_pretrained(tmp_path / folder)
        again = loader.PeftModel.from_pretrained(Net(), tmp_path / folder).eval()
        torch.testing.assert_close(again(batch()), want, atol=1e-5, rtol=1e-4)
    a, b = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


@pytest.mark.parametrize("method", METHODS)
def test_merged_computes_the_same(method):
    model = make(fastpeft, method)
    train(model)
    want = model.eval()(batch())
    weight = model.base_model.model.inner.get_base_layer().weight.clone()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(batch()), want, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.inner.get_base_layer().weight, weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(batch()), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_deleting_leaves_nothing(method):
    model = make(fastpeft, method)
    model.add_adapter("other", model.peft_config["default"])
    model.delete_adapter("default")
    assert not any(".default" in name for name in model.state_dict())
    train(model)


def test_velora_keeps_projections_instead_of_the_input():
    model = make(fastpeft, "velora random", target_modules=["inner"])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train().base_model.model.inner(torch.randn(50, 24))
    sizes = [t.numel() for t in kept if t.shape[:1] == (50,)]
    assert 50 * 7 in sizes and 50 * 24 not in sizes


def test_bd_lora_names_must_match_one_list():
    with pytest.raises(ValueError, match="matches neither A nor B"):
        fastpeft.get_peft_model(
            Net(), fastpeft.LoraConfig(target_modules=["inner"], use_bdlora=configs.BdLoraConfig(["outer"], [], 2))
        )
    with pytest.raises(ValueError, match="not divisible by nblocks=5"):
        fastpeft.get_peft_model(
            Net(), fastpeft.LoraConfig(target_modules=["inner"], use_bdlora=configs.BdLoraConfig(["inner"], [], 5))
        )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("merge_first", [False, True])
def test_kasa_reduces_the_base_once_whenever_it_is_loaded(tmp_path, low_cpu_mem_usage, merge_first):
    model = make(fastpeft, "kasa")
    train(model)
    want = model.eval()(batch())
    model.save_pretrained(tmp_path)
    again = fastpeft.PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    if merge_first:
        again.merge_adapter()
    for _ in range(2):
        torch.testing.assert_close(again(batch()), want, atol=1e-5, rtol=1e-4)


def test_kasa_is_for_all_adapters_or_none():
    model = make(fastpeft, "kasa")
    with pytest.raises(ValueError, match="KaSA cannot be combined"):
        model.add_adapter("plain", fastpeft.LoraConfig(target_modules=["inner"]))
    with pytest.raises(ValueError, match="KaSA requires `r`"):
        make(fastpeft, "kasa", r=16)
    loss = model.base_model._get_kasa_loss()
    loss.backward()
    assert model.base_model.model.inner.lora_diag["default"].grad is not None


def test_mica_trains_A_alone_whatever_is_switched():
    model = make(fastpeft, "mica")
    layer = model.base_model.model.inner

    def trainable():
        return {name for name, p in layer.named_parameters() if p.requires_grad}

    assert trainable() == {"lora_A.default.weight"}
    model.add_adapter("plain", fastpeft.LoraConfig(target_modules=["inner"]))
    model.set_adapter("plain")
    assert trainable() == {"lora_A.plain.weight", "lora_B.plain.weight"}
    model.set_adapter("default")
    with model.disable_adapter():
        assert not trainable()
    assert trainable() == {"lora_A.default.weight"}


def test_combination_that_does_not_exist():
    with pytest.raises(ValueError, match="Invalid or unsupported variant combination: .* use_dora with use_bdlora"):
        make(fastpeft, "bd", use_dora=True)
    with pytest.raises(ValueError, match="VeLoRA does not support adapting conv layers"), warnings.catch_warnings():
        net = nn.Sequential(nn.Conv2d(3, 4, 1))
        fastpeft.get_peft_model(net, fastpeft.LoraConfig(target_modules=["0"], velora_config=configs.VeloraConfig()))
