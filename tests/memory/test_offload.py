"""What offloading leaves in memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from patch_models import inputs_of, lora_llama, run

import fastpeft
from fastpeft.memory import find_layers
from fastpeft.memory.offload import Store


def test_at_most_two_layers_inputs_are_resident() -> None:
    from patch_models import llama, lora

    torch.manual_seed(0)
    model = lora(llama(num_hidden_layers=6), "fastpeft").train()
    fastpeft.patch(model, verify=False, checkpoint="offload")
    alive: list[weakref.ref[Any]] = []
    most = 0

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal most
        alive.append(weakref.ref((args[0] if args else kwargs["hidden_states"]).untyped_storage()))
        most = max(most, sum(ref() is not None for ref in alive))

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for _, layer in find_layers(model)]
    loss = model(**inputs_of(model)).loss
    assert most <= 2 and sum(ref() is not None for ref in alive) <= 2
    loss.backward()
    for handle in handles:
        handle.remove()


def test_buffers_are_used_again() -> None:
    model = lora_llama("fastpeft").train()
    fastpeft.patch(model, verify=False, checkpoint="offload")
    first = run(model)
    store = find_layers(model)[0][1].__dict__["forward"].store
    held = store.bytes
    assert held == 2 * inputs_of(model)["input_ids"].numel() * 64 * 4  # a layer's input each
    again = run(model)
    assert store.bytes == held
    assert all(torch.equal(again[1][name], gradient) for name, gradient in first[1].items())


def test_what_went_away_comes_back() -> None:
    store = Store()
    tensors = [torch.randn(40, 64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    small = torch.randn(3)
    with store.hooks():
        packed = [store._pack(t) for t in [*tensors, small]]
    assert packed[-1] is small
    for before, away in zip(reversed(tensors), reversed(packed[:-1])):
        back = store._unpack(away)
        assert back.dtype == before.dtype and torch.equal(back, before)
        assert torch.equal(store._unpack(away), before)  # a retained graph asks twice
