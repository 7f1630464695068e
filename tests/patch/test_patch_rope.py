"""Rotary embeddings inside an attention's own code: which are found, that no number changes, and that it comes off."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from patch_models import SIZES, assert_same, inputs_of, llama, lora, lora_llama, neox, run, traces
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import fastpeft
from fastpeft import patch, report, unpatch
from fastpeft.patch import rope as rope_module
from fastpeft.patch.own_code import OwnCodeForward, of_module
from fastpeft.patch.rope import Rotation

TINY: dict[str, Any] = SIZES | {
    "vocab_size": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTJ = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))


# Each model, and its form: interleaved, pairs, half the table, (B, T, H, D).
PLAIN = (False, False, False, False)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[bool, ...]]] = {
    "llama": (llama, PLAIN),
    "qwen3": (lambda: made("qwen3", **TINY, head_dim=16), PLAIN),
    "gemma3": (lambda: made("gemma3_text", **TINY, head_dim=16), PLAIN),
    "phi": (lambda: made("phi", **TINY), PLAIN),
    "gpt_neox": (neox, PLAIN),
    "stablelm": (lambda: made("stablelm", **TINY), PLAIN),
    "smollm3": (lambda: made("smollm3", **TINY), PLAIN),
    "cohere": (lambda: made("cohere", **TINY), (True, False, False, False)),
    "glm4": (lambda: made("glm4", **TINY, head_dim=16), (True, True, True, False)),
    "gptj": (lambda: made("gptj", **GPTJ, vocab_size=128), (True, True, False, True)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of q that the operator was called with."""
    shapes: list[tuple[int, ...]] = []
    operator = rope_module.rope

    def counted(q: Tensor, *args: Any) -> Any:
        shapes.append(tuple(q.shape))
        return operator(q, *args)

    monkeypatch.setattr(rope_module, "rope", counted)
    return shapes


def turned(model: nn.Module) -> dict[nn.Module, OwnCodeForward]:
    """The forwards with a rotation, under whatever else stands on their modules."""
    return {module: forward for module in model.modules() if (forward := of_module(module)) is not None}


def rotations_of(forward: OwnCodeForward) -> list[Rotation]:
    return [substitute for substitute in forward.substitutes.values() if isinstance(substitute, Rotation)]


def rope_rows(model: nn.Module) -> list[Any]:
    return [row for row in report(model).rows if row.kind == "RoPE"]


@pytest.mark.parametrize("name", MODELS)
def test_found_by_what_is_computed_and_no_number_changes(name: str, calls: list[Any]) -> None:
    make, form = MODELS[name]
    model = lora(make())
    model.eval()  # no dropout of the model's own
    before = run(model)
    patch(model)
    assert [row.fused for row in rope_rows(model)] == ["rope"] * 2
    for forward in turned(model).values():
        (rotation,) = rotations_of(forward)
        found = rotation.form
        assert (found.interleaved, found.pairs, found.half, found.transposed) == form
    calls.clear()
    for forward in turned(model).values():
        for rotation in rotations_of(forward):
            rotation.probing = True  # whatever the size
    assert_same(run(model), before)
    assert len(calls) == (4 if name == "gptj" else 2)  # GPT-J turns q and k one by one
    unpatch(model)
    assert not traces(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    calls.clear()
    again = run(model)
    assert torch.equal(again[0], before[0]) and not calls


@pytest.mark.parametrize("library", ["peft", "fastpeft"])
def test_below_the_forward_that_opens_a_group(library: str, calls: list[Any]) -> None:
    model = lora_llama(library)
    before = run(model)
    patch(model)
    for module, forward in turned(model).items():
        assert module.__dict__["forward"] is not forward and module.__dict__["forward"].previous is forward
    calls.clear()
    assert_same(run(model), before)
    assert len(calls) == 2
    patch(model, blocks="never")
    assert not turned(model) and not rope_rows(model)


def test_generation_with_a_cache(calls: list[Any]) -> None:
    model = llama().eval()
    ids = inputs_of(model)["input_ids"][:, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    patch(model)
    calls.clear()
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(calls) == 16 and calls[-1][2] == 1


def test_compiled() -> None:
    model = lora_llama()
    before = run(model)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    output = compiled(**inputs_of(model))
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same((output.logits.detach(), gradients), before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stand_alone(how: str, calls: list[Any]) -> None:
    model = patch(lora_llama())
    before = run(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert len(turned(twin)) == 2
    for module, forward in turned(twin).items():
        assert forward.module is module
    unpatch(model)
    run(twin)  # tries the functions of where it is
    calls.clear()
    assert_same(run(twin), before)
    assert len(calls) == 2
    unpatch(twin)
    assert not traces(twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpointing(reentrant: bool, calls: list[Any]) -> None:
    model = lora_llama()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    before = run(model)
    patch(model)
    calls.clear()
    assert_same(run(model), before)
    assert len(calls) == 4  # once more for the backward


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_our_checkpointing(mode: str, calls: list[Any]) -> None:
    model = lora_llama().train()
    before = run(model)
    patch(model, checkpoint=mode)
    calls.clear()
    assert_same(run(model), before)
    assert len(calls) >= 2
    unpatch(model)
    assert not traces(model)


def test_autocast_keeps_its_dtypes(calls: list[Any]) -> None:
    """Under autocast q is bf16 and the tables are fp32, so the model's own function returns fp32: it must stay so."""
    model = patch(lora_llama())
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert all(shape[2] == rope_module._TOKENS for shape in calls)  # trials only


def test_patched_under_autocast_and_used_without(calls: list[Any]) -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        patch(model)
    assert [row.fused for row in rope_rows(model)] == ["rope"] * 2
    calls.clear()
    run(model)
    assert len(calls) == 2


def test_what_other_code_does_to_the_function_counts(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    model = patch(llama())
    used: list[int] = []
    function = modeling_llama.apply_rotary_pos_emb

    def theirs(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs)
    calls.clear()
    run(model)
    assert len(used) == 2 and not calls


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation, in other words."""
    a, b = x.chunk(2, -1)
    first, second = cos[:, None, :, : a.shape[-1]], sin[:, None, :, : a.shape[-1]]
    return torch.cat([a * first - b * second, b * first + a * second], -1)


def almost(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation of the test before, with a number of its own."""
    return halves(x, cos, sin) * 1.001


def logged(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)

    def turned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles = torch.arange(x.shape[1])[:, None] * torch.logspace(0, -2, 8)
        angles = torch.cat([angles, angles], -1)[None]
        return self.q(x).view(*x.shape[:2], 2, 16).transpose(1, 2), angles.cos(), angles.sin()


class Right(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, cos, sin = self.turned(x)
        return halves(q, cos=cos, sin=sin).sum(1)


class Wrong(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return almost(*self.turned(x)).sum(1)


class Decorated(Attention):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return halves(*self.turned(x)).sum(1)


@pytest.mark.parametrize(("kind", "fused"), [(Right, True), (Wrong, False), (Decorated, True)])
def test_code_that_nobody_has_seen(kind: Any, fused: bool, calls: list[Any]) -> None:
    model, x = nn.Sequential(kind()), torch.randn(2, 80, 32)
    before = model(x)
    fastpeft.patch(model, example_inputs=torch.randn(2, 5, 32))
    (row,) = rope_rows(model)
    assert (row.fused == "rope") is fused and (fused or "no fused form" in row.reason)
    calls.clear()
    torch.testing.assert_close(model(x), before)
    assert len(calls) == fused
    unpatch(model)
    assert not traces(model)


def test_a_forward_of_other_code_is_left() -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    theirs = attention.forward
    attention.forward = theirs
    patch(model)
    rows = rope_rows(model)
    assert [row.fused for row in rows] == ["rope", None] and "other code" in rows[1].reason
    unpatch(model)
    assert attention.__dict__["forward"] is theirs
