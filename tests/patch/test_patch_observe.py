"""The observing forward: what it finds, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patch_models import MODELS, groups_of, inputs_of, llama, lora, lora_llama
from torch import Tensor, nn

from fastpeft import patch, report
from fastpeft.patch.inputs import NoInput, example_call, synthesise
from fastpeft.patch.observe import observe


@pytest.mark.parametrize("name", MODELS)
def test_an_input_is_made_for_every_kind_of_model(name: str) -> None:
    model = MODELS[name]()
    target, args, kwargs = example_call(lora(model))
    assert target is model and not args
    model(**kwargs)


def test_which_modules_share_an_input_and_which_outputs_are_kept() -> None:
    model = llama()
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    seen = observe(linears, model, (), synthesise(model))
    layer = model.model.layers[0]
    first = next(s for s in seen.shared if s.caller is layer.self_attn)
    attention, mlp = layer.self_attn, layer.mlp
    assert first.modules == [attention.q_proj, attention.k_proj, attention.v_proj]
    assert first.kept == [False, False, True]  # q and k are turned by RoPE and die
    second = next(s for s in seen.shared if s.caller is mlp)
    assert second.modules == [mlp.gate_proj, mlp.up_proj] and second.kept == [True, True]


def test_nothing_is_changed_by_looking() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.norm.running_mean = self.norm.running_mean + 1
            torch.rand(3)
            return self.drop(self.norm(self.a(x) + self.b(x)))

    model = Stateful()
    model.drop.train()
    model.norm.eval()
    x, mean, rng = torch.randn(4, 8), model.norm.running_mean, torch.get_rng_state()
    seen = observe([model.a, model.b], model, (x,), {})
    assert [s.modules for s in seen.shared] == [[model.a, model.b]]
    assert model.calls == 0 and model.norm.running_mean is mean and torch.equal(torch.get_rng_state(), rng)
    assert model.training and model.drop.training and not model.norm.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_everything_is_put_back_when_the_forward_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("disk")

    model = nn.Sequential(nn.Linear(8, 8), Failing())
    with pytest.raises(OSError, match="disk"):
        observe([model[0]], model, (torch.randn(4, 8),), {})
    assert model.training and model[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_cannot_be_run_is_patched_layer_by_layer() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    model = lora(Unknown(), target_modules=["q", "k"])
    patch(model)
    assert "example_inputs" in report(model).note and not groups_of(model)
    assert [r.fused for r in report(model).rows] == ["lora_linear"] * 2
    x = torch.randn(3, 50, 64)
    for example in (x, (x,), {"x": x}):
        fresh = lora(Unknown(), target_modules=["q", "k"])
        patch(fresh, example_inputs=example)
        assert groups_of(fresh) == {("q", "k"): 1} and report(fresh).note is None


def test_a_forward_that_fails_is_named_in_the_report() -> None:
    model = lora_llama()
    patch(model, example_inputs={"input_ids": torch.tensor([[1000]])}, loss="never")
    assert "IndexError" in report(model).note and not groups_of(model)
    assert all(r.fused == "lora_linear" for r in report(model).rows)


def test_a_module_whose_main_input_is_unknown() -> None:
    class Odd(nn.Module):
        main_input_name = "smell"
        config: Any = None

    with pytest.raises(NoInput, match="smell"):
        example_call(Odd())


def test_patch_does_not_disturb_a_step_under_way() -> None:
    """Gradients accumulated before, and the graph of a loss not yet run backward, are as they would be."""
    losses = []
    for patched in (False, True):
        model = lora_llama()
        inputs = inputs_of(model)
        model(**inputs).loss.backward()
        loss = model(**inputs).loss
        if patched:
            patch(model, stack="always")
        loss.backward()
        losses.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*losses))
