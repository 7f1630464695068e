"""Every checkpointing mode gives the gradients of none, to the bit, and keeps what it says."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from four_bits import in_4_bits
from patch_models import MODELS, assert_same, inputs_of, llama, lora, lora_llama, run, traces
from torch import nn

import fastpeft
from fastpeft.measure import LiveMemory, SavedActivations
from fastpeft.memory import MODES, find_layers, installed

RECOMPUTING = [mode for mode in MODES if mode != "none"]


def assert_equal(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    different = [name for name, gradient in theirs[1].items() if not torch.equal(ours[1][name], gradient)]
    assert not different


def patched(**options: Any) -> Any:
    model = lora_llama("fastpeft", lora_dropout=0.1).train()
    fastpeft.patch(model, verify=False, **options)
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_none(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    model = lora(MODELS[name](), "fastpeft", lora_dropout=0.1, target_modules="all-linear").train()
    if fused:
        fastpeft.patch(model, verify=False)
    plain = run(model)
    for mode in RECOMPUTING:
        from fastpeft.memory import install

        install(model, [mode] * len(find_layers(model)))
        if fused and name == "bert":  # a layer's last norm makes the next one's q, k and v, but not across checkpoints
            assert_same(run(model), plain, tolerance=1e-6)
        else:
            assert_equal(run(model), plain)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_dora(mode: str, p: float) -> None:
    """Without dropout queries and keys are told by their rotation: within a layer, whoever computes it when."""
    torch.manual_seed(0)
    model = lora(llama(), "fastpeft", lora_dropout=p, target_modules="all-linear", use_dora=True).train()
    fastpeft.patch(model, verify=False)
    layers = [m for m in model.modules() if hasattr(m, "input_layernorm")]
    assert all(layer.input_layernorm.forward.group.told[:2] == (True, True) for layer in layers)
    plain = run(model)
    fastpeft.patch(model, verify=False, checkpoint=mode)
    assert installed(model) == [mode] * 2
    assert_same(run(model), plain, tolerance=1e-6)


@pytest.mark.parametrize("method", ["dora", "dora with dropout", "qlora", "qlora, dora with dropout"])
def test_gradients_of_other_methods(method: str) -> None:
    """And what "selective" promises: no base product is made again, however the operators are cut."""
    torch.manual_seed(0)
    model: Any = in_4_bits(llama()) if "qlora" in method else llama()
    dropout = 0.1 if "dropout" in method or method == "qlora" else 0.0
    model = lora(model, "fastpeft", lora_dropout=dropout, use_dora="dora" in method).train()
    fastpeft.patch(model, verify=False)
    plain = run(model)
    with LiveMemory() as none:
        model(**inputs_of(model)).loss.backward()
    for mode in RECOMPUTING:
        fastpeft.patch(model, verify=False, checkpoint=mode)
        assert_equal(run(model), plain)
        if mode == "selective":
            with LiveMemory() as selective:
                model(**inputs_of(model)).loss.backward()
            assert selective.product_flops <= 1.05 * none.product_flops


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_full_fine_tuning(mode: str) -> None:
    """No adapter in sight: checkpointing is set all the same, and weights get their gradients."""
    torch.manual_seed(0)
    model = fastpeft.patch(llama().train(), loss="never")
    plain = run(model)
    fastpeft.patch(model, loss="never", checkpoint=mode)
    assert installed(model) == [mode] * 2
    assert_equal(run(model), plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_with_transformers_own_checkpointing(mode: str, use_reentrant: bool) -> None:
    model = patched()
    plain = run(model)
    kept = {}
    for own in (False, True):
        fastpeft.patch(model, verify=False, checkpoint=mode)
        if own:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert_equal(run(model), plain)
        with SavedActivations(model) as saved:
            loss = model(**inputs_of(model)).loss
        kept[own] = saved.bytes
        del loss
    assert kept[True] == kept[False]  # the mode rules: nothing is checkpointed twice
    model.gradient_checkpointing_disable()


def test_transformers_own_checkpointing_still_works_where_there_is_no_mode() -> None:
    model = patched(checkpoint={0: "mlp"})
    plain = run(model)
    with SavedActivations(model) as before:
        loss = model(**inputs_of(model)).loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with SavedActivations(model) as after:
        again = model(**inputs_of(model)).loss
    assert after.bytes < before.bytes
    assert_equal(run(model), plain)
    del loss, again


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_accumulated_and_retained_graphs(mode: str) -> None:
    grads = []
    for checkpoint in ("none", mode):
        model = patched(checkpoint=checkpoint)
        torch.manual_seed(1)
        loss = model(**inputs_of(model)).loss
        other = model(**inputs_of(model)).loss  # two graphs of the same layers at once
        loss.backward(retain_graph=True)
        (2 * other).backward()
        loss.backward()
        grads.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_equal(grads[1], grads[0])


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_the_random_state_goes_on_as_without(mode: str) -> None:
    states = []
    for checkpoint in ("none", mode):
        model = patched(checkpoint=checkpoint)
        torch.manual_seed(5)
        loss = model(**inputs_of(model)).loss
        torch.rand(3)  # somebody draws between forward and backward
        loss.backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_autocast(mode: str) -> None:
    results = []
    for checkpoint in ("none", mode):
        model = patched(checkpoint=checkpoint)
        with torch.autocast("cpu", torch.bfloat16):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(3)
            output = model(**inputs_of(model))
        output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_equal(results[1], results[0])


def test_inputs_that_ask_for_no_gradient() -> None:
    """Frozen embeddings: no enable_input_require_grads is needed, the first layer learns."""
    model = patched(checkpoint="block")
    _, gradients = run(model)
    assert any("layers.0." in name and gradient.abs().max() > 0 for name, gradient in gradients.items())


def test_a_mix_a_layer() -> None:
    plain = run(patched())
    for option, expected in [
        (["offload", "none"], ["offload", "none"]),
        ({-1: "mlp", "*": "block"}, ["block", "mlp"]),
        ({0: "selective"}, ["selective", "none"]),
    ]:
        model = patched(checkpoint=option)
        assert installed(model) == expected
        assert_equal(run(model), plain)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("blocks", "one of none, selective, mlp, block, offload"),
        (["block"], "lists 1 modes; the model has 2 layers"),
        ({7: "block"}, "layer 7"),
        (3, "a mode, a list or a dict"),
        ("auto", "missing: memory, batch, seq"),
    ],
)
def test_mistakes_are_told_before_anything_is_patched(option: Any, words: str) -> None:
    model = lora_llama("fastpeft")
    with pytest.raises(ValueError, match=words):
        fastpeft.patch(model, checkpoint=option)
    assert traces(model) == []
    with pytest.raises(ValueError, match="go with checkpoint='auto' only"):
        fastpeft.patch(model, checkpoint="block", memory="1GiB")
    with pytest.raises(ValueError, match="no stack of layers"):
        fastpeft.patch(nn.Linear(4, 4), checkpoint="block")


def test_unpatch_leaves_nothing_and_patching_again_keeps_the_modes() -> None:
    model = patched(checkpoint="mlp")
    before = run(model)
    fastpeft.patch(model, verify=False)
    assert installed(model) == ["mlp", "mlp"]
    fastpeft.patch(model, verify=False, stack="never")  # planned anew
    assert installed(model) == ["mlp", "mlp"]
    assert_equal(run(model), before)
    fastpeft.unpatch(model)
    assert installed(model) == [] and traces(model) == []
    assert not [m for m in model.modules() if "forward" in m.__dict__]


@pytest.mark.parametrize("mode", ["mlp", "offload"])
def test_copies(mode: str) -> None:
    model = patched(checkpoint=mode)
    before = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert installed(other) == [mode, mode]
        assert_equal(run(other), before)
        assert all(m.__dict__["forward"].module is m for _, m in find_layers(other))


def test_evaluation_and_generation_are_untouched() -> None:
    model = patched(checkpoint="block").eval()
    prompt = torch.randint(3, 128, (1, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=prompt, **options)
    fastpeft.unpatch(model)
    assert torch.equal(model.generate(input_ids=prompt, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mlp"])
def test_compiled(mode: str) -> None:
    torch.manual_seed(0)
    model = lora(llama(num_hidden_layers=1), "fastpeft").train()
    plain = run(model)
    fastpeft.patch(model, verify=False, checkpoint=mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    compiled(**inputs_of(model)).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, plain[1][name], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


class _Odd(nn.Module):
    """A layer whose second run is not like its first."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.calls = nn.Linear(8, 8), how, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.how == "in place":
            x.mul_(2.0)
            return self.linear(x).sin() * x.sum()
        if self.how == "detour" and self.calls > 1:
            x = x + 0.0  # other operators, the same result: a cache that was filled by the first run
        if self.how == "other" and self.calls > 1:
            return x
        return self.linear(x).sin().cos()


@pytest.mark.parametrize("how", ["detour", "other"])
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_a_layer_that_does_not_do_the_same_twice(how: str, mode: str) -> None:
    model = nn.ModuleList([_Odd(how), _Odd("")])
    fastpeft.patch(model, checkpoint=mode)
    x = torch.randn(3, 8)
    y = model[1](model[0](x)).sum()
    if how == "other":
        with pytest.raises(RuntimeError, match="does not do the same twice"):
            y.backward()
        return
    y.backward()
    found = model[0].linear.weight.grad.clone()
    model.zero_grad()
    fastpeft.unpatch(model)
    model[1](model[0](x)).sum().backward()
    torch.testing.assert_close(found, model[0].linear.weight.grad)


def test_a_layer_that_changes_its_input() -> None:
    model = nn.ModuleList([_Odd("in place"), _Odd("")])
    fastpeft.patch(model, checkpoint="block")
    with pytest.raises(RuntimeError, match="checkpoint mode 'none'"):
        model[0](torch.randn(3, 8))


def test_a_product_written_to_in_place_is_kept_whole_or_not_at_all() -> None:
    """Read before it is written to: the kept value would be the wrong one, so the product is made again."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            z = y.detach() * 3  # the value before
            with torch.no_grad():
                y.add_(1.0)  # and after
            return (y * z * x).sin()

    results = []
    for mode in ("none", "selective"):
        torch.manual_seed(0)
        model = nn.ModuleList([Writes(), Writes()])
        fastpeft.patch(model, checkpoint=mode)
        x = torch.randn(3, 8, requires_grad=True)
        model[1](model[0](x)).sum().backward()
        results.append((x.grad, {n: p.grad for n, p in model.named_parameters()}))
    assert_equal(results[1], results[0])


def test_nothing_that_was_made_again_outlives_its_layer() -> None:
    """In the backward a layer more adds its input, not what of it was made again and then not asked for."""
    peaks = []
    for layers in (2, 4):
        torch.manual_seed(0)
        model = lora(llama(num_hidden_layers=layers), "fastpeft", lora_dropout=0.1).train()
        fastpeft.patch(model, verify=False, checkpoint="block")
        inputs = inputs_of(model)
        model(**inputs).loss.backward()  # gradients are there
        with LiveMemory() as live:
            model(**inputs).loss.backward()
        peaks.append(live.peak)
    entering = inputs["input_ids"].numel() * model.config.hidden_size * 4
    assert peaks[1] - peaks[0] <= 2 * entering + 256


def flops_of_a_step(model: Any) -> int:
    with LiveMemory() as counted:
        model(**inputs_of(model)).loss.backward()
    return counted.product_flops


def test_no_mode_runs_a_product_whose_result_nobody_reads() -> None:
    """selective: only the adapters' first products made with a norm or the activation (that of o is kept). mlp:
    gate and up too. block: all but down, whose output is the next layer's input."""
    plain = flops_of_a_step(patched())
    tokens, layers, rank = inputs_of(patched())["input_ids"].numel(), 2, 4
    hidden, keys, wide = 64, 32, 96
    first = 5 * rank * hidden + rank * wide
    gate_up = 2 * (hidden * wide + rank * wide)
    attention = 2 * hidden * (hidden + keys) + rank * (3 * hidden + 2 * keys)
    for mode, again in [("selective", first), ("mlp", first + gate_up), ("block", first + gate_up + attention)]:
        assert flops_of_a_step(patched(checkpoint=mode)) - plain == 2 * layers * tokens * again, mode
