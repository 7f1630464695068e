"""Memory as a dial: what a layer keeps for the backward, a plan that fits a budget, and what the whole will need.

`fastpeft.patch(model, checkpoint=…)` sets what the layers of a model keep (`modes`, `install`, `region`); with
checkpoint="auto" it plans (`planner`) from what the layers are counted to keep and to cost (`counting`).
`fastpeft estimate` counts a model that is not there (`estimate`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import FastpeftError
from .install import find_layers, install, installed, resolve
from .install import remove as remove_checkpointing
from .modes import MODES

__all__ = [
    "MODES",
    "OverBudget",
    "find_layers",
    "install",
    "installed",
    "parse_size",
    "plan_of",
    "remove_checkpointing",
    "set_checkpointing",
]

logger = logging.getLogger("fastpeft")

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class OverBudget(FastpeftError, ValueError):
    """No plan fits into the memory given. The message says by how much, and which change would fit."""


def parse_size(text: int | float | str) -> int:
    """Bytes from a number or a text like "22GiB", "500 MB".

    Raises ValueError on anything else.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return int(text)
    spoken = str(text).strip().upper().replace(" ", "")
    digits = spoken.rstrip("KMGTIB")
    try:
        size = float(digits) * _UNITS[spoken[len(digits) :]]
    except (ValueError, KeyError):
        raise ValueError(f"memory must be bytes or a text like '22GiB', got {text!r}") from None
    return int(size)


def plan_of(model: nn.Module) -> Any:
    """The `planner.Plan` that a patched model's layers go by; None where checkpoint was not "auto"."""
    return model.__dict__.get("_fastpeft_plan")


@contextlib.contextmanager
def set_checkpointing(
    model: nn.Module, option: Any, memory: int | str | None = None, batch: int | None = None, seq: int | None = None
) -> Iterator[None]:
    """Around whatever else is done to the model: afterwards its layers go by `option`, or as before where it is None.

    Raises ValueError before anything is done on an option that is not known or does not go with the others.
    """
    before = installed(model)
    layers = find_layers(model)
    auto = isinstance(option, str) and option == "auto"
    given = {"memory": memory, "batch": batch, "seq": seq}
    if auto and None in given.values():
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(f"patch: checkpoint='auto' needs memory, batch and seq; missing: {missing}")
    if not auto and any(value is not None for value in given.values()):
        raise ValueError("patch: memory, batch and seq go with checkpoint='auto' only")
    if option is not None and not layers:
        raise ValueError(
            f"patch: checkpoint={option!r}, but {type(model).__name__} has no stack of layers (an nn.ModuleList)"
        )
    budget = parse_size(memory) if memory is not None else 0
    wanted = resolve(option, len(layers)) if option is not None and not auto else before
    yield
    if auto:
        from .planner import plan_model

        plan = plan_model(model, budget, int(batch or 0), int(seq or 0))
        install(model, plan.modes)
        model.__dict__["_fastpeft_plan"] = plan
        logger.info(str(plan))
    elif option is not None or (before and not installed(model)):
        install(model, wanted)
