"""The instruments: saved bytes, interleaved times, peak memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft.measure import Contender, PeakMemory, SavedActivations, interleave


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with SavedActivations(layer) as saved:
        y = layer(x).sum()  # keeps x for the weight's gradient; the weight is a parameter
    assert saved.bytes == x.nbytes
    with SavedActivations(layer) as saved:
        y = (x.requires_grad_() * x[:2].repeat(2, 1)).exp()
    product_and_sides = {x.data_ptr(): x.nbytes}
    assert set(product_and_sides) <= set(saved.storages) and saved.bytes == 3 * x.nbytes  # x, its repeat, exp's result
    y.sum().backward()


def test_a_view_keeps_its_whole_storage() -> None:
    base = torch.randn(100, 8)
    with SavedActivations() as saved:
        y = base[:1] * torch.ones(1, 8, requires_grad=True)
    assert saved.bytes == base.nbytes
    del y
    assert saved.bytes == 0


def test_checkpointing_keeps_the_input_only() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    x = torch.randn(4, 8, requires_grad=True)
    with SavedActivations(layers) as plain:
        y = layers(x)
    with SavedActivations(layers) as thrifty:
        z = checkpoint(layers, x, use_reentrant=True)
    assert plain.bytes == 4 * x.nbytes and thrifty.bytes == x.nbytes
    (y.sum() + z.sum()).backward()


def test_rounds_run_every_contender_in_turning_order() -> None:
    order: list[str] = []
    times = interleave(
        [Contender(name, lambda i, name=name: order.append(name) or i) for name in "ab"], steps=2, warmup=1
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times["a"].returned == [0, 1, 2] and len(times["a"].seconds) == 2
    assert times["a"].speedup_over(times["a"]) == 1
    with pytest.raises(ValueError, match="name of its own"):
        interleave([Contender("a", int), Contender("a", int)], steps=1)


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory() as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    # The kernel adds pages up in batches: a resident set is right to a few hundred kilobytes.
    assert 60 << 20 <= peak.growth < 100 << 20 or peak.method == "ru_maxrss"
