"""Combining several task vectors into one: task arithmetic, TIES, DARE and magnitude pruning.

Each function takes the tensors of one weight, one per task, stacked as `tasks` (T, …) with a weight per task (T,), and
returns the merged tensor (…). `density` is the share of entries that a pruning keeps.

Sources: task arithmetic arXiv 2212.04089, TIES arXiv 2306.01708, DARE arXiv 2311.03099.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

Vote = Literal["total", "frequency"]


def _weighted(tasks: Tensor, weights: Tensor) -> Tensor:
    return tasks * weights.view(-1, *(1,) * (tasks.dim() - 1))


def _checked(density: float) -> bool:
    """Is there anything to prune? Raises `ValueError` for a negative density."""
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=4
        )
    return density < 1


def prune_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the `int(density · numel)` entries of greatest magnitude."""
    if not _checked(density):
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def prune_at_random(tensor: Tensor, density: float) -> Tensor:
    """Keep each entry with probability `density`, divided by it: the expectation stays (DARE)."""
    if not _checked(density):
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _elect(pruned: Tensor, weights: Tensor, vote: Vote) -> Tensor:
    """TIES after pruning: per entry, the mean over the tasks whose sign is the elected one."""
    signs = pruned.sign()
    if vote not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{vote}"; expected "total" or "frequency"')
    balance = (pruned if vote == "total" else signs).sum(dim=0)
    agrees = signs == torch.where(balance >= 0, 1, -1)
    return (_weighted(pruned, weights) * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def task_arithmetic(tasks: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    return _weighted(torch.stack(tasks), weights).sum(dim=0)


def magnitude_prune(tasks: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum after pruning by magnitude."""
    return task_arithmetic([prune_by_magnitude(t, density) for t in tasks], weights)


def dare_linear(tasks: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum after random pruning."""
    return task_arithmetic([prune_at_random(t, density) for t in tasks], weights)


def ties(tasks: list[Tensor], weights: Tensor, density: float, majority_sign_method: Vote = "total") -> Tensor:
    """Prune by magnitude, elect a sign per entry, average what agrees with it."""
    return _elect(torch.stack([prune_by_magnitude(t, density) for t in tasks]), weights, majority_sign_method)


def dare_ties(tasks: list[Tensor], weights: Tensor, density: float, majority_sign_method: Vote = "total") -> Tensor:
    """TIES with random pruning."""
    return _elect(torch.stack([prune_at_random(t, density) for t in tasks]), weights, majority_sign_method)


def merge_tasks(
    method: str, tasks: list[Tensor], weights: Tensor, density: float | None, majority_sign_method: Vote
) -> Tensor:
    """One of the above by the name that `add_weighted_adapter` has for it, without `_svd`.

    Raises:
        ValueError: the method is unknown, or needs a density and there is none.
    """
    if method in ("linear", "svd"):
        return task_arithmetic(tasks, weights)
    if density is None:
        raise ValueError(
            f"combination_type={method!r} prunes the adapters: pass `density`, the share to keep (0 to 1)."
        )
    if method == "magnitude_prune":
        return magnitude_prune(tasks, weights, density)
    if method == "dare_linear":
        return dare_linear(tasks, weights, density)
    if method == "ties":
        return ties(tasks, weights, density, majority_sign_method)
    if method == "dare_ties":
        return dare_ties(tasks, weights, density, majority_sign_method)
    raise ValueError(f"Invalid combination_type: {method}")
