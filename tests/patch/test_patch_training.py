"""Training and generation with a patched model: checkpointing, autocast, accumulation, compile, dropout, cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patch_models import LIBRARIES, all_groups, assert_same, inputs_of, llama, lora, lora_llama, run

from fastpeft import patch, unpatch
from fastpeft.patch import forwards as forwards_module
from fastpeft.patch import producers as producers_module
from fastpeft.patch import recognise as recognise_module


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(use_reentrant: bool, p: float, device: torch.device) -> None:
    model = lora_llama(lora_dropout=p).to(device).train()
    patch(model)
    before = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model), before, tolerance=1e-6)  # with dropout: the same masks in the recomputation
    assert all(group.entry is None for group in all_groups(model))


@pytest.mark.parametrize("library", LIBRARIES)
def test_autocast(library: str, device: torch.device) -> None:
    """No further from the fp32 result than the unpatched model is, twice over, as the mean square of several models."""
    errors: dict[str, list[float]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        model = lora(llama(), library).to(device)
        exact = run(model)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            theirs = run(model)
            patch(model, stack="always")
            ours = run(model)
        assert ours[0].dtype == theirs[0].dtype
        for name, truth in [("logits", exact[0]), *exact[1].items()]:
            mine, other = ((r[0] if name == "logits" else r[1][name]) for r in (ours, theirs))
            sums = errors.setdefault(name, [0.0, 0.0])
            for i, found in enumerate((mine, other)):
                sums[i] += ((found - truth).norm() / truth.norm()).square().item()
    assert all(mine <= 2**2 * other for mine, other in errors.values())


def test_gradient_accumulation_and_retained_graphs(device: torch.device) -> None:
    results = []
    for patched in (False, True):
        model = lora_llama().to(device)
        if patched:
            patch(model)
        loss = model(**inputs_of(model)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        (2 * model(**inputs_of(model)).loss).backward()
        results.append((loss.detach(), {n: q.grad for n, q in model.named_parameters() if q.grad is not None}))
    assert_same(results[1], results[0])


def test_four_steps_of_training(device: torch.device) -> None:
    curves = []
    for patched in (False, True):
        model = lora_llama().to(device).train()
        if patched:
            patch(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        losses = []
        for _ in range(4):
            loss = model(**inputs_of(model)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_dropout_has_the_right_mean_and_one_mask_per_member(device: torch.device) -> None:
    model = lora_llama(lora_dropout=0.5).to(device).train()
    patch(model)
    group = next(g for g in all_groups(model) if len(g.members) == 3)
    with torch.no_grad():
        for member in group.members:  # the same A and B, so that outputs differ by their masks only
            member.reading.A.weight.copy_(group.members[1].reading.A.weight)
            member.reading.B.weight[:32].copy_(group.members[1].reading.B.weight)
        x = torch.randn(2, 40, 64, device=device)
        base = [member.module.base_layer(x) for member in group.members]
        samples = [[y - b for y, b in zip(group.compute(x), base)] for _ in range(200)]
        model.eval()
        expected = [y - b for y, b in zip(group.compute(x), base)]
    _, k, v = samples[0]
    assert (k - v).abs().max() > 0.1 * k.abs().max()
    for i in range(3):
        mean = torch.stack([s[i] for s in samples]).mean(0)
        assert (mean - expected[i]).norm() < 0.15 * expected[i].norm()


def test_the_same_seed_gives_the_same_masks(device: torch.device) -> None:
    model = lora_llama(lora_dropout=0.3).to(device).train()
    patch(model)
    assert_same(run(model, seed=5), run(model, seed=5), tolerance=0.0)
    assert not torch.equal(run(model, seed=5)[0], run(model, seed=6)[0])


def test_generation_with_a_cache(device: torch.device) -> None:
    model = lora_llama().to(device).eval()
    prompt = torch.randint(3, 128, (2, 9), device=device)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # padded on the left
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    before = model.generate(input_ids=prompt, **options)
    patch(model, stack="always")
    assert torch.equal(model.generate(input_ids=prompt, **options), before)
    with torch.inference_mode():
        assert torch.equal(model.generate(input_ids=prompt, **options), before)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_compile_without_graph_break(library: str, device: torch.device) -> None:
    model = lora_llama(library).to(device)
    before = run(model)
    patch(model, stack="always")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(**inputs_of(model)).logits
    torch.testing.assert_close(logits, before[0], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_no_planning_in_a_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read once, when patched; a step reads nothing anew and makes one operator call a group."""
    model = lora_llama().to(device)
    patch(model)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a layer was read again")

    calls = []
    monkeypatch.setattr(forwards_module, "read_lora", forbidden)
    monkeypatch.setattr(recognise_module.Spec, "tried", forbidden)
    for name in ("norm_linear", "glu_linear"):
        operator = getattr(producers_module, name)
        counted = lambda *a, f=operator, **k: (calls.append(1), f(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(producers_module, name, counted)
    run(model)
    assert len(calls) == len(all_groups(model)) == 6


def test_accelerate_hooks_put_on_a_patched_model(device: torch.device) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = lora_llama().to(device)
    before = run(model)
    patch(model)
    attention = model.base_model.model.model.layers[0].self_attn
    for module in (attention, attention.q_proj, attention.k_proj.base_layer):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert_same(run(model), before)
    unpatch(model)
    assert_same(run(model), before)
    for module in (attention, attention.q_proj, attention.k_proj.base_layer):
        accelerate.hooks.remove_hook_from_module(module)
    assert_same(run(model), before)
