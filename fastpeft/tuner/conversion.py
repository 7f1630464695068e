"""Adapters trained on a model's layout before Transformers 5, used on the layout it has now.

Transformers 5 keeps the experts of an MoE layer as stacked 3-D parameters (`gate_up_proj`, `down_proj`) where it had a
list of modules with three linear layers each, and has renamed modules of some architectures. A config that names the
old modules is rewritten to name the parameters, with the rank of the fused ones multiplied so that no information is
lost, and the old files' tensors are fused accordingly:

    W₀ += B₀A₀, W₁ += B₁A₁   becomes   [W₀; W₁] += diag(B₀, B₁) · [A₀; A₁]

Architectures whose layout has not changed pass through untouched, at the cost of a dictionary look-up.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..layers.experts import ParamWrapper
from .targets import TargetMatcher, include_all_linear_layers, is_all_linear

if TYPE_CHECKING:
    from ..configs import LoraConfig

PREFIX = "base_model.model."

# Per family: name of the old module → name of the parameter that holds its weight now. Two names for one parameter:
# fused, in this order.
_FAMILIES: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}


def _conversion_module() -> Any:
    """Transformers' tables, or None while Transformers is not imported (then there is no model of it either)."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    return importlib.import_module("transformers.conversion_mapping")


def _model_type(model: Any) -> str | None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return model_type if isinstance(model_type, str) else None


def _renames(model: nn.Module) -> dict[str, str] | None:
    """Old module name → new parameter name for this MoE architecture; None for any other architecture."""
    tables, model_type = _conversion_module(), _model_type(model)
    if tables is None or model_type is None:
        return None
    family = "mixtral" if model_type == "mixtral" else tables._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return _FAMILIES.get(family or "")


def _fused(renames: Mapping[str, str]) -> dict[str, list[str]]:
    """New name → the old names that are fused into it, where there are several."""
    olds: dict[str, list[str]] = defaultdict(list)
    for old, new in renames.items():
        olds[new].append(old)
    return {new: names for new, names in olds.items() if len(names) > 1}


# ---- the config -----------------------------------------------------------------------------------------------------


def convert_config_for_transformers(config: LoraConfig, model: nn.Module) -> None:
    """Let a config that names the experts' old modules name their parameters, in place.

    Raises:
        ValueError: only a part of the modules that are one parameter now is targeted.
    """
    renames = _renames(model)
    if renames is None:
        return
    targets = config.target_modules
    if isinstance(targets, str):
        targets = _resolve(config, model, renames)
        if not targets:
            return  # matches nothing: that is reported where all such errors are
    fused = _fused(renames)
    seen: dict[str, set[str]] = {new: set() for new in fused}
    modules, parameters = set(), set(config.target_parameters or ())
    for target in targets or ():
        old = next((old for old in renames if target == old or target.endswith(f".{old}")), None)
        if old is None:
            modules.add(target)
            continue
        parameters.add(renames[old])
        if renames[old] in fused:
            seen[renames[old]].add(old)
    rank_pattern, alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for new, olds in fused.items():
        if not seen[new]:
            continue
        if missing := [old for old in olds if old not in seen[new]]:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(seen[new]))} without also targeting "
                f"{', '.join(missing)} because they are fused into {new}."
            )
        # both products in one: twice the rank, and twice alpha to keep alpha / r
        rank_pattern[rf".*\.{re.escape(new)}"] = config.r * len(olds)
        alpha_pattern[rf".*\.{re.escape(new)}"] = config.lora_alpha * len(olds)
    config.rank_pattern, config.alpha_pattern = rank_pattern, alpha_pattern
    config.target_parameters, config.target_modules = parameters, modules  # type: ignore[assignment]


def _resolve(config: LoraConfig, model: nn.Module, renames: Mapping[str, str]) -> set[str]:
    """The last parts of the names that a string targets, as the model was before: experts as modules."""
    if is_all_linear(config.target_modules):
        linear = include_all_linear_layers(copy.copy(config), model).target_modules or ()
        return {name.rpartition(".")[2] for name in linear} | set(renames)
    matcher = TargetMatcher(config)
    parameters = [name for name, _ in model.named_parameters()]
    matched = {
        name.rpartition(".")[2] for name in [*(n for n, _ in model.named_modules()), *parameters] if matcher(name)
    }
    owners: dict[str, set[str]] = defaultdict(set)
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        owners[leaf].add(owner)
    # old names that are fused away match nothing that exists; try them where the parameter is
    for old, new in renames.items():
        if old not in matched and any(matcher(f"{owner}.{old}") for owner in owners.get(new, ())):
            matched.add(old)
    return matched


# ---- the tensors ----------------------------------------------------------------------------------------------------


def fuse_A(experts: list[list[Tensor]]) -> Tensor:
    """`experts[i][e]` (r, K): A of old module i in expert e. Returns (E·n·r, K), the rows of an expert together."""
    return torch.cat([torch.stack(tensors) for tensors in experts], dim=1).flatten(0, 1)


def fuse_B(experts: list[list[Tensor]]) -> Tensor:
    """`experts[i][e]` (N, r): B of old module i in expert e. Returns (n·N, n·r·E), block-diagonal, expert by expert."""
    blocks = torch.stack([torch.block_diag(*parts) for parts in zip(*experts)])  # (E, n·N, n·r)
    return blocks.permute(2, 0, 1).flatten(0, 1).T.contiguous()


def convert_adapter_state_dict(
    model: Any, state_dict: Mapping[str, Tensor], known: Container[str]
) -> dict[str, Tensor]:
    """The tensors of an adapter file under the names, and in the shapes, of the model's present layout.

    Args:
        model: the model, or the `PeftModel` around it, with the adapter injected.
        state_dict: as read from the file; keys with or without `base_model.model.`, without the adapter's name.
        known: keys that the model has; they are left alone.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables, model_type = _conversion_module(), _model_type(inner)
    if tables is None or model_type is None or tables.get_checkpoint_conversion_mapping(model_type) is None:
        return dict(state_dict)
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = tables.get_model_conversion_mapping(inner)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    expert = _expert_pattern(_renames(inner))
    converted: dict[str, Tensor] = {}
    experts: dict[tuple[str, str], dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in state_dict.items():
        if ".lora_" not in key or key in known:
            converted[key] = tensor
            continue
        plain = key.removeprefix(PREFIX)
        renamed, _ = rename_source_key(plain, renamings, [])
        if expert is not None and (match := expert.fullmatch(renamed)):
            experts[match["module"], match["side"]][match["old"]][int(match["index"])] = tensor
            continue
        renamed = f"{key[: len(key) - len(plain)]}{renamed}"
        converted[renamed if renamed in known else key] = tensor
    for (module, side), olds in experts.items():
        converted.update(_fuse_experts(inner, module, side, olds))
    return converted


def _expert_pattern(renames: Mapping[str, str] | None) -> re.Pattern[str] | None:
    if renames is None:
        return None
    olds = "|".join(re.escape(old) for old in renames if old != "gate")
    return re.compile(rf"(?P<module>.*\.experts)\.(?P<index>\d+)\.(?P<old>{olds})\.lora_(?P<side>[AB])\.weight")


def _fuse_experts(
    model: nn.Module, module: str, side: str, olds: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, Tensor]:
    """The fused A's or B's of one layer's experts, by the key of the wrapper that holds each parameter's adapter."""
    renames = _renames(model) or {}
    wrapper: Any = model.get_submodule(module)
    result = {}
    path = module
    while isinstance(wrapper, ParamWrapper):
        names = [old for old in renames if renames[old] == wrapper.parameter_name]
        if any(name in olds for name in names):
            tensors = [_of_all_experts(module, name, side, olds, wrapper.num_experts) for name in names]
            fuse = fuse_A if side == "A" else fuse_B
            result[f"{PREFIX}{path}.lora_{side}.weight"] = fuse(tensors)
        wrapper, path = wrapper.base_layer, f"{path}.base_layer"
    return result


def _of_all_experts(
    module: str, name: str, side: str, olds: Mapping[str, Mapping[int, Tensor]], num_experts: int
) -> list[Tensor]:
    """The A's or B's of one old module in every expert, in order."""
    found = olds.get(name, {})
    keys = [f"{module}.{expert}.{name}.lora_{side}.weight" for expert in range(num_experts)]
    for expert, key in enumerate(keys):
        if expert not in found:
            raise AdapterFileError(
                f"The adapter file lacks {key}: the experts are one parameter in this model, so their adapters cannot "
                f"be loaded without that of expert {expert} of {num_experts}."
            )
        if found[expert].shape != found[0].shape:
            raise AdapterFileError(
                f"{key} of the adapter file has shape {tuple(found[expert].shape)}, expected {tuple(found[0].shape)} "
                "as in the first expert: the experts are one parameter in this model."
            )
    return [found[expert] for expert in range(num_experts)]
