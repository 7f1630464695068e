"""The planner is optimal, and what it plans fits."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from patch_models import llama, lora, lora_llama
from scipy.optimize import Bounds, LinearConstraint, milp

import fastpeft
from fastpeft.measure import LiveMemory
from fastpeft.memory import MODES, OverBudget, installed, parse_size
from fastpeft.memory.counting import Cost, Counts, Head
from fastpeft.memory.planner import resident, solve


def made_up(layers: int, seed: int) -> Counts:
    draw = random.Random(seed)
    costs = []
    for _ in range(layers):
        kept = sorted((draw.randint(0, 60) for _ in MODES), reverse=True)
        flops = sorted(draw.randint(900, 2000) for _ in MODES)
        costs.append(
            {
                m: Cost(k, draw.randint(0, 70), draw.randint(0, 90), 300, f - 300, 0)
                for m, k, f in zip(MODES, kept, flops)
            }
        )
    head = Head(draw.randint(0, 20), draw.randint(0, 80), draw.randint(0, 80), 1000)
    return Counts(costs, [draw.randint(0, 9) for _ in range(layers)], head, draw.randint(0, 9), draw.randint(0, 9))


def price(counts: Counts, modes: Any) -> int:
    return sum(counts.price(i, mode) for i, mode in enumerate(modes))


def most(counts: Counts, modes: Any) -> int:
    _, kept, alive, gradients = counts.peak(modes)
    return kept + alive + gradients


@pytest.mark.parametrize("seed", range(25))
def test_optimal_by_brute_force(seed: int) -> None:
    counts = made_up(1 + seed % 5, seed)
    plans = {modes: most(counts, modes) for modes in itertools.product(MODES, repeat=len(counts.layers))}
    low, high = min(plans.values()), max(plans.values())
    for budget in {low - 1, low, (2 * low + high) // 3, (low + high) // 2, high}:
        fitting = [price(counts, modes) for modes, peak in plans.items() if peak <= budget]
        found = solve(counts, budget)
        if not fitting:
            assert found is None
        else:
            assert found is not None and most(counts, found) <= budget and price(counts, found) == min(fitting)


@pytest.mark.parametrize("seed", range(4))
def test_optimal_by_another_solver(seed: int) -> None:
    """40 layers, against mixed-integer programming: kept bytes up to each layer, and every moment a constraint."""
    counts = made_up(40, seed)
    n, m = len(counts.layers), len(MODES)
    leanest = min(most(counts, [mode] * n) for mode in MODES)
    budget = leanest + 150
    costs = np.array([counts.price(i, mode) for i in range(n) for mode in MODES], dtype=float)
    kept = np.array([layer[mode].kept for layer in counts.layers for mode in MODES], dtype=float)
    rows, limits = [], []
    for i in range(n):
        before = np.where(np.arange(n * m) < i * m, kept, 0.0)
        own = slice(i * m, (i + 1) * m)
        forward, backward = before.copy(), before.copy()
        forward[own] = [counts.layers[i][mode].forward for mode in MODES]
        backward[own] = [counts.layers[i][mode].kept + counts.layers[i][mode].backward for mode in MODES]
        rows += [forward, backward]
        limits += [budget - counts.shared, budget - counts.shared - counts.head_gradients - sum(counts.gradients[i:])]
    rows.append(kept)
    limits.append(budget - counts.shared - counts.head_gradients - max(counts.head.forward, counts.head.backward))
    one_each = np.kron(np.eye(n), np.ones(m))
    result = milp(
        costs,
        integrality=np.ones(n * m),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.array(rows), -np.inf, np.array(limits))],
        options={"mip_rel_gap": 0.0},
    )
    found = solve(counts, budget)
    assert found is not None and result.success
    assert price(counts, found) == round(result.fun)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_planned_fits(seed: int) -> None:
    """Random models, batches and budgets: the measured peak of a step stays under the budget."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    hidden = draw.choice([64, 96, 128])
    model = llama(
        hidden_size=hidden,
        intermediate_size=draw.choice([2, 3, 4]) * hidden,
        num_hidden_layers=draw.randint(2, 5),
        num_key_value_heads=draw.choice([1, 2, 4]),
        max_position_embeddings=256,
    )
    if draw.random() < 0.7:
        model = lora(model, "fastpeft", lora_dropout=draw.choice([0.0, 0.1]))
    batch, seq = draw.randint(1, 3), draw.randint(33, 160)

    def peak_with(accumulate: int = 2, **options: Any) -> int:
        fastpeft.patch(model.train(), verify=False, **options)
        model.zero_grad(set_to_none=True)
        ids = torch.randint(3, 128, (batch, seq))
        with LiveMemory() as live:
            for _ in range(accumulate):
                live.reset_peak()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return resident(model) + live.peak

    lean, full = peak_with(checkpoint="offload"), peak_with(checkpoint="none")
    budget = round(lean * 1.05 + draw.random() * (full - lean) * 1.05)
    measured = peak_with(draw.choice([1, 2]), checkpoint="auto", memory=budget, batch=batch, seq=seq)
    told = fastpeft.report(model)
    assert measured <= budget and told.plan is not None and told.plan.peak <= budget
    assert installed(model) == told.plan.modes == told.checkpoint and str(told.plan) in str(told)


def test_over_budget_says_by_how_much_and_what_would_fit() -> None:
    model = lora_llama("fastpeft").train()
    static = resident(model)
    with pytest.raises(OverBudget, match=r"too much\. It would fit with seq=\d+"):
        fastpeft.patch(model, verify=False, checkpoint="auto", memory=static + (400 << 10), batch=1, seq=256)
    with pytest.raises(OverBudget, match="Weights, gradients and optimizer alone"):
        fastpeft.patch(model, verify=False, checkpoint="auto", memory="1KiB", batch=1, seq=64)
    fastpeft.patch(model, verify=False, checkpoint="auto", memory="1GiB", batch=1, seq=64)
    assert installed(model) == ["none", "none"]


def test_sizes() -> None:
    assert parse_size("22GiB") == 22 << 30 and parse_size("1.5 MB") == 1_500_000 and parse_size(7) == 7
    for wrong in ("lots", "", "3 parsecs", True):
        with pytest.raises(ValueError, match="22GiB"):
            parse_size(wrong)
