"""What an initialisation measures first, and adapters of a changed base written as plain LoRA: the numbers of PEFT."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastpeft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(24, 32)
        self.outer = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


X = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))


def config_of(library, method, **changes):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["inner", "outer"], "init_lora_weights": method, **changes}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`init_lora_weights` is")
        parts = library if library is fastpeft else library.tuners.lora.config
        if method == "corda":
            options["corda_config"] = parts.CordaConfig(**options.pop("part", {}))
        if method == "lora_ga":
            options["lora_ga_config"] = parts.LoraGAConfig(**options.pop("part", {}))
        return library.LoraConfig(**options)


def preprocess_corda(library):
    home = library if library is fastpeft else importlib.import_module("peft.tuners.lora.corda")
    return home.preprocess_corda


def prepared(library, method, **changes):
    model, config = Net(), config_of(library, method, **changes)
    if method == "corda":
        preprocess_corda(library)(model, config, lambda: model(X))
    if method == "lora_ga":
        preprocess = library.preprocess_loraga if library is fastpeft else library.tuners.lora.preprocess_loraga
        preprocess(model, config, lambda: model(X).square().sum().backward())
    torch.manual_seed(2)
    return library.get_peft_model(model, config)


def assert_same_up_to_sign(ours, theirs):
    """A and B may have the sign of a singular vector swapped, in both."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].abs(), theirs[name].abs(), atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    ("method", "part"),
    [("corda", {"corda_method": "ipm"}), ("corda", {"corda_method": "kpm"}), ("lora_ga", {"direction": "ArBr"})],
)
def test_equals_peft(method, part):
    peft = pytest.importorskip("peft")
    ours, theirs = prepared(fastpeft, method, part=part), prepared(peft, method, part=part)
    assert_same_up_to_sign(fastpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(X), Net()(X), atol=1e-4, rtol=1e-4)
    assert not any(name in vars(m) for m in ours.modules() for name in ("eigens", "covariance_matrix", "sample_count"))
    assert not any(p.grad is not None for p in ours.parameters())


def test_corda_files_are_peft_s(tmp_path):
    peft = pytest.importorskip("peft")
    part = {"cache_file": str(tmp_path / "a" / "cache.pt"), "covariance_file": str(tmp_path / "covariance.pt")}
    first = prepared(fastpeft, "corda", part=part)
    model, config = Net(), config_of(peft, "corda", part=part)
    preprocess_corda(peft)(model, config)  # needs no data any more
    second = peft.get_peft_model(model, config)
    torch.testing.assert_close(second(X), first(X), atol=1e-5, rtol=1e-4)
    (tmp_path / "a" / "cache.pt").unlink()
    model, config = Net(), config_of(fastpeft, "corda", part=part)
    fastpeft.preprocess_corda(model, config)
    third = fastpeft.get_peft_model(model, config)
    torch.testing.assert_close(third(X), first(X), atol=1e-5, rtol=1e-4)


def test_lora_ga_file(tmp_path):
    cache, config = tmp_path / "gradients.pt", config_of(fastpeft, "lora_ga")
    model = Net()
    fastpeft.preprocess_loraga(model, config, lambda: model(X).sum().backward(), cache)
    again = Net()
    fastpeft.preprocess_loraga(again, config, lambda: pytest.fail("must read the file"), cache)
    torch.testing.assert_close(again.inner._peft_loraga_grad, model.inner._peft_loraga_grad)
    assert model.inner.weight.requires_grad and model.training


def test_errors(tmp_path):
    config = config_of(fastpeft, "corda", part={"cache_file": str(tmp_path / "cache.pt")})
    model = Net()
    with pytest.raises(ValueError, match="run_model did not call inner"):
        fastpeft.preprocess_corda(model, config, lambda: None)
    fastpeft.preprocess_corda(model, config, lambda: model(X))
    other = nn.Sequential(Net())
    with pytest.raises(ValueError, match=r"has no '0.inner.eigens.S_WC'"):
        fastpeft.preprocess_corda(other, config)
    with pytest.raises(ValueError, match="names none of them"):
        fastpeft.preprocess_loraga(model, config_of(fastpeft, "lora_ga", target_modules=["absent"]), lambda: None)
    with pytest.raises(ValueError, match="gave no gradient to inner"):
        fastpeft.preprocess_loraga(Net(), config_of(fastpeft, "lora_ga"), lambda: None)


def train(model):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(X).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"outer": 3}, "alpha_pattern": {"inner": 9}}]
)
def test_changed_base_written_as_plain_lora(tmp_path, method, changes):
    peft = pytest.importorskip("peft")
    model = prepared(fastpeft, method, **changes)
    model.save_pretrained(tmp_path / "initial")
    train(model)
    want = model(X)
    assert not torch.allclose(want, Net()(X), atol=1e-3)
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert model.peft_config["default"].to_dict() == before
    for library in (fastpeft, peft):
        plain = library.PeftModel.from_pretrained(Net(), tmp_path / "plain")
        torch.testing.assert_close(plain(X), want, atol=1e-4, rtol=1e-4)
        assert plain.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("method", ["pissa", "olora", "orthogonal", "gaussian"])
def test_files_of_a_changed_base_load_in_peft(tmp_path, method):
    """Which changes its base in the same way when it loads them."""
    peft = pytest.importorskip("peft")
    model = prepared(fastpeft, method)
    train(model)
    want = model(X)
    model.save_pretrained(tmp_path)
    for library in (fastpeft, peft):
        again = library.PeftModel.from_pretrained(Net(), tmp_path)
        torch.testing.assert_close(again(X), want, atol=1e-5, rtol=1e-4)


def test_modules_to_save_survive_the_conversion(tmp_path):
    model = prepared(fastpeft, "pissa", target_modules=["inner"], modules_to_save=["outer"])
    model.save_pretrained(tmp_path / "initial")
    train(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert "base_model.model.outer.weight" in load_file(tmp_path / "plain" / "adapter_model.safetensors")
    plain = fastpeft.PeftModel.from_pretrained(Net(), tmp_path / "plain")
    torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-4)


def test_conversion_that_cannot_be(tmp_path):
    initial = prepared(fastpeft, "pissa", r=2)
    initial.save_pretrained(tmp_path / "initial")
    path = {"path_initial_model_for_weight_conversion": tmp_path / "initial"}
    with pytest.raises(fastpeft.AdapterFileError, match=r"\(4, 24\): the initial adapter in .* has shape \(2, 24\)"):
        prepared(fastpeft, "pissa").save_pretrained(tmp_path / "plain", **path)
    with pytest.raises(ValueError, match="full rank"):
        prepared(fastpeft, "pissa", use_dora=True).save_pretrained(tmp_path / "plain", **path)
    with pytest.warns(UserWarning, match="Using Rank-Stabilized LoRA with rank_pattern"):
        rslora = prepared(fastpeft, "pissa", use_rslora=True, rank_pattern={"outer": 3})
    with pytest.raises(ValueError, match="not supported when using `rank_pattern`"):
        rslora.save_pretrained(tmp_path / "plain", **path)
    assert not (tmp_path / "plain" / "adapter_model.safetensors").exists()
