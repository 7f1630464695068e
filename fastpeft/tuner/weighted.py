"""`add_weighted_adapter`: one LoRA adapter out of several."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..layers.conv import Conv2d
from ..layers.lora import LoraLayer
from ..layers.wrappers import ModulesToSaveWrapper
from .merging import Vote, merge_tasks
from .transaction import transaction
from .walk import tuner_layers, wrappers

if TYPE_CHECKING:
    from .lora import LoraModel

CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


def add_weighted_adapter(
    tuner: LoraModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Vote = "total",
) -> None:
    """Create the adapter `adapter_name`, ΔW = Σ wᵢ·ΔWᵢ in the sense of `combination_type`. Does nothing if it exists.

    Args:
        adapters: names of the adapters to combine.
        weights: one number for each of them; may be negative.
        adapter_name: the new one. It is neither active nor trainable.
        combination_type: how. `"cat"` is exact, its rank the sum of the ranks. `"svd"` is the best approximation of
            rank `svd_rank`. `"linear"` adds A's and B's apart, each by the root of its weight: cheap, same rank, not
            the sum of the products. `"ties"`, `"dare_linear"`, `"dare_ties"` and `"magnitude_prune"` prune first and
            work on A and B as `"linear"` does; with `_svd` they work on ΔW.
        svd_rank: rank of the `_svd` types; None: the greatest rank among the adapters.
        svd_clamp: quantile (0 to 1) of the factors' entries at which they are clamped; None: not at all.
        svd_full_matrices: passed on to `torch.linalg.svd`.
        svd_driver: passed on to `torch.linalg.svd`; only for CUDA.
        density: share of entries that pruning keeps.
        majority_sign_method: `"total"` or `"frequency"`: what elects the sign for TIES.

    Raises:
        ValueError: an adapter does not exist, adapts parameters, shares a `modules_to_save` module with another one,
            has another rank where the type needs equal ranks, or the type is unknown.
    """
    if adapter_name in tuner.peft_config:
        return
    if len(weights) != len(adapters):
        raise ValueError(f"Expected one weight per adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    kind, rank, target_modules = _check(tuner, adapters, combination_type, svd_rank)
    method = kind.removesuffix("_svd")
    with transaction() as undo, torch.no_grad():
        undo.mapping(tuner.peft_config)
        tuner.peft_config[adapter_name] = replace(
            tuner.peft_config[adapters[0]],
            r=rank,
            lora_alpha=rank,
            target_modules=target_modules,
            alpha_pattern={},
            rank_pattern={},
        )
        tuner.inject_adapter(tuner.model, adapter_name)
        tuner.set_requires_grad(adapter_name, False)
        for layer in tuner_layers(tuner.model, LoraLayer):
            new = _factors(layer, adapter_name)
            if new is None:
                continue
            parts = [(name, w) for name, w in zip(adapters, weights) if _factors(layer, name) is not None]
            if not parts:
                raise ValueError(
                    f"None of the adapters {adapters} has weights in a layer that {adapter_name!r} targets."
                )
            A, B = new
            if kind == "cat":
                _concatenate(layer, parts, A, B)
            elif kind.endswith("svd"):
                names, scales = [name for name, _ in parts], [w for _, w in parts]
                deltas = [layer.get_delta_weight(name) for name in names]
                delta = merge_tasks(
                    method, deltas, torch.tensor(scales).to(deltas[0].device), density, majority_sign_method
                )
                A.data, B.data = _truncated_svd(
                    layer, names, delta, rank, (A, B), svd_clamp, svd_full_matrices, svd_driver
                )
            else:
                A.data, B.data = _combine_factors(layer, parts, method, density, majority_sign_method)


def _check(
    tuner: LoraModel, adapters: list[str], combination_type: str, svd_rank: int | None
) -> tuple[str, int, str | set[str]]:
    """Can these adapters be combined like that? Returns the effective type, the new rank and the new targets."""
    if not adapters:
        raise ValueError("Found no adapter matching the names in []")
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
        if tuner.peft_config[name].target_parameters:
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
            )
    shared = [
        wrapper
        for wrapper in wrappers(tuner.model)
        if isinstance(wrapper, ModulesToSaveWrapper) and sum(name in wrapper.modules_to_save for name in adapters) > 1
    ]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )
    if combination_type not in get_args(CombinationType):
        raise ValueError(f"Invalid combination_type: {combination_type}")
    if len(adapters) == 1:
        combination_type = "linear"
    configs = [tuner.peft_config[name] for name in adapters]
    ranks = [max(config.r, *(config.rank_pattern or {}).values(), 0) for config in configs]
    if combination_type == "cat":
        rank = sum(ranks)
    elif combination_type.endswith("svd"):
        rank = svd_rank or max(ranks)
    elif len(set(ranks)) == 1:
        rank = ranks[0]
    else:
        raise ValueError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            f"dare_linear; got {dict(zip(adapters, ranks))}. Use 'cat' or one of the svd types for different ranks."
        )
    targets = [config.target_modules for config in configs]
    if len({type(t) for t in targets}) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. "
            "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
        )
    if isinstance(targets[0], str):
        return combination_type, rank, "|".join(f"({t})" for t in targets)
    if isinstance(targets[0], set):
        return combination_type, rank, set().union(*targets)
    raise TypeError(f"Invalid type {type(targets[0])} found in target_modules")


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """(A, B) of an adapter in a layer, or None if it is not there."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def _concatenate(layer: Any, parts: list[tuple[str, float]], A: Tensor, B: Tensor) -> None:
    """[w₁s₁A₁; w₂s₂A₂; …] and [B₁ | B₂ | …], the rest zero."""
    pairs = [_factors(layer, name) or () for name, _ in parts]
    stacked = torch.cat([pair[0].data * w * layer.scaling[name] for pair, (name, w) in zip(pairs, parts)], dim=0)
    side_by_side = torch.cat([pair[1].data for pair in pairs], dim=1)
    A.data.zero_()[: stacked.shape[0]] = stacked
    B.data.zero_()[:, : side_by_side.shape[1]] = side_by_side


def _truncated_svd(
    layer: Any,
    names: list[str],
    delta: Tensor,
    rank: int,
    shapes: tuple[Tensor, Tensor],
    clamp: float | None,
    full_matrices: bool,
    driver: str | None,
) -> tuple[Tensor, Tensor]:
    """(A, B) with B·A the best approximation of `delta` of this rank, the singular values in B."""
    is_conv = isinstance(layer, Conv2d)
    if is_conv:
        is_1x1 = layer.weight.size()[2:4] == (1, 1)
        delta = delta.squeeze() if is_1x1 else delta.flatten(start_dim=1)
    if getattr(layer, "fan_in_fan_out", False) or any(name in layer.lora_embedding_A for name in names):
        delta = delta.T
    U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    B = U[:, :rank] @ torch.diag(S[:rank])
    A = Vh[:rank, :]
    if clamp is not None:
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-bound, bound), B.clamp(-bound, bound)
    if is_conv:
        A, B = A.reshape(shapes[0].shape), B.reshape(shapes[1].shape)
    return A, B


def _combine_factors(
    layer: Any, parts: list[tuple[str, float]], method: str, density: float | None, vote: Vote
) -> list[Tensor]:
    """Merge the A's and the B's apart. Each side gets √|w·s|, and A the sign, so that one adapter alone is w·s·B·A."""
    scales = [w * layer.scaling[name] for name, w in parts]
    pairs = [_factors(layer, name) or () for name, _ in parts]
    merged = []
    for side in (0, 1):
        roots = [math.sqrt(abs(s)) * (-1 if s < 0 and side == 0 else 1) for s in scales]
        tasks = [pair[side].data for pair in pairs]
        result = merge_tasks(method, tasks, torch.tensor(roots).to(tasks[0].device), density, vote)
        merged.append(result.to(tasks[0].dtype))
    return merged
