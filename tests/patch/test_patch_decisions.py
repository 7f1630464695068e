"""What is left as it is, and that the report says why; what verification refuses; what a failure leaves behind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from patch_models import all_groups, assert_same, groups_of, llama, lora, lora_llama, run, traces
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import Parameter

from fastpeft import patch, report
from fastpeft.patch import apply as apply_module
from fastpeft.patch import forwards as forwards_module
from fastpeft.patch import group as group_module
from fastpeft.patch.tolerance import FACTOR, distance


def q_proj(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].self_attn.q_proj


def adapters(model: Any) -> list[Any]:
    """The report's rows of adapter layers."""
    return [row for row in report(model).rows if row.kind.startswith("peft ")]


def two_active(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])


def hook_inside(model: Any) -> None:
    q_proj(model).lora_A["default"].register_forward_hook(lambda *a: None)


def replaced_forward(model: Any) -> None:
    module = q_proj(model)
    module.forward = module.forward


def replaced_base_forward(model: Any) -> None:
    base = q_proj(model).base_layer
    base.forward = base.forward


def subclassed_base(model: Any) -> None:
    class Quantised(nn.Linear):
        quant_state = None

    q_proj(model).base_layer.__class__ = Quantised


def other_dropout(model: Any) -> None:
    q_proj(model).lora_dropout["default"] = nn.AlphaDropout(0.1)


def sharded(model: Any) -> None:
    class Shard(Parameter):
        pass

    q_proj(model).base_layer.weight = Shard(q_proj(model).base_layer.weight.data, requires_grad=False)


def offloaded(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    accelerate.hooks.add_hook_to_module(q_proj(model).base_layer, hook)


def merged(model: Any) -> None:
    q_proj(model).merge()


LEFT: dict[Callable[[Any], None], str] = {
    two_active: "2 active adapters",
    hook_inside: "hooks inside",
    replaced_forward: "replaced the forward of the layer",
    replaced_base_forward: "replaced the forward of the base layer",
    subclassed_base: "quantised (Quantised)",
    other_dropout: "AlphaDropout",
    sharded: "Shard (sharded or quantised)",
    offloaded: "AlignDevicesHook",
    merged: "merged into the base weight",
}


@pytest.mark.parametrize("change", LEFT, ids=lambda f: f.__name__)
def test_left_as_it_is_with_the_reason(change: Callable[[Any], None]) -> None:
    model = lora_llama()
    change(model)
    before = run(model)
    forward = q_proj(model).__dict__.get("forward")
    patch(model)
    row = next(r for r in report(model).rows if r.module.endswith("layers.0.self_attn.q_proj"))
    assert row.fused is None and LEFT[change] in row.reason
    assert q_proj(model).__dict__.get("forward") is forward
    assert ("k_proj", "v_proj") in groups_of(model)  # its neighbours are a group without it
    assert_same(run(model), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "no fused form"),
    ],
)
def test_kinds_of_adapters_that_are_left(options: dict[str, Any], reason: str) -> None:
    with pytest.warns(UserWarning) if "lora_bias" in options else _nothing():
        model = lora_llama(**options)
    before, exact = run(model), run(copy.deepcopy(model).double())
    patch(model)
    rows = adapters(model)
    assert rows and all(row.fused is None and reason in row.reason for row in rows)
    # With lora_bias eager's own q_proj gradient is 6e-6 from float64, and ours 5e-6: 1.0e-5 apart.
    assert_as_exact(run(model), before, exact)


def assert_as_exact(ours: Any, theirs: Any, exact: Any) -> None:
    """Logits and every gradient err against float64 at most twice as much as the original's."""
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    triples = [(ours[0], theirs[0], exact[0]), *((ours[1][n], theirs[1][n], t) for n, t in exact[1].items())]
    for mine, other, true in triples:
        assert distance(mine, true) <= FACTOR * distance(other, true)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def test_members_that_differ_in_dropout_are_not_grouped() -> None:
    model = lora_llama(lora_dropout=0.1)
    q_proj(model).lora_dropout["default"].p = 0.2
    patch(model)
    assert groups_of(model)[("k_proj", "v_proj")] == 1 and groups_of(model)[("q_proj", "k_proj", "v_proj")] == 1
    q_proj(model, 1).lora_dropout["default"].p = 0.3  # changed later: the group does not hold any more
    group = next(g for g in all_groups(model) if len(g.members) == 3)
    x = torch.randn(2, 40, 64)
    model.train()
    assert group.compute(x) is None
    model.eval()
    assert group.compute(x) is not None


def test_tied_weights_are_never_moved() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = attention.k_proj.weight
    model = lora(model)
    before = run(model)
    patch(model, stack="always")
    rows = {r.module.rpartition("layers.")[2]: r for r in report(model).rows}
    assert "tied" in rows["0.self_attn.q_proj"].form and "one product" in rows["1.self_attn.q_proj"].form
    assert_same(run(model), before)


def test_weights_that_are_trained(device: torch.device) -> None:
    model = lora_llama(bias="none").to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name)
    before = run(model)
    patch(model, stack="always")
    assert all("trained" in r.form for r in report(model).rows if "group" in r.fused)
    assert_same(run(model), before)


class _Otherwise(nn.Linear):
    """A linear layer whose forward is its own: the same product in other words, or something else."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T * self.factor


def test_a_subclass_of_linear_is_taken_only_if_a_trial_agrees() -> None:
    for factor, verify, reason in ((1.0, True, None), (1.01, True, "not a linear layer"), (1.0, False, "verification")):
        model = lora_llama(target_modules=["o_proj"])
        base = model.base_model.model.model.layers[0].self_attn.o_proj.base_layer
        base.__class__ = _Otherwise
        base.factor = factor
        before = run(model)
        patch(model, verify=verify)
        row = adapters(model)[0]
        assert row.fused == "lora_linear" if reason is None else reason in row.reason
        assert_same(run(model), before)


def test_a_wrong_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification compares outputs and every gradient: an error anywhere leaves the layer alone."""
    model = lora_llama()
    before = run(model)
    right = forwards_module.lora_linear

    def wrong_output(*args: Any) -> Tensor:
        return right(*args) * 1.001

    def wrong_gradient(x: Tensor, *args: Any) -> Tensor:
        return right(x.detach(), *args) + 0 * x.sum()

    def wrong_dtype(*args: Any) -> Tensor:
        return right(*args).double()

    def failing(*args: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    reasons = {
        wrong_output: "output: relative error",
        wrong_gradient: "gradient of the input",
        wrong_dtype: "float64",
        failing: "no such kernel",
    }
    for operator, reason in reasons.items():
        monkeypatch.setattr(forwards_module, "lora_linear", operator)
        patch(model, form="plain" if operator is wrong_output else "auto", verify=True)
        rows = [r for r in report(model).rows if r.module.endswith("o_proj")]
        assert all(reason in r.reason for r in rows)
        model.__dict__.pop("_fastpeft_patch")
        assert_same(run(model), before)


def test_a_wrong_group_falls_back_to_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_llama()
    before = run(model)
    right = group_module.lora_linear_group
    monkeypatch.setattr(group_module, "lora_linear_group", lambda *a, **k: right(*a, **k)[::-1])
    patch(model, loss="never")
    assert not groups_of(model)
    assert {r.fused for r in adapters(model)} == {"lora_linear", "lora_linear, joined to act_fn"}
    assert_same(run(model), before)


def test_a_model_that_does_not_bear_the_outputs_of_one_product(device: torch.device) -> None:
    """Column blocks of a wider matrix are not contiguous; code that flattens them by `view` is found out in time."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).view(-1) + self.k(x).view(-1)

    model = lora(nn.Sequential(nn.LayerNorm(64), Attention()), target_modules=["q", "k"]).to(device)
    x = torch.randn(2, 40, 64, device=device)
    before = model(x).detach()
    patch(model, example_inputs=x[:1, :3], stack="always")
    assert not groups_of(model) and "view" in report(model).note
    assert all(r.fused == "lora_linear" for r in adapters(model))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not any(hasattr(p.untyped_storage(), "_fastpeft_block") for p in model.parameters())


def test_an_exception_leaves_nothing_half_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_llama()
    state = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    calls = []

    def interrupted(member: Any) -> None:
        calls.append(member)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(apply_module, "verify_alone", interrupted)
    before = run(model)
    with pytest.raises(KeyboardInterrupt):
        patch(model, stack="always")
    assert not traces(model)
    assert all(torch.equal(p, state[name][1]) for name, p in model.named_parameters())
    assert not any(hasattr(p.untyped_storage(), "_fastpeft_block") for p in model.parameters())
    assert torch.equal(run(model)[0], before[0])


def test_verification_leaves_no_trace(device: torch.device) -> None:
    model = lora_llama(lora_dropout=0.1).to(device).train()
    q_proj(model).eval()
    state = {name: (p, p.clone(), p.requires_grad, p._version) for name, p in model.named_parameters()}
    flags = {name: module.training for name, module in model.named_modules()}
    rng = torch.get_rng_state()
    patch(model, stack="never")
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: module.training for name, module in model.named_modules()} == flags
    for name, parameter in model.named_parameters():
        before, value, requires_grad, version = state[name]
        assert parameter is before and torch.equal(parameter, value)
        assert parameter.requires_grad is requires_grad and parameter._version == version and parameter.grad is None


def test_patched_while_disabled_or_in_inference_mode() -> None:
    model = lora_llama()
    before = run(model)
    with model.disable_adapter(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        patch(model)
    assert groups_of(model) and all(row.fused for row in adapters(model))
    assert_same(run(model), before)


def test_tolerance_is_that_of_the_dtype() -> None:
    """Twice the original's error is allowed, ten times is not."""
    truth = torch.randn(100, dtype=torch.float64)
    assert distance(truth.bfloat16(), truth) < 4e-3
    assert distance(torch.full((100,), float("nan")), truth) == float("inf")


def test_unknown_options() -> None:
    for options in ({"stack": "yes"}, {"form": "bordered?"}, {"blocks": "all"}):
        with pytest.raises(ValueError, match="patch: "):
            patch(lora_llama(), **options)


def test_report_data_and_table() -> None:
    model = lora_llama(target_modules=["q_proj", "k_proj", "o_proj"])
    unpatched = report(model)
    assert not unpatched.patched and len(unpatched.left) == 6 and "not patched" in str(unpatched)
    patch(model)
    data = report(model).to_dict()
    assert data["fused"] == len(data["rows"]) >= 6 and data["left"] == 0 and data["patched"] and data["note"] is None
    row = next(r for r in data["rows"] if r["module"].endswith("layers.1.self_attn.k_proj"))
    assert row["kind"] == "peft Linear" and "q_proj, k_proj" in row["fused"] and row["form"] and row["reason"] is None
    text = str(report(model))
    assert any("layers.{0-1}." in names for names, _, _ in report(model)._lines())
    assert text.count("o_proj") == 1  # one line for all layers


def test_names_of_layers_in_the_table() -> None:
    from fastpeft.patch.report import _common_name

    assert _common_name(["a.0.q", "a.0.k", "a.1.q", "a.1.k"]) == "a.{0-1}.q, k"
    assert _common_name(["a.7.q"]) == "a.7.q"
    assert _common_name([f"h.{i}.{j}.w" for i in (0, 2, 3) for j in (0, 1)]) == "h.{0,2-3}.{0-1}.w"


def test_the_package_can_be_called_as_the_function() -> None:
    """Importing one of its modules binds the package to `fastpeft.patch`; users call it all the same."""
    package = sys.modules["fastpeft.patch"]
    assert isinstance(package, ModuleType)
    model = lora_llama()
    assert package(model) is model and groups_of(model)


def test_a_join_that_fails_its_trial_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, "verify_joined", lambda group, producer: "its output is off by 1")
    model = lora_llama()
    before = run(model)
    patch(model)
    rows = {row.module.rpartition(".")[2]: row for row in report(model).rows}
    assert "not joined: its output is off by 1" in (rows["input_layernorm"].form or "")
    assert "group of q_proj" in rows["q_proj"].fused and "joined" not in rows["q_proj"].fused
    assert "not in a group: its output is off by 1" in (rows["o_proj"].form or "") or rows["o_proj"].fused
    assert_same(run(model), before)


def test_a_group_that_fails_its_trial_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, "verify_group", lambda group: "k_proj does not agree")
    model = lora_llama()
    before = run(model)
    patch(model)
    rows = {row.module.rpartition(".")[2]: row for row in report(model).rows}
    assert rows["q_proj"].fused == "lora_linear"
    assert "not in a group: k_proj does not agree" in (rows["q_proj"].form or "")
    assert_same(run(model), before)
