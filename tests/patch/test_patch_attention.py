"""The operator inside an attention's own code: which calls it takes, that no number changes, and that it comes off."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import transformers
from patch_models import SIZES, assert_same, inputs_of, llama, lora, lora_llama, run, traces
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fastpeft import patch, report, unpatch
from fastpeft.measure import LiveMemory
from fastpeft.memory import install
from fastpeft.ops import decisions
from fastpeft.ops.backend import cpu_extension
from fastpeft.patch import attention as attention_module
from fastpeft.patch.own_code import OwnCodeForward, of_module

pytestmark = [pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")]

TOKENS = 20


@pytest.fixture(autouse=True)
def from_16_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which ours was measured to be faster."""
    monkeypatch.setattr(decisions, "attention_tokens", lambda: 16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Shape of q, heads of k, and causal, of each call of the operator."""
    found: list[tuple[Any, ...]] = []
    operator = attention_module.computed

    def counted(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        found.append((tuple(q.shape), k.shape[1], causal))
        return operator(q, k, v, causal, scale)

    monkeypatch.setattr(attention_module, "computed", counted)
    return found


def made(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))


def ids_of(model: nn.Module, tokens: int = TOKENS) -> Tensor:
    return torch.randint(5, 60, (2, tokens), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of what is trained."""
    model.zero_grad()
    logits = model(input_ids=ids_of(model)).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    named = model.named_parameters()  # adding the same to all logits of a row changes nothing: that gradient is noise
    return logits.detach(), {n: p.grad for n, p in named if p.grad is not None and not n.endswith("key.bias")}


def rows(model: nn.Module) -> list[Any]:
    return [row for row in report(model).rows if row.kind == "attention"]


TINY: dict[str, Any] = SIZES | {"vocab_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "llama": llama,
    "qwen3": lambda: made("qwen3", **TINY, head_dim=16),  # q and k are normalised
    "mistral": lambda: made("mistral", **TINY, sliding_window=64),
    "gpt2": lambda: made("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=128),  # no RoPE
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=128)),  # looks both ways
}


@pytest.mark.parametrize("name", MODELS)
def test_no_number_changes_and_it_comes_off(name: str, calls: list[Any]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = step(model)
    patch(model)
    assert [row.fused for row in rows(model)] == ["attention"] * 2
    calls.clear()
    assert_same(step(model), before)
    assert len(calls) == 2 and all(causal is (name != "bert") for *_, causal in calls)
    unpatch(model)
    assert not traces(model) and all("forward" not in module.__dict__ for module in model.modules())
    calls.clear()
    again = step(model)
    assert torch.equal(again[0], before[0]) and not calls
    assert all(torch.equal(grad, before[1][name]) for name, grad in again[1].items())


def test_beside_rope_in_the_same_code(calls: list[Any]) -> None:
    model = patch(lora_llama())
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            forward = of_module(module)
            assert forward is not None and set(forward.substitutes) == {
                "apply_rotary_pos_emb",
                "ALL_ATTENTION_FUNCTIONS",
            }
    calls.clear()
    step(model)
    assert calls == [((2, 4, TOKENS, 16), 2, True)] * 2
    patch(model, blocks="never")
    assert not rows(model) and all(of_module(module) is None for module in model.modules())


def test_what_goes_to_the_models_own_function(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded, short = model(ids, attention_mask=mask).logits, model(ids[:, :9]).logits
    patch(model)
    calls.clear()
    assert torch.allclose(model(ids, attention_mask=mask).logits, padded, atol=1e-5) and not calls  # a mask
    assert torch.allclose(model(ids[:, :9]).logits, short, atol=1e-5) and not calls  # below the table's length
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert not calls
    model(ids, attention_mask=torch.ones_like(ids))  # Transformers makes no mask of it
    assert len(calls) == 2
    calls.clear()
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(ids)
    assert not calls  # dropout
    model.eval()
    model.set_attn_implementation("eager")
    model(ids)
    assert not calls  # another function
    model.set_attn_implementation("sdpa")
    model(ids)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["eager", "bfloat16", "float64", "position bias", "never faster"])
def test_nothing_is_put_on_where_it_is_not_used(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = llama()
    if change == "eager":
        model.set_attn_implementation("eager")
    elif change in ("bfloat16", "float64"):
        model = model.to(getattr(torch, change))
    elif change == "position bias":
        config = transformers.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, vocab_size=128)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        monkeypatch.setattr(decisions, "attention_tokens", lambda: float("inf"))
    patch(model)
    assert not rows(model)
    forwards = [of_module(module) for module in model.modules()]
    assert all(f is None or "ALL_ATTENTION_FUNCTIONS" not in f.substitutes for f in forwards)


def test_a_function_that_another_library_registers_is_called(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(llama().eval())
    seen = []

    def theirs(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(query.shape)
        return torch.zeros_like(query).transpose(1, 2), None

    table = copy.deepcopy(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    table["sdpa"] = theirs
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", table)
    calls.clear()
    model(ids_of(model))
    assert len(seen) == 2 and not calls


def test_a_function_that_computes_something_else_is_left(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    sdpa = attention_module._sdpa()

    def twice(*args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa(*args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(attention_module, "_sdpa", lambda: twice)
    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS, "sdpa", twice)
    try:
        patch(model)
        assert not rows(model)
    finally:
        del modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_result_that_differs_takes_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = run(model)
    monkeypatch.setattr(attention_module.Attention, "_tried", lambda *args: True)
    monkeypatch.setattr(attention_module, "computed", lambda q, k, v, causal, scale: torch.zeros_like(q))
    patch(model)
    assert len(rows(model)) == 2 and all("differs" in row.reason for row in rows(model))
    assert {row.fused for row in report(model).rows if row.kind == "RoPE"} == {"rope"}
    assert_same(run(model), before)


def test_generation_with_a_cache(calls: list[Any]) -> None:
    model = llama().eval()
    ids = inputs_of(model)["input_ids"].repeat(1, 4)[:, :18]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    patch(model)
    calls.clear()
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(calls) == 2  # the prompt's; a token's query is below the table's length


def test_gradient_checkpointing_keeps_the_gradients(calls: list[Any]) -> None:
    model = lora_llama()
    before = step(model)
    patch(model, checkpoint="block")
    calls.clear()
    assert_same(step(model), before)
    assert len(calls) == 4


def test_counted_and_kept_as_pytorchs_by_the_checkpointing_modes() -> None:
    flops = {}
    for patched, mode in itertools.product((False, True), ("none", "selective", "mlp", "block")):
        model = lora_llama("fastpeft")
        if patched:
            patch(model, checkpoint=mode)
            assert len(rows(model)) == 2
        else:
            install(model, [mode] * 2)
        step(model)
        with LiveMemory() as live:
            step(model)
        flops[patched, mode] = live.attention_flops
    forward = 2 * 4 * 2 * 4 * TOKENS * TOKENS * 16  # two layers; scores and their product with the values
    for mode in ("none", "selective", "mlp"):  # never computed again
        assert flops[True, mode] == flops[False, mode] == forward * 7 // 2
    assert flops[True, "block"] == flops[False, "block"] == forward * 9 // 2


def test_compiled() -> None:
    model = lora_llama()
    before = step(model)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    assert torch.allclose(compiled(input_ids=ids_of(model), use_cache=False).logits, before[0], atol=1e-4)


def test_copies_and_pickles(calls: list[Any]) -> None:
    model = patch(lora(llama()))
    expected = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert_same(step(other), expected)
        assert len(calls) >= 2
        forwards = [f for module in other.modules() if (f := of_module(module)) is not None]
        assert forwards and all(isinstance(f, OwnCodeForward) and f.module in set(other.modules()) for f in forwards)
