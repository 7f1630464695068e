"""`PeftModel`: a model with adapters by name, to train, switch, merge, save and load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import nn
from transformers.utils import PushToHubMixin

from . import card, storage
from ._bridge_hook import Bridged
from .configs import PeftConfig
from .errors import UnsupportedOptionError
from .kbit import require_input_gradients
from .mapping import PEFT_TYPE_TO_PREFIX_MAPPING, tuner_class
from .state_dict import LoadResult, apply_fit, fit_state_dict
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .tuner.functional import switched_off
from .tuner.inject import warn_if_name_in_prefix
from .tuner.transaction import transaction
from .tuner.walk import adapter_layers


class PeftModel(PushToHubMixin, nn.Module, Bridged):
    """A model with adapters. Adapts `model` in place; use `get_peft_model` to get the class for the task.

    `peft_model.base_model` is the tuner (`LoraModel`), `peft_model.base_model.model` the user's model, so parameters
    are called `base_model.model.….lora_A.default.weight`. Attributes it does not have are the tuner's, and then the
    model's.

    Args:
        model: the model to adapt.
        peft_config: the first adapter's config.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapter weights in float32 if the layer's are in a 16-bit (or 8-bit) float, for
            stable training.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
    """

    _peft_name: ClassVar[str] = "peft.PeftModel"
    #: What the hub lists the model under, where the task says it.
    pipeline_tag: ClassVar[str | None] = None

    base_model: Any

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.active_adapter = adapter_name
        self.peft_type = peft_config.peft_type
        #: Keyword arguments of the forward that are for the adapters and not for the model.
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        checkpoints = _checkpoints_activations(model)
        with transaction() as undo:
            self.base_model = tuner_class(peft_config)(
                model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            if checkpoints:
                undo.push(self._let_gradients_through(model))
            config: Any = getattr(model, "config", None)
            if hasattr(config, "pretraining_tp"):
                undo.attribute(config, "pretraining_tp")
                # a Llama that splits its products, as its training did, reads the weights past the adapters
                config.pretraining_tp = 1

    @staticmethod
    def _let_gradients_through(model: Any) -> Callable[[], Any]:
        """Let gradients reach the adapters through checkpointed blocks whose inputs ask for none; returns the undo."""
        if any(getattr(model, f"is_{kind}", False) for kind in ("loaded_in_8bit", "loaded_in_4bit", "quantized")):
            return lambda: None  # `prepare_model_for_kbit_training` has done it
        return require_input_gradients(model)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Let gradients reach the adapters through checkpointed blocks whose inputs ask for none."""
        self._let_gradients_through(model)
        return model

    # ---- what there is --------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters, by name."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The active adapter's config."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter takes part in the forward."""
        return not self._adapters_disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains whole, or None."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype of the user's model."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        return self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type:
        return type(self.base_model.model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet: asking it would never end
                raise
            return getattr(self.base_model, name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapter layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of all adapters together."""
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, counted in elements."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters there are, and how many of them are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's update is a weight update, so that an SVD can make a LoRA adapter of it."""
        return all(layer.supports_lora_conversion() for layer in adapter_layers(self) if hasattr(layer, "base_layer"))

    # ---- running --------------------------------------------------------------------------------------------------

    def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the model's forward or generate, with `adapter_names` handed to the layers and not to it."""
        if not self.special_peft_forward_args.isdisjoint(kwargs):
            plain = {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}
            with self._enable_peft_forward_hooks(*args, **kwargs):
                return function(*args, **plain)
        return function(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if not self.has_active_enabled_adapter:
            yield
            return
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. `adapter_names`: one adapter (or `"__base__"`) per sample, in evaluation mode."""
        return self._run(self.get_base_model(), *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`. `adapter_names`: one adapter (or `"__base__"`) per sample."""
        return self._run(self.get_base_model().generate, *args, **kwargs)  # type: ignore[union-attr]

    # ---- switching ------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active, and the only trainable one unless `inference_mode`.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found. The model has: {', '.join(self.peft_config)}.")
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of the adapter(s) trainable or not, active or not."""
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model computes what it did before it was adapted. May be nested."""
        was_disabled = self._adapters_disabled
        layers = list(adapter_layers(self.base_model.model))
        disabled = {layer.disable_adapters for layer in layers}
        if len(disabled) == 2:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. "
                "This is most likely unintentional. After exiting the disable_adapter context, all adapters "
                "will be enabled",
                stacklevel=3,
            )
        self.base_model.warn_if_bias_is_trained()
        try:
            if disabled == {False}:
                with switched_off(self.base_model.model):
                    self._adapters_disabled = True
                    yield
            else:
                self.base_model._enable_adapter_layers(False)
                self._adapters_disabled = True
                yield
        finally:
            if len(disabled) == 2:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled

    # ---- creating and deleting ------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Create a further adapter. It is neither active nor trainable until `set_adapter`.

        Args:
            adapter_name: a new name.
            peft_config: of the same method as the first adapter's.
            low_cpu_mem_usage: create its weights on the meta device, to be loaded later.
            autocast_adapter_dtype: keep 16-bit adapter weights in float32.

        Raises:
            ValueError: the name is taken, the method is another one, or the config does not fit; nothing is changed.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_if_name_in_prefix(adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type, ""))  # type: ignore[arg-type]
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and "
                f"{peft_config.peft_type}."
            )
        with transaction() as undo:
            undo.mapping(self.peft_config)
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first of the others becomes active.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        self.base_model.delete_adapter(adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    # ---- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: `adapter_config.json`, `adapter_model.safetensors` and a model card. Only the adapters.

        A kill at any moment leaves the adapter that was in the directory, or the new one.

        Args:
            save_directory: made if it does not exist. The adapter named "default" goes there, any other into a
                subdirectory of its name.
            safe_serialization: False: write a pickled `adapter_model.bin`.
            selected_adapters: names; None: all.
            save_embedding_layers: whether to add the embeddings; `"auto"`: if they are adapted or were resized.
            is_main_process: False: write nothing (but take part in gathering the state).
            path_initial_model_for_weight_conversion: the directory that the adapter was saved to before its training.
                With it an adapter that changed the base weight (PiSSA, OLoRA, CorDA, LoRA-GA) is written as plain LoRA
                for the original one, of twice the rank.
            kwargs: `state_dict`: the model's, if it was gathered already; `push_to_hub=True` and its arguments.

        Raises:
            ValueError: the path is a file, or an adapter does not exist, or it cannot be converted.
            AdapterFileError: the adapter in `path_initial_model_for_weight_conversion` does not fit.
        """
        push = kwargs.pop("push_to_hub", False)
        storage.save_adapters(
            self,
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            state_dict=kwargs.pop("state_dict", None),
        )
        if push and is_main_process:
            repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Adapt `model` with an adapter from a directory or the hub.

        Args:
            model: the model the adapter was trained on; changed in place.
            model_id: a directory, or the id of a hub repository.
            adapter_name: the name it gets.
            is_trainable: False: freeze it, and switch to evaluation mode.
            config: use this instead of the one beside the weights.
            autocast_adapter_dtype: keep 16-bit adapter weights in float32.
            ephemeral_gpu_offload: not implemented.
            low_cpu_mem_usage: put the loaded tensors into the model instead of copying them.
            key_mapping: regular expression → replacement, applied to the file's keys without `base_model.model.`.
            kwargs: as for `load_adapter`.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit; the model is as it was.
        """
        from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        _check_ephemeral(ephemeral_gpu_offload)
        storage.reject_offloaded(model)
        if config is None:
            config = storage.load_config(model_id, **kwargs)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        config.inference_mode = not is_trainable
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)  # type: ignore[arg-type]
        with transaction():
            peft_model = model_cls(
                model,
                config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
            result = peft_model.load_adapter(
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                key_mapping=key_mapping,
                **kwargs,
            )
        if result.missing_keys:  # only with strict=False; here nobody sees the result
            warnings.warn(
                f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}.", stacklevel=2
            )
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load an adapter from a directory or the hub; into the adapter of this name, if the model has it.

        Args:
            model_id: a directory, or the id of a hub repository.
            adapter_name: the name it gets.
            is_trainable: False: freeze it, and switch to evaluation mode.
            torch_device: where to read the tensors to; None: the accelerator, if there is one.
            autocast_adapter_dtype: keep 16-bit adapter weights in float32.
            ephemeral_gpu_offload: not implemented.
            low_cpu_mem_usage: put the loaded tensors into the model instead of copying them.
            key_mapping: regular expression → replacement, applied to the file's keys without `base_model.model.`.
            strict: False: missing and unexpected keys are no error, but the result.
            ignore_mismatched_sizes: leave tensors of another shape out, with a warning.
            use_safetensors: False: read a pickled `adapter_model.bin`, with `weights_only=True`.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir` and so on.

        Returns:
            `missing_keys` (of this adapter) and `unexpected_keys`.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit; the model is as it was.
        """
        _check_ephemeral(ephemeral_gpu_offload)
        storage.reject_offloaded(self.get_base_model())
        if ignored := storage.not_for_loading(kwargs):
            warnings.warn(
                f"load_adapter: {', '.join(ignored)} have no effect on an adapter and are ignored.", stacklevel=2
            )
        is_new = adapter_name not in self.peft_config
        config = storage.load_config(model_id, **kwargs) if is_new else self.peft_config[adapter_name]
        path = storage.find_weights(model_id, use_safetensors=use_safetensors is not False, **kwargs)
        tensors = storage.read_weights(path, torch_device, key_mapping)
        with transaction():
            if is_new:
                config.inference_mode = not is_trainable
                self.add_adapter(
                    adapter_name,
                    config,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                )
                if is_trainable:
                    self.set_requires_grad(adapter_name)
            fit = fit_state_dict(self, tensors, adapter_name)
            if strict:
                storage.check_fit(fit, path)
            result = apply_fit(
                self,
                fit,
                adapter_name,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                low_cpu_mem_usage=low_cpu_mem_usage,
                source=path,
            )
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return result

    # ---- for the hub ----------------------------------------------------------------------------------------------

    def _get_peft_specific_model_tags(self) -> list[str]:
        return card.model_tags(self)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write or bring up to date the `README.md` in an adapter's directory."""
        card.create_or_update_model_card(self, output_dir)


def _checkpoints_activations(model: Any) -> bool:
    """Whether the model checkpoints its blocks; a model that does not say may."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):  # Transformers' new name and its old
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return bool(getattr(model, "is_gradient_checkpointing", True))


def _check_ephemeral(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise UnsupportedOptionError("ephemeral_gpu_offload=True is not implemented in fastpeft; leave it at False.")
