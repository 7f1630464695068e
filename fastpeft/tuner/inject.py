"""Putting an adapter into a model: match, replace, check, freeze. All of it, or nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import NoMatchingPeftModuleError, PeftWarning
from ..layers.base import BaseTunerLayer
from .constants import (
    DUMMY_TARGET_MODULES,
    MAMBA_MODEL_TYPES,
    MAMBA_UNSUPPORTED_MODULES,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
)
from .conversion import convert_config_for_transformers
from .parameters import inject_parameters
from .targets import (
    EXCLUDED,
    TargetMatcher,
    closest_names,
    find_minimal_target_modules,
    include_all_linear_layers,
    unmatched_patterns,
)
from .tied import is_tied_target, prepare_tied_layers, share_factors
from .trainable import set_wrapper_adapter, wrap_modules_to_save, wrap_trainable_tokens
from .transaction import Undo, transaction
from .walk import adapter_layers, adapter_parameters, named_modules, submodule_and_parent

if TYPE_CHECKING:
    from ..configs import LoraConfig
    from .base import BaseTuner


def inject_adapter(
    tuner: BaseTuner,
    model: nn.Module,
    adapter_name: str,
    *,
    low_cpu_mem_usage: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
) -> None:
    """Create the adapter `tuner.peft_config[adapter_name]` in `model`; see `BaseTuner.inject_adapter`."""
    config = tuner.peft_config[adapter_name]
    with _no_garbage_collection(), transaction() as undo:
        undo.attributes(config)
        if config.target_modules is None:
            tuner._prepare_adapter_config(config, tuner.get_model_config(model))
        convert_config_for_transformers(config, model)
        tuner._check_new_adapter_config(config)
        prepare_tied_layers(model, config)
        if config.target_parameters and state_dict:
            raise ValueError(
                "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This "
                "is not supported -- when using `target_parameters`, please inject the adapter without the state_dict."
            )
        before = _trainable_state(model)
        is_first = not any(isinstance(layer, BaseTunerLayer) for layer in adapter_layers(model))
        _remember(model, before, undo)

        is_dummy = config.target_modules == DUMMY_TARGET_MODULES
        found = named_modules(model, into_adapters=False) if not is_dummy else ()
        modules = {key: module for key, module in found if key}
        include_all_linear_layers(config, model)
        _condense_targets(config, modules)
        names = _Names(config, modules) if state_dict is None else _Names.from_state_dict(config, modules, state_dict)
        for key in names.targeted:
            parent, target, target_name = submodule_and_parent(model, key)
            check_target_module_compatibility(model, target_name)
            with creation_context(low_cpu_mem_usage):
                tuner._create_and_replace(config, adapter_name, target, target_name, parent, current_key=key)
        parameter_names = inject_parameters(tuner, model, config, adapter_name, low_cpu_mem_usage)
        for key in names.tied:
            parent, target, target_name = submodule_and_parent(model, key)
            with creation_context(low_cpu_mem_usage):
                tuner._create_and_replace(config, adapter_name, target, target_name, parent, current_key=key)
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            share_factors(embedding, getattr(parent, target_name), adapter_name, bool(config.init_lora_weights))

        if not is_dummy:
            _check_matches(config, names, parameter_names)
        _finish(tuner, model, config, adapter_name, is_first, before)
        _extend_unique(tuner.targeted_module_names, names.targeted + names.tied, undo)
        _extend_unique(tuner.targeted_parameter_names, parameter_names, undo)


def _extend_unique(known: list[str], new: list[str], undo: Undo) -> None:
    """Append the names that are not in the list yet."""
    length, seen = len(known), set(known)
    known.extend(dict.fromkeys(name for name in new if name not in seen))
    undo.push(lambda: known.__delitem__(slice(length, None)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Ten thousand objects are made that all stay; looking for garbage among them and everything else takes 0.2 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def creation_context(low_cpu_mem_usage: bool) -> AbstractContextManager[Any]:
    """Where new adapter weights are made: on the meta device, to be filled from a file, or as usual."""
    return torch.device("meta") if low_cpu_mem_usage else nullcontext()


def check_target_module_compatibility(model: nn.Module, target_name: str) -> None:
    """Refuse modules whose weight the model reads past the module's forward (Mamba's fused kernels).

    Raises:
        ValueError: naming module and architecture.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if target_name in MAMBA_UNSUPPORTED_MODULES and isinstance(model_type, str) and model_type in MAMBA_MODEL_TYPES:
        raise ValueError(
            f"Module {target_name!r} is incompatible with Mamba-based models (model_type={model_type!r}), whose "
            f"kernels use its weight directly. Incompatible modules: {sorted(MAMBA_UNSUPPORTED_MODULES)}. Please "
            "remove it from `target_modules`."
        )


def _trainable_state(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """(parameter, requires_grad) of every parameter in the model, those of adapters too."""
    state: list[tuple[nn.Parameter, bool]] = []
    for _, module in named_modules(model):
        state.extend((p, p.requires_grad) for p in module._parameters.values() if p is not None)
        if isinstance(module, BaseTunerLayer):
            state.extend((p, p.requires_grad) for _, p in adapter_parameters(module))
    return state


def _remember(model: nn.Module, trainable: list[tuple[nn.Parameter, bool]], undo: Undo) -> None:
    """Let a rollback restore trainability and active adapters."""
    undo.requires_grad(trainable)
    active = [(layer, layer._active_adapter) for layer in adapter_layers(model)]

    def restore() -> None:
        for layer, names in active:
            layer._active_adapter = names

    undo.push(restore)


def _condense_targets(config: LoraConfig, modules: Mapping[str, nn.Module]) -> None:
    targets = config.target_modules
    if not isinstance(targets, list | set) or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return
    suffixes = tuple(f".{name}" for name in targets)
    others = [name for name in modules if name not in targets and not name.endswith(suffixes)]
    condensed = find_minimal_target_modules(targets, others)
    if len(condensed) < len(targets):
        config.target_modules = condensed


class _Names:
    """The names of a model's modules, sorted by what a config says of them."""

    def __init__(self, config: LoraConfig, keys: Iterable[str]) -> None:
        matcher = TargetMatcher(config)
        self.keys = list(keys)
        self.targeted: list[str] = []
        self.tied = [key for key in self.keys if is_tied_target(config, key)]  # adapted last, like the embedding
        self.excluded = self.unmatched = False
        for key in self.keys:
            if key in self.tied:
                continue
            match = matcher(key)
            if match is EXCLUDED:
                self.excluded = True
            elif match:
                self.targeted.append(key)
            else:
                self.unmatched = True

    @classmethod
    def from_state_dict(
        cls, config: LoraConfig, keys: Iterable[str], state_dict: Mapping[str, torch.Tensor], prefix: str = "lora_"
    ) -> _Names:
        """Target what the state dict has weights for; warn where the config would have decided otherwise."""
        stored = {key.rsplit(f".{prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        names = cls(config, (key.removeprefix("_orig_mod.") for key in keys))
        by_config = set(names.targeted)
        names.targeted = [key for key in names.keys if key in stored and key not in names.tied]
        names.excluded, names.unmatched = False, len(names.targeted) < len(names.keys)
        only_config, only_stored = sorted(by_config - stored), sorted(set(names.targeted) - by_config)
        if only_config or only_stored:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
                "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent."
                + (f" The PEFT config contained these additional target modules: {only_config}." if only_config else "")
                + (f" The state_dict contained these additional target modules: {only_stored}." if only_stored else ""),
                RuntimeWarning,
                stacklevel=2,
            )
        return names


def _check_matches(config: LoraConfig, names: _Names, parameter_names: list[str]) -> None:
    """Raise if nothing was matched, warn if a part of the config was not used."""
    if not names.targeted and not parameter_names:
        raise NoMatchingPeftModuleError(_no_match_message(config, names))
    if config.exclude_modules and not names.excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=2,
        )
    elif config.target_modules and not names.targeted:
        warnings.warn(
            f"target_modules={config.target_modules} were set but no module was matched.", RuntimeWarning, stacklevel=2
        )
    elif config.target_parameters and not parameter_names:
        warnings.warn(
            f"target_parameters={config.target_parameters} were set but no parameter was matched.",
            RuntimeWarning,
            stacklevel=2,
        )
    for option in ("rank_pattern", "alpha_pattern"):
        if unmatched := unmatched_patterns(getattr(config, option), names.targeted):
            warnings.warn(
                f"The following {option} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )


def _no_match_message(config: LoraConfig, names: _Names) -> str:
    if names.excluded and not names.unmatched:
        return (
            "All modules were excluded. This is likely unintended. "
            "Check your `target_modules`, `exclude_modules` and `modules_to_save` configuration."
        )
    if not names.excluded and names.unmatched and not config.target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for "
            f"these arguments. Got target_parameters={config.target_parameters}."
        )
    if not names.excluded and names.unmatched:
        message = (
            f"Target modules {config.target_modules} not found in the base model. "
            "Please check the target modules and try again."
        )
        if close := closest_names(config.target_modules, names.keys):
            message += f" Names in the model that come close: {', '.join(close)}."
    else:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. You "
            "may also have only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    if config.layers_to_transform is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if config.layers_pattern is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    return message


def _finish(
    tuner: BaseTuner,
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    is_first: bool,
    before: list[tuple[nn.Parameter, bool]],
) -> None:
    """Set what is active and trainable. An adapter beside others changes neither for what was there before."""
    set_wrapper_adapter(model, tuner.active_adapters, inference_mode=config.inference_mode)
    for layer in adapter_layers(model):
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            layer.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)
    if is_first:
        tuner._mark_only_adapters_as_trainable(model)
    wrap_modules_to_save(model, config, adapter_name, activate=adapter_name in tuner.active_adapters)
    wrap_trainable_tokens(model, config, adapter_name, activate=adapter_name in tuner.active_adapters)
    if not is_first:
        for parameter, flag in before:
            parameter.requires_grad = flag


def warn_if_name_in_prefix(adapter_name: str, prefix: str) -> None:
    """A name like "lora" is in every key of a state dict, so that files of such an adapter cannot be read back."""
    if adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            PeftWarning,
            stacklevel=3,
        )
