"""An adapter's tensors, apart from the model's: out of a model under the names of an adapter file, and back into one.

In a file a tensor is called `base_model.model.<module>.lora_A.weight`. In a model the adapter's name stands in it,
`….lora_A.default.weight`, and the prefix is there only if a `PeftModel` is around the model.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from .errors import AdapterFileError, PeftWarning
from .layers.base import BaseTunerLayer
from .layers.wrappers import AuxiliaryTrainingWrapper
from .mapping import tuner_class
from .tuner.base import BaseTuner
from .tuner.constants import EMBEDDING_LAYER_NAMES
from .tuner.conversion import PREFIX, convert_adapter_state_dict
from .tuner.targets import is_all_linear
from .tuner.walk import named_modules, tuner_layers

_FSDP_PREFIX = "_fsdp_wrapped_module."


class LoadResult(NamedTuple):
    """Keys that a load did not find, and keys it had no place for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdapterShapeError(AdapterFileError, RuntimeError):
    """A tensor of an adapter has another shape than the model; a `RuntimeError` too, as `load_state_dict` raises."""


# ---- whose tensor is it? --------------------------------------------------------------------------------------------


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # FSDP's state dict has the names without its wrapper, the module tree has them with it
    return ((name.removeprefix(_FSDP_PREFIX), module) for name, module in named_modules(model))


def adapter_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """What the keys of adapter tensors in `model.state_dict()` begin with; of one adapter, where it can be told.

    Found from the module tree and not by looking for `lora_`, which the model's own modules may be called too.
    """
    prefixes: set[str] = set()
    saved: set[str] = set()
    for name, module in _named(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            saved.add(name)
        elif not isinstance(module, BaseTuner | BaseTunerLayer) or is_under(name, saved):
            continue
        else:
            dot = f"{name}." if name else ""
            for attribute in (*module._modules, *module._parameters, *module._buffers):
                if attribute in ("base_layer", "model"):
                    continue
                child = getattr(module, attribute)
                if adapter_name is None or not isinstance(child, nn.ModuleDict | nn.ParameterDict):
                    prefixes.add(f"{dot}{attribute}")
                elif adapter_name in child:
                    prefixes.add(f"{dot}{attribute}.{adapter_name}")
    return prefixes


def is_under(key: str, prefixes: set[str]) -> bool:
    """Is `key`, or a dotted beginning of it, one of `prefixes`?"""
    while key and prefixes:
        if key in prefixes:
            return True
        key = key.rpartition(".")[0]
    return "" in prefixes


def filter_by_prefixes(state_dict: Mapping[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """The entries whose key is under one of `prefixes`."""
    return {key: value for key, value in state_dict.items() if is_under(key, prefixes)}


def remove_adapter_name(key: str, adapter_name: str) -> str:
    """`a.lora_A.default.weight` → `a.lora_A.weight`; `a.lora_embedding_A.default` → `a.lora_embedding_A`."""
    if key.endswith(f".lora_magnitude_vector.{adapter_name}.weight"):  # DoRA's: a module here, a tensor in files
        key = key.removesuffix(".weight")
    if key.endswith(f".{adapter_name}"):
        return key.removesuffix(f".{adapter_name}")
    owner, dot, leaf = key.rpartition(".")
    return f"{owner.removesuffix(f'.{adapter_name}')}{dot}{leaf}"


def _keys_of_adapter(model: Any, state: Mapping[str, Any], adapter_name: str) -> dict[str, str]:
    """Key in a file → key in the model's state dict, for every tensor of the adapter. Saving and loading both ask this.

    The adapter's own weights, the biases that its config trains, its copies of the `modules_to_save`.
    """
    config = model.peft_config[adapter_name]
    others = tuple(name for name in model.peft_config if name != adapter_name)
    own = [key for key in state if not any(f".{n}." in key or key.endswith(f".{n}") for n in others)] or list(state)
    prefixes = adapter_key_prefixes(model)
    keys = {key: key for key in own if is_under(key, prefixes)}
    keys.update({key: key for key in _trained_biases(model, own, config)})
    for name, wrapper in _named(model):
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            load_map = wrapper.adapter_state_dict_load_map(adapter_name)  # type: ignore[operator]
            keys.update({f"{name}.{stored}": f"{name}.{live}" for stored, live in load_map.items()})
    return {remove_adapter_name(stored, adapter_name): live for stored, live in keys.items()}


# ---- out of a model -------------------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, under the names they have in an adapter file.

    With them come the biases that the config trains, the `modules_to_save`, and the embeddings if they have to be
    saved.

    Args:
        model: a `PeftModel`, or a model with the adapter injected into it; unwrapped from DDP and the like.
        state_dict: the model's state dict, if it was gathered already (FSDP, DeepSpeed); None: `model.state_dict()`.
        adapter_name: which adapter.
        unwrap_compiled: take the model out of `torch.compile` first.
        save_embedding_layers: whether to add the input and output embeddings; `"auto"`: if they are adapted, or if the
            vocabulary has another size than that of the base model the config names.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    tuner_class(config)
    state: Mapping[str, Tensor] = model.state_dict() if state_dict is None else state_dict
    keys = _keys_of_adapter(model, state, adapter_name)
    targeted = _embedding_is_targeted(model, config)
    if _must_save_embeddings(model, config, save_embedding_layers, targeted):
        keys.update({remove_adapter_name(key, adapter_name): key for key in _embedding_keys(model, state, targeted)})
    result = {stored: state[live] for stored, live in keys.items()}
    if state_dict is None:
        _warn_if_sharded(result, adapter_name)
    return result


def _trained_biases(model: nn.Module, keys: Iterable[str], config: Any) -> list[str]:
    bias = getattr(config, "bias", "none")
    if bias == "all":
        return [key for key in keys if key == "bias" or key.endswith(".bias")]
    if bias.endswith("_only"):
        layers = (name for name, module in _named(model) if isinstance(module, BaseTunerLayer))
        adapted = {f"{name}.base_layer.bias" if name else "base_layer.bias" for name in layers}
        return [key for key in keys if key in adapted]
    return []


def _embedding_is_targeted(model: Any, config: Any) -> bool:
    targets = getattr(config, "target_modules", None)
    if not targets or is_all_linear(targets):
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = (name for name, _ in base.named_modules() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
    return any(re.fullmatch(targets, name) for name in names)


def _must_save_embeddings(model: Any, config: Any, choice: bool | str, targeted: bool) -> bool:
    if choice != "auto":
        return bool(choice)
    if targeted and getattr(config, "trainable_token_indices", None) is None:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3
        )
        return True
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    base = config.base_model_name_or_path
    if not vocab_size or not base or not _has_base_config(base):
        return False
    if vocab_size == type(model.config).from_pretrained(base).vocab_size:
        return False
    warnings.warn(
        "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
        stacklevel=3,
    )
    return True


def _has_base_config(base: str) -> bool:
    """Is there a `config.json` of the base model to compare with, locally or on the hub?"""
    if os.path.exists(os.path.join(base, "config.json")):
        return True
    from .storage import file_exists_on_hub

    exists = file_exists_on_hub(base, "config.json")
    if exists is None:
        warnings.warn(
            f"Could not find a config file in {base} - will assume that the vocabulary was not modified.", stacklevel=4
        )
    return bool(exists)


def _embedding_keys(model: Any, state: Mapping[str, Tensor], targeted: bool) -> list[str]:
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=3
        )
        return []
    found: list[str] = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        base = getattr(layer, "base_layer", None)
        if targeted and not isinstance(base, nn.Linear | nn.Embedding):
            continue
        wanted = base if targeted else layer
        name = next((name for name, module in model.named_modules() if module is wanted), None)
        if wanted is not None and name:
            found.extend(key for key in state if key.startswith(f"{name}."))
    return found


def _warn_if_sharded(tensors: Mapping[str, Tensor], adapter_name: str) -> None:
    """An A or B without two sizes is a shard that nobody gathered; a file of it could never be loaded."""
    bad = [
        f"{name}:{tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if (".lora_A" in name or ".lora_B" in name) and (tensor.dim() < 2 or 0 in tensor.shape)
    ]
    if bad:
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape: {', '.join(bad[:3])}. The model "
            "seems to be sharded (DeepSpeed ZeRO-3, FSDP) and not gathered. Save inside "
            "deepspeed.zero.GatheredParameters(...) or FullyShardedDataParallel.summon_full_params(model), or pass the "
            "gathered `state_dict`.",
            PeftWarning,
            stacklevel=3,
        )


# ---- into a model ---------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """How the tensors of an adapter file fit a model.

    Attributes:
        tensors: those the model has a place for, by the model's keys.
        missing: what the model has of this adapter and the file has not, by the model's keys.
        unexpected: what the file has and the model has not, by the file's keys.
        mismatched: file's key → (shape in the file, shape in the model), where they differ; also in `tensors`.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def fit_state_dict(model: Any, state_dict: Mapping[str, Tensor], adapter_name: str = "default") -> Fit:
    """Find the model's key for every tensor of an adapter file, and compare. Changes nothing."""
    tuner_class(model.peft_config[adapter_name])
    own = model.state_dict()
    wrapped = any(key.startswith(PREFIX) for key in own)

    def full(key: str) -> str:
        return key if wrapped or key.startswith(PREFIX) else f"{PREFIX}{key}"

    # by the file's keys, with the prefix: what must be there, and behind it what may be there (embeddings, …)
    needed = {full(stored): live for stored, live in _keys_of_adapter(model, own, adapter_name).items()}
    allowed = {full(remove_adapter_name(key, adapter_name)): key for key in own}
    allowed |= {full(key): key for key in own} | needed

    given = {full(key): tensor for key, tensor in state_dict.items()}
    tensors: dict[str, Tensor] = {}
    unexpected: list[str] = []
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for key, tensor in convert_adapter_state_dict(model, given, known=allowed).items():
        live = allowed.get(key)
        if live is None:
            unexpected.append(key)
            continue
        tensors[live] = tensor
        if tensor.shape != own[live].shape and not _is_packed(own[live], tensor):
            mismatched[key] = (tuple(tensor.shape), tuple(own[live].shape))
    missing = [live for live in needed.values() if live not in tensors]
    return Fit(tensors, missing, unexpected, mismatched)


def _is_packed(parameter: Tensor, tensor: Tensor) -> bool:
    """A 4-bit weight: two elements share a byte, in a column."""
    return parameter.ndim > 0 and parameter.shape[-1] == 1 and parameter.numel() * 2 == tensor.numel()


def apply_fit(
    model: Any,
    fit: Fit,
    adapter_name: str,
    *,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    source: str = "the state dict",
) -> LoadResult:
    """Copy the tensors of a `Fit` into the model.

    Raises:
        AdapterShapeError: a shape differs and `ignore_mismatched_sizes` is not set; nothing has been copied then.
    """
    tensors = fit.tensors
    if fit.mismatched:
        if not ignore_mismatched_sizes:
            lines = [
                f"size mismatch for {key}: {source} has shape {found}, the model expects {expected}"
                for key, (found, expected) in fit.mismatched.items()
            ]
            raise AdapterShapeError("; ".join(lines[:5]) + (f" (+{len(lines) - 5} more)" if len(lines) > 5 else ""))
        own = model.state_dict()
        tensors = {k: t for k, t in tensors.items() if t.shape == own[k].shape or _is_packed(own[k], t)}
        listed = "\n".join(
            f"- {key}: found shape {found} in the checkpoint and {expected} in the model instantiated"
            for key, (found, expected) in fit.mismatched.items()
        )
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            f"ignored because you passed `ignore_mismatched_sizes=True`: {listed}.",
            stacklevel=3,
        )
    model.load_state_dict(tensors, strict=False, assign=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        for layer in tuner_layers(model):
            layer._move_adapter_to_device_of_base_layer(adapter_name)
    return LoadResult(list(fit.missing), list(fit.unexpected))


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Load the tensors of an adapter, under the names they have in an adapter file, into a model that has the adapter.

    Args:
        model: a `PeftModel`, or a model with the adapter injected into it.
        peft_model_state_dict: as `get_peft_model_state_dict` or `load_peft_weights` returns it.
        adapter_name: which adapter of the model.
        ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
        low_cpu_mem_usage: put the tensors into the model as they are instead of copying them; for an adapter that was
            created on the meta device.

    Returns:
        `missing_keys` of this adapter, by the model's names, and `unexpected_keys`. Neither is an error here;
        `PeftModel.load_adapter` makes them one.

    Raises:
        AdapterShapeError: a tensor has another shape than the model's; the model is unchanged.
    """
    fit = fit_state_dict(model, peft_model_state_dict, adapter_name)
    return apply_fit(
        model,
        fit,
        adapter_name,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


# ---- the base model's tensors ---------------------------------------------------------------------------------------


def _keys_of_base_model(model: Any) -> dict[str, str]:
    """Key in the model before it was adapted → key now, relative to the user's model."""
    root = model.get_base_model()
    adapters = {name for name, module in named_modules(root) if isinstance(module, BaseTunerLayer)}
    saved = {name for name, module in named_modules(root) if isinstance(module, AuxiliaryTrainingWrapper)}
    keys: dict[str, str] = {}
    for key in root.state_dict():
        path, plain = "", []
        for part in key.split("."):
            if path in adapters:
                if part != "base_layer":
                    break  # a part of the adapter
            elif path in saved:
                if part not in ("original_module", "token_adapter"):
                    break  # an adapter's copy
            else:
                plain.append(part)
            path = f"{path}.{part}" if path else part
        else:
            keys[".".join(plain)] = key
    return keys


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict that the user's model had before it was adapted: its keys, without the adapters."""
    state = model.get_base_model().state_dict()
    return {plain: state[key] for plain, key in _keys_of_base_model(model).items()}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load a state dict of the user's model, as it was before it was adapted, past the adapters.

    Raises:
        RuntimeError: `strict`, and keys are missing or unexpected; nothing has been copied then.
    """
    keys = _keys_of_base_model(model)
    missing = [plain for plain in keys if plain not in state_dict]
    unexpected = [plain for plain in state_dict if plain not in keys]
    if strict and (missing or unexpected):
        problems = [f"Missing key(s) in state_dict: {missing}"] if missing else []
        problems += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected else []
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(problems))
    root = model.get_base_model()
    root.load_state_dict({keys[k]: tensor for k, tensor in state_dict.items() if k in keys}, strict=False)
    return LoadResult(missing, unexpected)
