"""Norms, activations and what they feed as one: when it is done, when it must not be, and that no number changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from patch_models import MODELS, all_groups, assert_same, inputs_of, llama, lora, lora_llama, run, traces
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from fastpeft import patch, report, unpatch
from fastpeft.measure import SavedActivations
from fastpeft.patch import producers as producers_module
from fastpeft.patch.producers import ActivationForward, Gated, NormForward
from fastpeft.patch.recognise import ActivationSpec, NormSpec, Spec, recognise


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The joined operators called, in order."""
    calls: list[str] = []
    for name in ("norm_linear", "glu_linear"):
        operator = getattr(producers_module, name)

        def counted(*args: Any, _name: str = name, _operator: Any = operator, **kwargs: Any) -> Any:
            calls.append(_name)
            return _operator(*args, **kwargs)

        monkeypatch.setattr(producers_module, name, counted)
    return calls


class ZeroCentred(nn.Module):
    """Gemma's norm, in other words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(0.1 * torch.randn(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        rows = rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + self.epsilon)
        return (rows + rows * self.weight.float()).to(x.dtype)


class Clipped(nn.Module):
    """Not quite an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).clamp(-2, 2) * self.weight


NORMS: dict[str, tuple[nn.Module, tuple[bool, float, float] | None]] = {
    "torch LayerNorm": (nn.LayerNorm(64, eps=1e-12), (True, 1e-12, 0.0)),
    "torch LayerNorm without bias": (nn.LayerNorm(64, bias=False), (True, 1e-5, 0.0)),
    "torch RMSNorm": (nn.RMSNorm(64, eps=1e-3), (False, 1e-3, 0.0)),
    "torch RMSNorm whose eps depends on the dtype": (nn.RMSNorm(64), None),
    "parameterless LayerNorm": (nn.LayerNorm(64, elementwise_affine=False), (True, 1e-5, 0.0)),
    "Gemma in other words": (ZeroCentred(64), (False, 1e-6, 1.0)),
    "almost a norm": (Clipped(64), None),
    "BatchNorm": (nn.BatchNorm1d(64), None),
    "a softmax": (nn.Softmax(-1), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_known_by_what_they_compute(name: str) -> None:
    module, expected = NORMS[name]
    known: list[Spec] = []
    spec = recognise(module, torch.randn(1, 5, 64), known)
    if expected is None:
        assert spec is None and not known
    else:
        assert isinstance(spec, NormSpec) and (spec.layer, spec.eps, spec.offset) == expected
        assert recognise(copy.deepcopy(module), torch.randn(2, 64), known) is spec


ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "mish": None,
    "leaky_relu": None,
    "linear": None,
}


@pytest.mark.parametrize("name", ACTS)
def test_activations_are_known_by_what_they_compute(name: str) -> None:
    spec = recognise(ACT2FN[name], torch.randn(1, 5, 64), [])
    assert (spec.act if isinstance(spec, ActivationSpec) else None) == ACTS[name]


def test_one_operator_each_and_no_other_numbers(joins: list[str]) -> None:
    model = lora_llama()
    before = run(model)
    patch(model)
    joins.clear()
    assert_same(run(model), before)
    assert joins == ["norm_linear", "norm_linear", "glu_linear"] * 2
    forms = {r.module.rpartition(".")[2]: r.form for r in report(model).rows}
    assert "q_proj, k_proj, v_proj" in forms["input_layernorm"] and "down_proj" in forms["act_fn"]


def test_blocks_never(joins: list[str]) -> None:
    model = lora_llama()
    patch(model, blocks="never")
    run(model)
    assert not joins and not any(isinstance(m.__dict__.get("forward"), NormForward) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_full_fine_tuning_gains_too(name: str) -> None:
    """Every weight trained and no adapter in sight: the same gradients, less kept."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before, kept = run(model), []
    for patched in (False, True):
        if patched:
            patch(model, loss="never")
        with SavedActivations(model) as saved:
            loss = model(**inputs_of(model)).loss
        kept.append(saved.bytes)
        del loss
    after = run(model)
    for gradients in (after[1], before[1]):  # zero but for rounding: softmax does not see what all keys have in common
        for key in [key for key in gradients if key.endswith(("key.bias", "k_proj.bias"))]:
            del gradients[key]
    assert_same(after, before)
    assert kept[1] < 0.9 * kept[0]
    unpatch(model)
    assert not traces(model)
    unpatched = run(model)[1]
    assert all(torch.equal(gradient, unpatched[name]) for name, gradient in before[1].items())


def test_a_frozen_model_without_adapters(joins: list[str]) -> None:
    model = llama().requires_grad_(False)
    x = inputs_of(model)
    expected = model(**x).logits
    patch(model)
    joins.clear()
    torch.testing.assert_close(model(**x).logits, expected, rtol=1e-5, atol=1e-5)
    assert not joins  # nothing would be kept of a frozen layer's input


def test_generation_padding_and_hidden_states() -> None:
    torch.manual_seed(0)
    model = lora_llama().eval()
    ids = torch.randint(3, 128, (2, 40))
    left = torch.ones_like(ids)
    left[0, :7] = 0
    positions = torch.arange(40).remainder(20)[None].expand(2, -1)  # two sequences packed in a row
    calls: list[dict[str, Any]] = [
        {"attention_mask": left},
        {"position_ids": positions},
        {"output_hidden_states": True},
    ]

    def look() -> list[Tensor]:
        found = [model.generate(ids, attention_mask=left, max_new_tokens=6, do_sample=False).float()]
        for options in calls:
            output = model(input_ids=ids, **options)
            found += [output.logits, *(output.hidden_states or ())]
        return found

    before = look()
    patch(model)
    for mine, theirs in zip(look(), before):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles() -> None:
    model = lora_llama()
    before = run(model)
    patch(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(copied), before)
        unpatch(copied)
        assert_same(run(copied), before)
    assert_same(run(model), before)
    unpatch(model)
    assert_same(run(pickle.loads(pickle.dumps(model))), before)


class Layer(nn.Module):
    """Norm, projections, activation, projection; what happens in between can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(64), nn.SiLU()
        self.q, self.gate, self.up = (nn.Linear(64, 64) for _ in range(3))
        self.down = nn.Linear(64, 64)
        self.between: Any = lambda x: x
        self.multiply: Any = lambda a, u: a * u

    def forward(self, x: Tensor) -> Tensor:
        n = self.between(self.norm(x))
        return self.q(n) + self.down(self.multiply(self.act(self.gate(n)), self.up(n)))


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    model = lora(nn.Sequential(Layer(), Layer()), target_modules=["q", "gate", "up", "down"]).base_model.model
    model.expected = copy.deepcopy(model)
    patch(model, example_inputs=torch.randn(1, 3, 64))
    return model


def check(model: Any, x: Tensor, change: Any = None) -> None:
    """The same output and input gradient as the copy that was not patched, after the same change to both."""
    results = []
    for sequence in (model, model.expected):
        if change is not None:
            change(sequence[0])
        x = x.detach().requires_grad_()
        y = sequence[1](sequence[0](x))
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *adapters(sequence)])])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def adapters(sequence: Any) -> list[Tensor]:
    return [p for i in (0, 1) for n, p in sequence[i].named_parameters() if "lora_" in n]


CHANGES: dict[str, Any] = {
    "as it is": lambda layer: None,
    "another tensor": lambda layer: setattr(layer, "between", lambda x: x.clone()),
    "written to": lambda layer: setattr(layer, "between", lambda x: x.mul_(2)),
    "a part of it": lambda layer: setattr(layer, "between", lambda x: x[:, ::2].repeat_interleave(2, 1)),
    "times a number": lambda layer: setattr(layer, "multiply", lambda a, u: a * 2 * u),
    "the other way round": lambda layer: setattr(layer, "multiply", lambda a, u: torch.mul(u, a)),
    "added": lambda layer: setattr(layer, "multiply", lambda a, u: a + u),
    "broadcast": lambda layer: setattr(layer, "multiply", lambda a, u: a * u[..., :1]),
    "used twice": lambda layer: setattr(layer, "multiply", lambda a, u: a * u + a.sum(-1, keepdim=True)),
    "in place": lambda layer: setattr(layer, "multiply", lambda a, u: a.mul_(u)),
    "another projection": lambda layer: setattr(layer, "q", copy.deepcopy(layer.q)),
    "other hooks": lambda layer: layer.gate.register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "a hook on the norm": lambda layer: layer.norm.register_forward_hook(lambda m, x, y: y * 2),
    "norm without weight": lambda layer: setattr(layer.norm, "weight", None),
    "checkpointed part": lambda layer: setattr(
        layer, "multiply", lambda a, u: checkpoint(lambda a, u: a * u, a, u, use_reentrant=False)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_code_that_does_something_else_in_between(layer: Any, name: str) -> None:
    check(layer, torch.randn(2, 40, 64), CHANGES[name])
    check(layer, torch.randn(1, 64))  # too small to be joined


def test_outputs_wait_no_longer_than_the_product_lives(layer: Any) -> None:
    group = layer[0].norm.forward.group
    n = layer[0].norm(torch.randn(2, 40, 64))
    waiting = [weakref.ref(y) for y in group.entry.outs]
    assert len(waiting) == 3 and all(ref() is not None for ref in waiting)
    del n
    gc.collect()
    assert group.entry is None and all(ref() is None for ref in waiting)


def test_an_old_product_is_computed_anew(layer: Any) -> None:
    first, second = torch.randn(2, 2, 40, 64)
    n = layer[0].norm(first)
    layer[0].norm(second)
    torch.testing.assert_close(layer[0].q(n), layer.expected[0].q(layer.expected[0].norm(first)), rtol=1e-4, atol=1e-4)


def test_dropout_between_in_training_is_noticed(joins: list[str]) -> None:
    """In evaluation the tensor passes a dropout untouched; joined, projections would be computed twice in training."""

    class Dropping(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Dropout(0.5)

    model = lora(nn.Sequential(Dropping()), target_modules=["q", "gate", "up", "down"])
    patch(model, example_inputs=torch.randn(1, 3, 64))
    joins.clear()
    model.train()(torch.randn(2, 40, 64))
    assert joins == ["glu_linear"]


def test_gated_is_a_tensor_like_any_other(layer: Any) -> None:
    gate = torch.randn(2, 40, 64, requires_grad=True)
    gated, expected = layer[0].act(gate), nn.functional.silu(gate)
    assert type(gated) is Gated and gated.shape == expected.shape and gated.dtype == expected.dtype
    torch.testing.assert_close(gated + 1, expected + 1)
    (ours,) = torch.autograd.grad(gated.sum(), gate)
    (theirs,) = torch.autograd.grad(expected.sum(), gate)
    torch.testing.assert_close(ours, theirs)
    assert "tensor(" in repr(gated) and torch.equal(pickle.loads(pickle.dumps(gated.detach())), expected)


def test_other_dtypes_are_tried_when_they_come(layer: Any) -> None:
    forward = layer[0].norm.forward
    assert isinstance(forward, NormForward) and len(forward.spec.outs) == 1
    with pytest.raises(RuntimeError, match="dtype"):
        forward(torch.randn(2, 40, 64).double())  # as the LayerNorm itself has it
    assert list(forward.spec.outs.values()) == [torch.float32, None]


def test_experts_activations_become_operators() -> None:
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    before = run(model)
    patch(model, loss="never")
    assert any(isinstance(m.__dict__.get("forward"), ActivationForward) for m in model.modules())
    assert_same(run(model), before)


def test_groups_under_their_norm_share_all_the_same_when_the_norm_cannot_join() -> None:
    """Under autocast of another dtype the norm returns fp32; its projections still are one call."""
    model = lora_llama()
    patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs_of(model)).loss.backward()
    assert all(group.entry is None for group in all_groups(model))
