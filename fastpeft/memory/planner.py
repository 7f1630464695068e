"""The plan: which layer goes by which mode, so that a step fits into a budget and the least is computed again.

Layers are taken in the order of the forward. A state is (bytes kept so far, price so far); a layer adds one choice to
each state, and every moment of the step that this decides (see `counting`) must fit. Of two states the one with more
bytes and no lower price can never lead to a better plan, whatever follows, because every later moment only asks for
few bytes kept so far: it is dropped. What is left when the last layer has chosen is exact, not a heuristic: the
multiple-choice knapsack by dominance (Nemhauser, Ullmann: "Discrete dynamic programming and capital allocation", 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from .counting import Counts, count
from .modes import MODES

_GUESSES = 5  # lengths counted to find one that fits


@dataclass
class Plan:
    """A mode for each layer, and what comes of it."""

    modes: list[str]
    peak: int  # bytes expected at the fullest moment, weights and optimizer included
    moment: str  # which one that is
    budget: int
    price: int  # as Counts.price, of all layers
    slowdown: float  # FLOPs of products and attention over those without checkpointing
    kept: list[int]  # bytes each layer keeps

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        runs: list[list[Any]] = []
        for index, mode in enumerate(self.modes):
            if runs and runs[-1][0] == mode and self.kept[runs[-1][1]] == self.kept[index]:
                runs[-1][2] = index
            else:
                runs.append([mode, index, index])
        lines = [
            f"checkpoint plan: peak {_gib(self.peak)} of {_gib(self.budget)} at {self.moment}, "
            f"{100 * (self.slowdown - 1):.0f} % more computation"
        ]
        for mode, first, last in runs:
            layers = f"layer {first}" if first == last else f"layers {first} to {last}"
            lines.append(f"  {layers}: {mode}, keeps {_gib(self.kept[first])} each")
        return "\n".join(lines)


def solve(counts: Counts, available: int, modes: Sequence[str] = MODES) -> list[str] | None:
    """The cheapest modes whose activations and gradients never exceed `available` bytes; None if there are none."""
    layers = counts.layers
    after = [counts.gradients_from(index) for index in range(len(layers))]
    kept, price = np.array([counts.shared], dtype=np.int64), np.array([0], dtype=np.int64)
    choices: list[tuple[np.ndarray, np.ndarray]] = []  # of each layer: the state before, and the mode
    for index, layer in enumerate(layers):
        parts = []
        for number, mode in enumerate(modes):
            cost = layer[mode]
            fits = (kept + cost.forward <= available) & (kept + cost.kept + cost.backward + after[index] <= available)
            where = np.flatnonzero(fits)
            parts.append((kept[where] + cost.kept, price[where] + counts.price(index, mode), where, number))
        sums, prices = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        before = np.concatenate([p[2] for p in parts])
        chosen = np.concatenate([np.full(len(p[2]), p[3]) for p in parts])
        order = np.lexsort((chosen, sums, prices))  # by price, then by bytes
        best = np.minimum.accumulate(sums[order])
        undominated = np.ones(len(order), dtype=bool)
        undominated[1:] = sums[order][1:] < best[:-1]
        order = order[undominated]
        if not len(order):
            return None
        kept, price = sums[order], prices[order]
        choices.append((before[order], chosen[order]))
    head = max(counts.head.forward, counts.head.backward) + counts.head_gradients
    final = np.flatnonzero(kept + head <= available)
    if not len(final):
        return None
    state = int(final[0])  # states are in the order of their price
    picked = []
    for before, chosen in reversed(choices):
        picked.append(modes[int(chosen[state])])
        state = int(before[state])
    return picked[::-1]


def make_plan(counts: Counts, static: int, budget: int, modes: Sequence[str] = MODES) -> Plan | None:
    """The cheapest plan within `budget` bytes, `static` of which are weights and optimizer; None if there is none."""
    chosen = solve(counts, budget - static, modes)
    return None if chosen is None else describe(counts, chosen, static, budget)


def describe(counts: Counts, modes: list[str], static: int, budget: int) -> Plan:
    """What comes of the modes."""
    moment, kept, alive, gradients = counts.peak(modes)
    plain = counts.flops(["none"] * len(modes)) + sum(layer["none"].attention_flops for layer in counts.layers)
    flops = counts.flops(modes) + sum(layer[mode].attention_flops for layer, mode in zip(counts.layers, modes))
    return Plan(
        list(modes),
        static + kept + alive + gradients,
        moment,
        budget,
        sum(counts.price(i, mode) for i, mode in enumerate(modes)),
        flops / plain,
        [layer[mode].kept for layer, mode in zip(counts.layers, modes)],
    )


def plan_model(model: nn.Module, budget: int, batch: int, seq: int) -> Plan:
    """The plan for a language model in training on `batch` rows of `seq` tokens.

    Weights and buffers count as they lie on the device, the optimizer as AdamW's two moments, gradients in the weights'
    dtype and as if all of them were there from the start of a step on, which they are where they accumulate.

    Raises ValueError for a model that does not take input_ids, OverBudget if nothing fits.
    """
    from . import OverBudget

    was_training = model.training
    model.train()
    try:
        counts = _counts(model, batch, seq)
        static = resident(model) + sum(p.nbytes for p in model.parameters() if p.requires_grad)
        plan = make_plan(counts, static, budget)
        if plan is None:
            raise OverBudget(_why_not(counts, static, budget, model, batch, seq))
    finally:
        model.train(was_training)
    return plan


def _counts(model: nn.Module, batch: int, seq: int) -> Counts:
    return replace(count(model, _inputs(model, batch, seq)), accumulate=True)


def resident(model: nn.Module) -> int:
    """Bytes of weights, buffers and AdamW's state."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(storages.values()) + 2 * sum(p.numel() * p.element_size() for p in trained)


def _inputs(model: Any, batch: int, seq: int) -> dict[str, Any]:
    base = next((m for m in model.modules() if isinstance(getattr(type(m), "main_input_name", None), str)), None)
    if base is None or base.main_input_name != "input_ids":
        raise ValueError("patch: checkpoint='auto' counts language models of Transformers, which take input_ids")
    device = next(p.device for p in model.parameters())
    ids = torch.ones((batch, seq), dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def _why_not(counts: Counts, static: int, budget: int, model: nn.Module, batch: int, seq: int) -> str:
    leanest = _leanest(counts, static, budget)
    text = (
        f"no plan for {batch} x {seq} tokens fits into {_gib(budget)}: with checkpoint={leanest.modes[0]!r} the peak, "
        f"at {leanest.moment}, is {_gib(leanest.peak)}, {_gib(leanest.peak - budget)} too much"
    )
    if static >= budget:
        alone = f"Weights, gradients and optimizer alone are {_gib(static)}"
        return f"{text}. {alone}: take a quantised model, or a larger budget"
    # What a step needs beside the weights is about in proportion to its tokens. A count takes as long as some steps, so
    # a length is guessed and counted, not searched for.
    length, peak = seq, leanest.peak
    for _ in range(_GUESSES):
        length = min(length - 1, int(length * (budget - static) / (peak - static)))
        if length < 1:
            break
        counts = _counts(model, batch, length)
        if make_plan(counts, static, budget) is not None:
            return f"{text}. It would fit with seq={length}" + (
                f", or with fewer than {batch} rows" if batch > 1 else ""
            )
        peak = _leanest(counts, static, budget).peak
    return f"{text}. No length was found that fits with {batch} rows: take a batch of 1, or a larger budget"


def _leanest(counts: Counts, static: int, budget: int) -> Plan:
    plans = (describe(counts, [mode] * len(counts.layers), static, budget) for mode in MODES)
    return min(plans, key=lambda plan: plan.peak)


def _gib(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
