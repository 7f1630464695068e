"""Adapter configs as data: dataclasses that read and write PEFT's `adapter_config.json`, key for key."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import secrets
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from fastpeft._bridge_hook import Bridged
from fastpeft.configs.types import PeftType, TaskType
from fastpeft.errors import AdapterFileError, UnsupportedOptionError

CONFIG_NAME = "adapter_config.json"
__version__ = "0.21.2"  # the PEFT version whose file format is written, as `peft_version`

CONFIG_CLASSES: dict[str, type[PeftConfigMixin]] = {}  # PeftType -> config class, of the methods implemented


def register_config(peft_type: PeftType, config_cls: type[PeftConfigMixin]) -> None:
    """Make files that say `"peft_type": peft_type` load as `config_cls`."""
    CONFIG_CLASSES[peft_type] = config_cls


def config_class(peft_type: str) -> type[PeftConfigMixin]:
    """The config class of a method; raises `UnsupportedOptionError` or `AdapterFileError` where there is none."""
    if peft_type in CONFIG_CLASSES:
        return CONFIG_CLASSES[peft_type]
    known = ", ".join(sorted(str(PeftType(name).value) for name in CONFIG_CLASSES))
    if peft_type in list(PeftType):
        raise UnsupportedOptionError(
            f"peft_type={PeftType(peft_type).value!r} is a method of PEFT that fastpeft does not implement; "
            f"implemented: {known}. Use PEFT for this adapter."
        )
    raise AdapterFileError(f"peft_type={peft_type!r} is not the name of an adapter method; expected one of: {known}.")


@dataclass
class PeftConfigMixin(Bridged):
    """What the config of every method has. `peft_version` is filled in with the format version written."""

    _peft_name: ClassVar[str] = "peft.config.PeftConfigMixin"

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            names = ", ".join(TaskType)
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {names}."
            )
        if self.peft_version is None:
            self.peft_version = __version__

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, nested configs included."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory` (made if needed), all at once or not at all.

        `auto_mapping_dict` replaces the `auto_mapping` field in the file, for models that no Auto class can load.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        os.makedirs(save_directory, exist_ok=True)
        output = {key: list(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            output["auto_mapping"] = auto_mapping
        text = json.dumps(output, indent=2, sort_keys=True)
        _write_atomically(os.path.join(save_directory, CONFIG_NAME), text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload the config to a model repository on the Hub, made if needed; returns the commit's info."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """The config of the method named by `peft_type`, or of `cls` without one, from keyword arguments.

        Arguments that the class does not know are dropped with a warning if `peft_type` is there, since a file of a
        later PEFT may have more keys; without it the arguments are no adapter config and `TypeError` is raised.
        """
        target = config_class(kwargs["peft_type"]) if "peft_type" in kwargs else cls
        known = {field.name for field in fields(target) if field.init}
        unknown = sorted(set(kwargs) - known)
        if not unknown:
            return target(**kwargs)
        if "peft_type" not in kwargs:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are ignored. This probably "
            "means that the configuration file was saved by a later version of PEFT with options that fastpeft does "
            "not have. Upgrade fastpeft, or check that the options do not matter to this adapter.",
            stacklevel=2,
        )
        return target(**{key: value for key, value in kwargs.items() if key in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The config in a local directory or a Hub repository; its class is that of the method in the file.

        `kwargs`: arguments of `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...). A field passed
        here counts only where the file does not have it: change attributes of the result instead.

        Raises `AdapterFileError` (a `ValueError`) if there is no such file or it is no adapter config.
        """
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        file = _find_config(pretrained_model_name_or_path, subfolder, hub_kwargs)
        loaded = cls.check_kwargs(**{**class_kwargs, **cls.from_json_file(file)})
        try:
            return cls.from_peft_type(**loaded)
        except (UnsupportedOptionError, AdapterFileError) as error:
            raise type(error)(f"{file}: {error}") from error

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The content of a config file, without `runtime_config`, which is never loaded."""
        with open(path_json_file, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise AdapterFileError(f"{path_json_file} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise AdapterFileError(
                f"{path_json_file} holds a JSON {type(content).__name__}; an adapter config is an object with the key "
                "'peft_type'."
            )
        if "runtime_config" in content:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
            del content["runtime_config"]
        return content

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Keyword arguments by who takes them: the hub download, the config class, nobody."""
        from huggingface_hub import hf_hub_download

        hub_names = set(inspect.signature(hf_hub_download).parameters)
        field_names = {field.name for field in fields(cls)}
        hub = {key: value for key, value in kwargs.items() if key in hub_names}
        own = {key: value for key, value in kwargs.items() if key in field_names - hub_names}
        rest = {key: value for key, value in kwargs.items() if key not in hub_names | field_names}
        return hub, own, rest

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **hf_hub_download_kwargs: Any) -> str:
        """The `peft_type` of an adapter, without building its config."""
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        return cls.from_json_file(_find_config(model_id, subfolder, hf_hub_download_kwargs))["peft_type"]

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """What `from_pretrained` passes on to the class; for subclasses that must read older files."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns prompts instead of weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is adaption prompt."""
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """The config of any method.

    Args:
        base_model_name_or_path: the model the adapter was trained on.
        revision: that model's revision.
        inference_mode: whether the adapter's weights stay frozen.
    """

    _peft_name: ClassVar[str] = "peft.config.PeftConfig"

    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


def _find_config(model_id: str | os.PathLike, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
    """The path of `adapter_config.json` in a directory, or downloaded from the Hub."""
    folder = os.path.join(model_id, subfolder) if subfolder is not None else os.fspath(model_id)
    local = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(local):
        return local
    if os.path.isdir(model_id):
        raise AdapterFileError(f"Can't find '{CONFIG_NAME}' at '{folder}'; the directory has no such file.")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(os.fspath(model_id), CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
    except Exception as error:  # whatever the download raises, the user asked for an adapter that cannot be had
        raise AdapterFileError(
            f"Can't find '{CONFIG_NAME}' at '{model_id}': it is no local directory, and the Hub said: {error}"
        ) from error


def _write_atomically(path: str, text: str) -> None:
    """Write a text file so that a kill at any moment leaves the old file or the new one."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
