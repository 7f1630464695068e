"""Adapters may be switched, merged, disabled, scaled, deleted and unloaded on a patched model at any moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from patch_models import LIBRARIES, all_groups, assert_same, groups_of, inputs_of, lora_llama, run, traces

from fastpeft import patch, report, unpatch


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(**inputs_of(model), **kwargs).logits.detach()


def second_adapter(model: Any, **options: Any) -> None:
    library = LIBRARIES["fastpeft" if type(model).__module__.startswith("fastpeft") else "peft"]
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False} | options
    model.add_adapter("second", library.LoraConfig(**settings))


def merge_and_back(model: Any) -> torch.Tensor:
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    return torch.stack([merged, logits(model)])


def disable(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        off = logits(model)
    return torch.stack([off, logits(model)])


def disable_while_merged(model: Any) -> torch.Tensor:
    model.merge_adapter()
    with model.disable_adapter():
        off = logits(model)
    return torch.stack([off, logits(model)])


def switch(model: Any) -> torch.Tensor:
    second_adapter(model)
    results = [logits(model)]
    for name in ("second", "default", ["default", "second"], "second"):
        model.base_model.set_adapter(name)
        results.append(logits(model))
    return torch.stack(results)


def delete(model: Any) -> torch.Tensor:
    second_adapter(model)
    model.delete_adapter("default")
    model.set_adapter("second")
    return logits(model)


def scale(model: Any) -> torch.Tensor:
    layers = [m for m in model.modules() if hasattr(m, "scale_layer")]
    for layer in layers:
        layer.scale_layer(0.5)
    half = logits(model)
    for layer in layers:
        layer.unscale_layer()
    return torch.stack([half, logits(model)])


def dora_beside(model: Any) -> torch.Tensor:
    second_adapter(model, use_dora=True)
    model.set_adapter("second")
    return logits(model)


def mixed_batch(model: Any) -> torch.Tensor:
    second_adapter(model)
    model.eval()
    inputs = {"input_ids": inputs_of(model)["input_ids"]}
    mixed = model(**inputs, adapter_names=["second", "__base__"]).logits.detach()
    return torch.stack([mixed, model(**inputs).logits.detach()])


def weighted(model: Any) -> torch.Tensor:
    second_adapter(model, target_modules="all-linear", r=4)
    model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="linear")
    model.set_adapter("both")
    return logits(model)


def unload(model: Any) -> torch.Tensor:
    return logits(model.unload())


def merge_and_unload(model: Any) -> torch.Tensor:
    return logits(model.merge_and_unload())


ACTIONS = [
    merge_and_back,
    disable,
    disable_while_merged,
    switch,
    delete,
    scale,
    dora_beside,
    mixed_batch,
    weighted,
    unload,
    merge_and_unload,
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda f: f.__name__)
def test_what_happens_to_adapters_after_patching(
    action: Callable[[Any], torch.Tensor], library: str, device: torch.device
) -> None:
    results = []
    for patched in (False, True):
        model = lora_llama(library).to(device)
        if patched:
            patch(model, stack="always")
        torch.manual_seed(7)  # second adapters start the same
        results.append(action(model))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_group_follows_the_adapter_that_is_switched_to(device: torch.device) -> None:
    model = lora_llama().to(device)
    patch(model)
    second_adapter(model, target_modules="all-linear", r=2)
    model.set_adapter("second")
    group = all_groups(model)[0]
    x = torch.randn(2, 40, 64, device=device)
    outs = group.compute(x)
    assert outs is not None and group.members[0].reading.name == "second"
    for member, out in zip(group.members, outs):
        torch.testing.assert_close(out, member.original(x), rtol=1e-4, atol=1e-5)


def test_patching_again_plans_anew_only_after_a_change(device: torch.device) -> None:
    model = lora_llama().to(device)
    patch(model)
    first = all_groups(model)
    assert patch(model) is model
    assert all(a is b for a, b in zip(all_groups(model), first))  # nothing was rebuilt
    second_adapter(model)
    model.set_adapter("second")
    before = run(model)
    patch(model)
    assert groups_of(model) == {("q_proj", "k_proj", "v_proj"): 2, ("gate_proj", "up_proj"): 2}
    assert {r.module.rpartition(".")[2] for r in report(model).left} == {"o_proj", "down_proj"}
    assert_same(run(model), before)


def test_unload_leaves_projections_that_do_not_compute_what_is_gone(device: torch.device) -> None:
    """k_proj joined q and v for one product; without them it must be a plain linear layer again."""
    model = lora_llama(target_modules=["q_proj", "v_proj"]).to(device)
    patch(model, stack="always")
    assert groups_of(model) == {("q_proj", "k_proj", "v_proj"): 2}
    groups = all_groups(model)
    base = model.unload()
    x = torch.randn(2, 40, 64, device=device)
    assert all(group.compute(x) is None for group in groups)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    unpatch(base)
    assert not traces(base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert len({t.untyped_storage().data_ptr() for t in base.parameters()}) == len(list(base.parameters()))
