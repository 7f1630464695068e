"""Adapter files: PEFT's `adapter_config.json`, `adapter_model.safetensors` and model card, locally or on the hub.

What is guaranteed. *Saving*: a kill at any moment leaves the adapter that was there or the new one, config and weights
together (`atomic.py`). *Loading*: only safetensors, unless `use_safetensors=False` asks for a pickled `.bin`, which is
then read with `weights_only=True`. A file that is missing, damaged, or does not fit the model is an `AdapterFileError`
that names it, and the model stays as it was.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import atomic, plain_lora
from .configs import CONFIG_CLASSES, PeftConfig
from .errors import AdapterFileError, UnsupportedOptionError
from .mapping import PEFT_TYPE_TO_TUNER_MAPPING
from .state_dict import Fit, get_peft_model_state_dict
from .tuner.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .tuner.conversion import PREFIX
from .tuner.walk import infer_device

if TYPE_CHECKING:
    from .model import PeftModel

# ---- saving ---------------------------------------------------------------------------------------------------------


def save_adapters(
    model: PeftModel,
    save_directory: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapters into a directory; see `PeftModel.save_pretrained`."""
    directory = Path(save_directory)
    if directory.is_file():
        raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
    names = list(model.peft_config) if selected_adapters is None else selected_adapters
    if unknown := [name for name in names if name not in model.peft_config]:
        raise ValueError(
            f"You passed an invalid `selected_adapters` arguments, current supported adapter names are"
            f" {list(model.peft_config)} - got {selected_adapters} (unknown: {unknown})."
        )
    if is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        model.create_or_update_model_card(str(directory))
    for name in names:
        # on every process: gathering a sharded model's state takes all of them
        tensors = get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
        )
        if is_main_process:
            target = directory if name == "default" else directory / name
            config = _config_to_save(model, name)
            if path_initial_model_for_weight_conversion is not None:
                source = path_initial_model_for_weight_conversion
                config = plain_lora.of_twice_the_rank(config)
                tensors = plain_lora.minus_initial(tensors, load_peft_weights(source, "cpu"), os.fspath(source))
            write_adapter(target, config, tensors, safe_serialization, _auto_mapping(model, name))


def _config_to_save(model: PeftModel, adapter_name: str) -> PeftConfig:
    """The config as a file has it: for inference, and naming the base model."""
    config = copy.copy(model.peft_config[adapter_name])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.get_base_model().__dict__.get("name_or_path") or None
    return config


def _auto_mapping(model: PeftModel, adapter_name: str) -> dict[str, str] | None:
    """Which class to load the base model with, where no task says it."""
    if model.peft_config[adapter_name].task_type is not None:
        return None
    base_class = type(model.get_base_model())
    return {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}


def write_adapter(
    directory: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    safe_serialization: bool = True,
    auto_mapping: dict[str, str] | None = None,
) -> None:
    """Write config and weights of one adapter, both or neither.

    Args:
        directory: made if it does not exist.
        config: the adapter's config.
        tensors: as `get_peft_model_state_dict` returns them.
        safe_serialization: safetensors, or `.bin`; a file of the other kind is removed, since it would be read instead.
        auto_mapping: written into the config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with atomic.staging(directory) as new:
        if safe_serialization:
            from safetensors.torch import save_file

            save_file(_unshared(tensors), new / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        else:
            torch.save(dict(tensors), new / WEIGHTS_NAME)
        config.save_pretrained(str(new), auto_mapping_dict=auto_mapping)
        atomic.commit(directory, new, [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME])


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that safetensors can write: contiguous, and no two in one storage."""
    result: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr(), storage.nbytes())
        result[name] = tensor.clone() if key in seen and storage.nbytes() else tensor
        result[name] = result[name].contiguous()
        seen.add(key)
    return result


# ---- finding --------------------------------------------------------------------------------------------------------


def file_exists_on_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Is there such a file in a hub repository? None if that cannot be known: offline, or no answer."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        return huggingface_hub.file_exists(repo_id, filename, **kwargs)
    except (HFValidationError, EntryNotFoundError):
        return None
    except Exception as error:  # the hub client's errors are many, and none must keep an adapter from being saved
        warnings.warn(
            f"Unable to fetch remote file due to the following error {error} - silently ignoring the lookup"
            f" for the file {filename} in {repo_id}.",
            stacklevel=2,
        )
        return None


def _download(model_id: str, filename: str, **kwargs: Any) -> str:
    """The local path of a file of a hub repository; in offline mode from the cache only.

    Raises:
        AdapterFileError: there is no such file, or it cannot be had.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        kwargs["local_files_only"] = True
    try:
        return huggingface_hub.hf_hub_download(model_id, filename, **kwargs)
    except Exception as error:  # whatever the client raises, the user asked for a file that cannot be had
        reason = str(error).strip().partition("\n")[0]
        raise AdapterFileError(
            f"Can't find weights: {filename} of {model_id} cannot be had from the hub: {reason}"
        ) from error


@functools.cache
def _download_arguments() -> frozenset[str]:
    from huggingface_hub import hf_hub_download

    return frozenset(inspect.signature(hf_hub_download).parameters) | {"use_auth_token"}


def hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that `hf_hub_download` understands; the old name of `token` is translated."""
    found = {key: value for key, value in kwargs.items() if key in _download_arguments() and value is not None}
    token = found.pop("use_auth_token", None)
    return found if token is None else {"token": token, **found}


def not_for_loading(kwargs: Mapping[str, Any]) -> list[str]:
    """The arguments that neither a download nor an adapter's config has a use for."""
    config_fields = {field.name for cls in CONFIG_CLASSES.values() for field in fields(cls)}
    return sorted(set(kwargs) - _download_arguments() - config_fields - {"device_map"})


def load_config(model_id: str | os.PathLike[str], **kwargs: Any) -> PeftConfig:
    """Read the config of an adapter, locally or from the hub.

    Raises:
        AdapterFileError: there is none, it is damaged, or it is the config of an unknown method.
        UnsupportedOptionError: it asks for something that fastpeft does not implement.
    """
    try:
        config: PeftConfig = PeftConfig.from_pretrained(model_id, **kwargs)
    except TypeError as error:
        raise AdapterFileError(f"{CONFIG_NAME} of {model_id} is no adapter config: {error}") from error
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise AdapterFileError(
            f"{CONFIG_NAME} of {model_id}: key 'peft_type' is {config.peft_type!r}, expected one of "
            f"{sorted(str(getattr(t, 'value', t)) for t in PEFT_TYPE_TO_TUNER_MAPPING)}."
        )
    return config


# ---- loading --------------------------------------------------------------------------------------------------------


def find_weights(model_id: str | os.PathLike[str], *, use_safetensors: bool = True, **kwargs: Any) -> str:
    """The path of an adapter's weights: in a directory, in the hub's cache, or downloaded.

    Args:
        model_id: a directory, or the id of a hub repository.
        use_safetensors: look for safetensors; False: for the pickled `.bin`.
        kwargs: `subfolder` and the other arguments of `hf_hub_download`; what it does not know is left out.

    Raises:
        AdapterFileError: there is no such file.
    """
    kwargs = hub_kwargs(kwargs)
    wanted, other = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    if not use_safetensors:
        wanted, other = other, wanted
    directory = os.path.join(model_id, kwargs.get("subfolder") or "")
    if os.path.exists(os.path.join(directory, wanted)):
        return os.path.join(directory, wanted)
    hint = (
        " There is a pickled adapter_model.bin: pass use_safetensors=False to load it (with weights_only=True), or "
        "convert it by loading and saving it in PEFT."
        if use_safetensors
        else " There is an adapter_model.safetensors: leave use_safetensors at its default."
    )
    if os.path.isdir(model_id):
        found = hint if os.path.exists(os.path.join(directory, other)) else ""
        raise AdapterFileError(f"Can't find weights: {wanted} is not in {directory}.{found}")
    try:
        return _download(str(model_id), wanted, **kwargs)
    except AdapterFileError as error:
        known = {k: v for k, v in kwargs.items() if k in ("revision", "repo_type", "token")}
        in_subfolder = "/".join(filter(None, (kwargs.get("subfolder"), other)))
        found = hint if file_exists_on_hub(str(model_id), in_subfolder, **known) else ""
        raise AdapterFileError(f"{error}{found}") from error


def read_weights(
    path: str, device: str | torch.device | None = None, key_mapping: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Read a weights file; a `.bin` with `weights_only=True`.

    Args:
        path: of the file.
        device: where to put the tensors; None: the accelerator, if there is one.
        key_mapping: see `load_peft_weights`.

    Raises:
        AdapterFileError: the file is damaged, or holds something else than named tensors.
    """
    device = infer_device() if device is None else device
    try:
        if not path.endswith(".safetensors"):
            content = torch.load(path, map_location=torch.device(device), weights_only=True)
        else:
            from safetensors.torch import load_file

            # safetensors cannot read onto every device
            direct = torch.device(device).type in ("cpu", "cuda")
            content = load_file(path, device=str(device) if direct else "cpu")
            content = content if direct else {key: tensor.to(device) for key, tensor in content.items()}
    except Exception as error:  # safetensors and pickle raise many kinds for a damaged file
        raise AdapterFileError(
            f"{path} cannot be read: {error}. The file is damaged or incomplete (its size is {os.path.getsize(path)} "
            "bytes); save or download the adapter again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise AdapterFileError(f"{path} does not hold a dictionary of named tensors, so it is no adapter file.")
    return {_map_key(key, key_mapping): tensor for key, tensor in content.items()} if key_mapping else content


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    use_safetensors: bool = True,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter file, from a directory or the hub.

    Args:
        model_id: a directory, or the id of a hub repository.
        device: where to put the tensors; None: the accelerator, if there is one.
        key_mapping: regular expression → replacement, applied to each key without its `base_model.model.`; the first
            that matches counts.
        use_safetensors: False: read `adapter_model.bin` instead, with `weights_only=True`.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and so on.

    Raises:
        AdapterFileError: there is no such file, or it is damaged.
    """
    path = find_weights(model_id, use_safetensors=use_safetensors, **hf_hub_download_kwargs)
    return read_weights(path, device, key_mapping)


def _map_key(key: str, key_mapping: Mapping[str, str]) -> str:
    prefix = next((p for p in (PREFIX, "base_model.") if key.startswith(p)), None)
    if prefix is None:
        raise AdapterFileError(f"key_mapping: the key {key!r} of the adapter file does not begin with 'base_model.'.")
    rest = key.removeprefix(prefix)
    for pattern, replacement in key_mapping.items():
        mapped, count = re.subn(pattern, replacement, rest)
        if count:
            return f"{prefix}{mapped}"
    return key


def check_fit(fit: Fit, path: str) -> None:
    """Raise if a file lacks tensors that the adapter needs or has some that the model has no place for.

    Raises:
        AdapterFileError: naming the file and the first of the keys.
    """
    problems = []
    if fit.missing:
        problems.append(f"lacks {len(fit.missing)} tensor(s) that the adapter needs: {_some(fit.missing)}")
    if fit.unexpected:
        problems.append(f"has {len(fit.unexpected)} tensor(s) that the model has no place for: {_some(fit.unexpected)}")
    if problems:
        raise AdapterFileError(
            f"{path} {' and '.join(problems)}. Is this the model the adapter was trained on, with the same target "
            "modules? To load what fits all the same, pass strict=False."
        )


def _some(keys: list[str], limit: int = 4) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def reject_offloaded(model: Any) -> None:
    """Raise `UnsupportedOptionError` for a model of which Accelerate keeps a part on the CPU or disk for the GPU."""
    device_map = getattr(model, "hf_device_map", None) or {}
    if len(set(device_map.values())) > 1 and {"cpu", "disk"} & set(map(str, device_map.values())):
        raise UnsupportedOptionError(
            "Loading an adapter into a model that is partly offloaded (device_map with 'cpu' or 'disk') is not "
            "implemented in fastpeft. Load the model onto one device or onto several GPUs, or use PEFT."
        )
