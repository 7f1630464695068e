"""LoRA in a model (arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from ..layers import kasa
from ..layers.experts import ParamWrapper
from ..layers.lora import LoraLayer
from .activated import activated_from
from .base import BaseTuner
from .constants import LORA_TARGET_MODULES
from .dispatch import create_lora_layer
from .mixed import per_sample_adapters
from .targets import pattern_value
from .transaction import transaction
from .walk import tuner_layers
from .weighted import CombinationType, add_weighted_adapter

if TYPE_CHECKING:
    from ..configs import LoraConfig


# Initialisations that take what they put into the adapter out of the base weights.
_CHANGE_THE_BASE = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA", "lora_ga": "LoRA-GA"}


class LoraModel(BaseTuner):
    """A model with LoRA adapters; see `BaseTuner` for the arguments."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.LoraModel"
    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = LORA_TARGET_MODULES

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        others = [other for other in self.peft_config.values() if other is not config]
        for method, title in _CHANGE_THE_BASE.items():
            if others and any(str(c.init_lora_weights).lower().startswith(method) for c in (config, *others)):
                warnings.warn(
                    f"{title} changes the base weights of the model and should thus not be used with other adapters. "
                    f"Consider converting the {title} adapter into a normal LoRA adapter: save it with "
                    "`path_initial_model_for_weight_conversion`.",
                    stacklevel=2,
                )
        # the place in a nest of wrappers says which parameter a weight belongs to, so all adapters must nest alike
        for name, other in self.peft_config.items():
            if other is not config and (config.kasa_config is None) != (other.kasa_config is None):
                new, old = ("does not use", "does") if config.kasa_config is None else ("uses", "does not")
                raise ValueError(
                    "KaSA cannot be combined with adapters that don't use KaSA, since KaSA modifies the base weights: "
                    f"the new adapter {new} KaSA but adapter '{name}' {old}."
                )
            if other is config or not config.target_parameters or not other.target_parameters:
                continue
            if set(other.target_parameters) != set(config.target_parameters):
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(config.target_parameters)} for the new adapter and "
                    f"{sorted(other.target_parameters)} for adapter '{name}'."
                )

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
        r = pattern_value(config.rank_pattern, current_key, config.r)
        lora_alpha = pattern_value(config.alpha_pattern, current_key, config.lora_alpha)
        # a further parameter of the same module: its wrapper goes around the one that is there
        nests = isinstance(target, ParamWrapper) and adapter_name in target.lora_A
        with transaction() as undo:
            if isinstance(target, LoraLayer) and not nests:
                layer: Any = target
                if adapter_name not in layer.r:
                    undo.push(lambda: _forget(layer, adapter_name))
                layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, target_name=current_key)
                return
            if nests and target.parameter_name == parameter_name:
                raise ValueError(
                    f"The parameter {current_key!r} is targeted twice by adapter {adapter_name!r}. List it once in "
                    "`target_parameters`."
                )
            new_module = self._create_new_module(
                config,
                adapter_name,
                target,
                r=r,
                lora_alpha=lora_alpha,
                target_name=current_key,
                parameter_name=parameter_name,
            )
            undo.replace_module(parent, target_name, new_module)

    @staticmethod
    def _create_new_module(config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return create_lora_layer(target, adapter_name, config, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` (one per sample) and `alora_offsets` to the layers while the block runs."""
        adapter_names, alora_offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
        num_beams = kwargs.get("num_beams")
        with ExitStack() as stack:
            if alora_offsets is not None:
                stack.enter_context(activated_from(self.model, alora_offsets, num_beams))
            if adapter_names is not None:
                stack.enter_context(per_sample_adapters(self, adapter_names, num_beams))
            yield

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Any:
        """What KaSA adds to the loss for these adapters (None: the active ones): a tensor, or 0.0 without KaSA."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else names
        total: Any = 0.0
        for layer in tuner_layers(self.model, LoraLayer):
            for name in names:
                if name in getattr(layer, "lora_diag", ()):
                    options = self.peft_config[name].kasa_config
                    total = total + kasa.regularisation(layer, name, options.beta, options.gamma)
        return total

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Create an adapter that combines others; see `fastpeft.tuner.weighted.add_weighted_adapter`."""
        add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        )


def _forget(layer: Any, adapter_name: str) -> None:
    """Take an adapter that was just added out of a layer, whatever is active."""
    layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
    layer.delete_adapter(adapter_name)
