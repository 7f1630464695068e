"""CorDA (arXiv:2406.05223): the singular triples of W C, where C is the covariance of a layer's inputs.

With W C = U S Vᵀ, W = U S (Vᵀ C⁻¹). The adapter gets r of the triples (U, S, Vᵀ C⁻¹): the greatest in mode "ipm", to
learn what the sample data is about; the least in mode "kpm", to keep what the sample data is about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.prepare.targets import device_of, is_filled, is_transposed, linear_targets, read_tensors, write_tensors
from fastpeft.tuner.targets import pattern_value

_FIELDS = ("S_WC", "U_WC", "V_WC")


@dataclass
class CordaEigens:
    """Of one layer: S (r,), U (N, r) and C⁻¹ V (K, r)."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure the inputs of the layers that `lora_config` adapts, and leave the triples on them as `eigens`.

    Call it before `get_peft_model`, with `init_lora_weights="corda"`. The covariances take K² numbers a layer while it
    runs (half of that with `use_float16_for_covariance`).

    Args:
        model: the model to adapt.
        lora_config: its `corda_config` says mode and files: `cache_file` for the triples, `covariance_file` for the
            covariances; each is written if it is not there, and read if it is.
        run_model: runs the model on sample data. Not needed if one of the files is there.
        hooked_model: the model that `run_model` runs, if it is not `model` itself.

    Raises `ValueError` if data is missing or not finite, or a file does not fit the model.
    """
    options: Any = lora_config.corda_config
    targets = linear_targets(model, lora_config)
    device = device_of(model)
    if is_filled(options.cache_file):
        names = [f"{name}.eigens.{part}" for name in targets for part in _FIELDS]
        cache = read_tensors(options.cache_file, device, names)
        for name, layer in targets.items():
            layer.eigens = CordaEigens(*(cache[f"{name}.eigens.{part}"] for part in _FIELDS))
        return
    if options.corda_method not in ("ipm", "kpm"):
        raise ValueError(f"Invalid corda_method found: {options.corda_method}, it should be 'ipm' or 'kpm'.")
    for name, layer in targets.items():
        layer.corda_method = options.corda_method
        layer.rank = pattern_value(lora_config.rank_pattern, name, lora_config.r)
    _measure_covariances(model, lora_config, targets, run_model, hooked_model)
    for layer in targets.values():
        layer.eigens = _triples(layer, device)
    if options.prune_temporary_fields:
        for layer in targets.values():
            for field in ("sample_count", "covariance_matrix", "corda_method", "rank"):
                layer.__dict__.pop(field, None)
    if options.cache_file is not None:
        write_tensors(
            options.cache_file,
            {f"{n}.eigens.{part}": getattr(layer.eigens, part) for n, layer in targets.items() for part in _FIELDS},
        )


def _measure_covariances(
    model: nn.Module,
    config: LoraConfig,
    targets: dict[str, Any],
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
) -> None:
    """Set `covariance_matrix` (K, K) on the layers: the mean over the calls of xᵀ x, each x divided by its maximum."""
    options: Any = config.corda_config
    if is_filled(options.covariance_file):
        covariances = read_tensors(options.covariance_file, device_of(model), list(targets))
        for name, layer in targets.items():
            layer.covariance_matrix = covariances[name]
        return
    if run_model is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
    hooked_model = model if hooked_model is None else hooked_model
    hooked = targets if hooked_model is model else linear_targets(hooked_model, config)
    hooked_model.eval()

    def measure(layer: Any, args: tuple[Tensor, ...], output: Any) -> None:
        x = args[0].detach()
        x = x.reshape(-1, x.shape[-1])
        x = x if options.use_float16_for_covariance else x.float()
        x = x / x.max().abs()
        covariance = x.t().matmul(x)
        if not covariance.isfinite().all():
            raise ValueError("Invalid value found in the covariance of a layer's input: it is not finite.")
        layer.sample_count += 1
        layer.covariance_matrix += covariance

    handles = []
    for layer in hooked.values():
        layer.sample_count, layer.covariance_matrix = 0, 0
        handles.append(layer.register_forward_hook(measure))
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in targets.items():
        if name in hooked:
            layer.sample_count, layer.covariance_matrix = hooked[name].sample_count, hooked[name].covariance_matrix
        if not getattr(layer, "sample_count", 0):
            raise ValueError(f"CorDA: run_model did not call {name}. Exclude it, or run the whole model.")
        layer.covariance_matrix /= layer.sample_count
    if options.covariance_file is not None:
        write_tensors(options.covariance_file, {name: layer.covariance_matrix for name, layer in targets.items()})


def _triples(layer: Any, device: torch.device) -> CordaEigens:
    weight = layer.weight.data.float()
    weight = weight.T if is_transposed(layer) else weight
    covariance, inverse = _invertible(layer.covariance_matrix.float())
    U, S, Vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    V = (Vh @ inverse).T
    chosen = slice(layer.rank) if layer.corda_method == "ipm" else slice(-layer.rank, None)
    if layer.rank > S.shape[0]:
        raise ValueError(f"CorDA: rank {layer.rank} is more than a layer of shape {tuple(weight.shape)} has triples.")
    # copies: a view would keep, and write to the cache file, the whole matrix
    return CordaEigens(
        S_WC=S[chosen].clone(), U_WC=U[:, chosen].clone().to(device), V_WC=V[:, chosen].clone().to(device)
    )


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C with enough of its mean diagonal added that it can be inverted, and its inverse."""
    eye = torch.eye(covariance.shape[0], device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + torch.diag(
            torch.ones(covariance.shape[0], device=covariance.device) * covariance.diag().mean() * damp
        )
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye).item() < 0.05:
            return damped, inverse
        damp *= 2
