"""Is a module exactly what its class says, so that its arithmetic may be done without calling it?"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

__all__ = ["any_global_hook", "bare", "dropout_probability"]


def bare(*modules: Any) -> bool:
    """Whether calling each module runs its class's forward and nothing else: no hook of its own, no replaced forward.

    Hooks on all modules are another question, `any_global_hook()`.
    """
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
    return True


def dropout_probability(dropout: Any) -> float:
    """The dropout in force: 0 in evaluation; 1, which no operator takes, for a module that is no plain dropout."""
    kind = type(dropout)
    if kind is nn.Identity:
        return 0.0
    if kind is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    return 1.0
