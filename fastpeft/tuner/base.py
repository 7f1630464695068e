"""What every adapter method does to a model: hold the adapters' configs, switch, merge, unload."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .._bridge_hook import Bridged
from ..configs import PeftConfig
from ..layers.base import BaseTunerLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper
from . import functional
from .constants import DUMMY_MODEL_CONFIG
from .inject import inject_adapter
from .offload import onload
from .quantised import dequantise_rest
from .replicate import replicate_layers
from .targets import check_target_module_exists
from .tied import untie_config_after_merge, warn_before_merge
from .transaction import transaction
from .walk import adapter_layers, named_modules, submodule_and_parent, tuner_layers

if TYPE_CHECKING:
    from ..configs import LoraConfig


class BaseTuner(nn.Module, Bridged):
    """A model with adapters in it: `tuner.model` is the user's model, whose layers have been wrapped in place.

    Attributes it does not have are the model's. A method derives from this class, names its layer class, and says in
    `_create_and_replace` how one module is adapted.

    Args:
        model: the model to adapt; changed in place.
        peft_config: the config of the first adapter, or a dict of configs by adapter name.
        adapter_name: the adapter to create.
        low_cpu_mem_usage: create the adapter's weights on the meta device, to be loaded later.
        state_dict: adapt the modules that this state dict has weights for, instead of those the config names.
    """

    _peft_name: ClassVar[str] = "peft.tuners.tuners_utils.BaseTuner"

    #: What the attributes that hold an adapter's weights begin with.
    prefix: ClassVar[str]
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]]
    #: model_type → names to adapt when the config has none.
    target_module_mapping: ClassVar[Mapping[str, list[str] | str]]
    #: Whether layers share weights held by the tuner, so that it cannot be left out (`inject_adapter_in_model`).
    uses_shared_state: ClassVar[bool] = False

    peft_config: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        new = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        self.active_adapter: str | list[str] = adapter_name
        with transaction() as undo:
            existing = getattr(model, "peft_config", None)
            if isinstance(existing, dict):
                warnings.warn(
                    "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters"
                    " in the model. Make sure to know what you are doing!",
                    stacklevel=2,
                )
                undo.mapping(existing)
                existing.update(new)
                new = existing
            self.peft_config = new
            layer_map = getattr(new[adapter_name], "layer_replication", None)
            if layer_map and existing is None:
                replicate_layers(model, layer_map)
            self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            undo.attribute(model, "peft_config")
            model.peft_config = self.peft_config  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: asking it for "model" would never end
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they are applied."""
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    # ---- creating -------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Create the adapter whose config is `self.peft_config[adapter_name]` in the model.

        The model's own parameters are frozen by the first adapter; a further one leaves trainability and the choice of
        active adapters as they are. If anything fails the model is as it was before.

        Args:
            model: the model that holds the modules, `self.model`.
            adapter_name: a key of `self.peft_config`.
            autocast_adapter_dtype: cast 16-bit adapter weights to float32. (`PeftModel` does this after injection.)
            low_cpu_mem_usage: create the weights on the meta device.
            state_dict: adapt what this state dict has weights for; only its keys are used.

        Raises:
            NoMatchingPeftModuleError: the config names no module of this model.
            ValueError: a targeted module cannot be adapted, or options contradict each other.
        """
        inject_adapter(self, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)

    def _create_and_replace(
        self,
        config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt one module: put a tuner layer in its place, or add the adapter to the tuner layer that is there."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a module is adapted")

    def _prepare_adapter_config(self, config: LoraConfig, model_config: Mapping[str, Any]) -> LoraConfig:
        """Choose target modules by architecture, in place. Called if the config has none."""
        defaults = self.target_module_mapping.get(model_config.get("model_type", ""))
        if defaults is not None:
            config.target_modules = defaults if isinstance(defaults, str) else set(defaults)
        elif not config.target_parameters:
            raise ValueError(
                "Please specify `target_modules` or `target_parameters` in `peft_config`: there is no default for "
                f"model_type={model_config.get('model_type')!r}."
            )
        return config

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        """Raise `ValueError` if the config cannot stand beside those of the adapters that exist."""
        layer_map = getattr(config, "layer_replication", None)
        if layer_map and any(getattr(c, "layer_replication", None) != layer_map for c in self.peft_config.values()):
            raise ValueError(
                f"layer_replication={layer_map}: the layers are replicated when the first adapter is made, and are as "
                "its config says for all further ones. Use the same value in all configs, or none in this one."
            )
        with_bias = [name for name, conf in self.peft_config.items() if getattr(conf, "bias", "none") != "none"]
        if len(self.peft_config) > 1 and len(with_bias) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias to "
                f"'none' for all adapters (adapters with bias: {with_bias})."
            )

    @staticmethod
    def _check_target_module_exists(config: LoraConfig, key: str) -> Any:
        return check_target_module_exists(config, key)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the model, except the adapters and the biases that the active adapters train."""
        functional.freeze_outside_adapters(model)
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias == "none":
                continue
            if bias == "all":
                biases = [p for name, p in model.named_parameters() if name == "bias" or name.endswith(".bias")]
            elif bias.endswith("_only"):
                biases = [layer.bias for layer in tuner_layers(model, self.tuner_layer_cls) if hasattr(layer, "bias")]
            else:
                raise NotImplementedError(f"Requested bias: {bias}, is not implemented.")
            for parameter in biases:
                if parameter is not None:
                    parameter.requires_grad = True

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        functional.cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    # ---- switching ------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make the adapter(s) active, and the only trainable ones unless `inference_mode`."""
        functional.set_adapter(self.model, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters of the adapter(s) trainable or not, active or not."""
        functional.set_requires_grad(self.model, adapter_names=adapter_names, requires_grad=requires_grad)

    def enable_adapter_layers(self) -> None:
        """Let the adapters take part in the forward again, and train the active ones."""
        self._enable_adapter_layers(True)

    def disable_adapter_layers(self) -> None:
        """Take all adapters out of the forward: the model computes what it did before it was adapted."""
        self.warn_if_bias_is_trained()
        self._enable_adapter_layers(False)

    def warn_if_bias_is_trained(self) -> None:
        """Warn that disabling the adapters leaves the biases as they were trained."""
        for adapter in self.active_adapters:
            bias = getattr(self.peft_config[adapter], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the "
                    "same output as the base model would without adaption.",
                    stacklevel=3,
                )

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in adapter_layers(self.model):
            layer.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first of the others becomes active.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        functional.check_adapters_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self.active_adapter = (
            functional.delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls) or []
        )

    # ---- merging --------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError(
                "Cannot merge LORA layers when base model layers are replicated: the places where a layer stands share "
                "its weight, and have adapters of their own."
            )
        tied = bool(self.get_model_config(self.model).get("tie_word_embeddings"))
        warn_before_merge(self.targeted_module_names, tied)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters' updates to the weights they belong to; the layers stay, and `unmerge_adapter` undoes it.

        Args:
            adapter_names: which adapters; None: the active ones.
            safe_merge: check each merged weight for NaN before it replaces the old one.
        """
        self._check_merge_allowed()
        for layer in list(tuner_layers(self.model)):
            with onload(layer):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged updates out of the weights again."""
        for layer in list(tuner_layers(self.model)):
            with onload(layer):
                layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge the adapters into the weights and take the tuner layers out: the plain model, to be assigned and used.

        Args:
            progressbar: show one.
            safe_merge: check each merged weight for NaN before it replaces the old one.
            adapter_names: which adapters; None: the active ones.
            dequantize: decode weights of 4 or 8 bits, add the adapters and keep the sum in the dtype the weight was
                quantised from; all 4-bit layers become plain ones. False: the sum is quantised again, as PEFT does,
                and a warning says by how much that moved it.
        """
        model = self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, dequantize)
        if dequantize:
            dequantise_rest(model)
        return model

    def unload(self) -> nn.Module:
        """Take the tuner layers out without merging: the model as it was before it was adapted."""
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        layers = [
            key
            for key, module in named_modules(self.model, into_adapters=False)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        keys: Any = layers
        if progressbar:
            from tqdm import tqdm

            keys = tqdm(layers, desc="Unloading and merging model" if merge else "Unloading model")
        for key in keys:
            try:
                parent, layer, name = submodule_and_parent(self.model, key)
            except AttributeError:
                continue  # inside of a module that has been unloaded as a whole
            with onload(layer):
                if hasattr(layer, "unload_and_optionally_merge_module"):
                    plain = layer.unload_and_optionally_merge_module(
                        merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                    )
                elif dequantize and hasattr(layer, "merged_linear"):
                    plain = layer.merged_linear(adapter_names or layer.active_adapters, safe_merge)
                else:
                    if merge:
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    plain = layer.get_base_layer()
            setattr(parent, name, plain)
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        if merge:
            untie_config_after_merge(self.model)
        return self.model

    # ---- facts ----------------------------------------------------------------------------------------------------

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's config as a dict; `{"model_type": "custom"}` for a model without one."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return config  # type: ignore[return-value]
