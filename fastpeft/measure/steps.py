"""Timing contenders against each other, step by step in one process.

A machine's speed drifts (clocks, neighbours, caches), and far more between two runs than between two neighbouring
steps. So every round runs one step of each contender, in an order that turns by one each round, and what is compared is
the ratio within a round. Medians, because a step that was preempted tells nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Contender:
    """One way to do the step: `step(i)` runs step i and may return something (a loss) to be collected."""

    name: str
    step: Callable[[int], Any]


@dataclass
class StepTimes:
    """Seconds of each timed step and what each step, warm-up included, returned."""

    name: str
    seconds: list[float] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the seconds per step; 0 with fewer than two steps."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low

    def speedup_over(self, other: StepTimes) -> float:
        """How many times faster than `other`: the median over rounds of other's seconds by ours."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    contenders: Sequence[Contender],
    steps: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    on_round: Callable[[int], None] | None = None,
) -> dict[str, StepTimes]:
    """Run `warmup` rounds untimed and `steps` rounds timed; a round is one step of every contender.

    Args:
        contenders: at least one, names distinct.
        steps: timed rounds, at least 1.
        warmup: rounds before timing starts; their return values are collected too.
        device: synchronised before and after every step when it is a CUDA device.
        on_round: called with the number of rounds done, for a progress display.

    Raises:
        ValueError: no contender, duplicate names, or no timed step.
    """
    times = {contender.name: StepTimes(contender.name) for contender in contenders}
    if not contenders or len(times) != len(contenders):
        raise ValueError("interleave needs at least one contender, each with a name of its own")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    device = torch.device(device)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for round_ in range(warmup + steps):
        shift = round_ % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            synchronize()
            start = time.perf_counter()
            returned = contender.step(round_)
            synchronize()
            elapsed = time.perf_counter() - start
            # Read after the clock stopped: .item() would otherwise be part of the step.
            times[contender.name].returned.append(returned)
            if round_ >= warmup:
                times[contender.name].seconds.append(elapsed)
        if on_round is not None:
            on_round(round_ + 1)
    return times
