"""The seam for LoRA's relatives: a variant is an object that replaces what a layer computes for one adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig
    from fastpeft.layers.lora import LoraLayer

# The config options that ask for a variant. A layer kind lists those it has in `LoraLayer.lora_variants`.
VARIANT_OPTIONS = (
    "use_dora",
    "velora_config",
    "kasa_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
)


class LoraVariant:
    """One adapter's own init, forward and merge on a layer; `LoraLayer.lora_variant` maps adapters to theirs."""

    name = "a variant of LoRA"  # in messages
    supports_mixed_batch = True  # whether `adapter_names` may name an adapter of this variant

    def init(self, layer: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Make what the variant needs beyond A and B, which exist already and are on the base layer's device."""
        raise NotImplementedError

    def forward(self, layer: LoraLayer, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's whole output, from its input and the output of the base and the adapters before this one."""
        raise NotImplementedError

    def merge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """The base weight with the adapter in it, as a new tensor."""
        raise NotImplementedError

    def unmerge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """The base weight with the adapter out of it again, as a new tensor."""
        raise NotImplementedError

    def supports_lora_conversion(self) -> bool:
        """Whether a plain LoRA adapter can stand for this one."""
        return True


class AdditiveVariant(LoraVariant):
    """A variant that adds to the weight; a subclass says what, and how it computes its output if not as LoRA does."""

    def delta(self, layer: LoraLayer, adapter_name: str) -> Tensor:
        """What merging adds to the base weight, in its shape."""
        raise NotImplementedError

    def forward(self, layer: LoraLayer, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scaling · B(A(dropout(x)))."""
        return result + layer._adapter_product(adapter_name, x) * layer.scaling[adapter_name]

    def merge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """weight + delta, a new tensor."""
        return weight + self.delta(layer, adapter_name).to(weight.dtype)

    def unmerge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """weight - delta, a new tensor."""
        return weight - self.delta(layer, adapter_name).to(weight.dtype)


def resolve_variant(layer: LoraLayer, config: LoraConfig) -> LoraVariant | None:
    """A new variant object as the config asks for, None for plain LoRA.

    Raises `ValueError` if the layer kind does not have the variant, or several are asked for at once.
    """
    asked = tuple(name for name in VARIANT_OPTIONS if getattr(config, name, None))
    if not asked:
        return None
    variant = layer.lora_variants.get(asked[0]) if len(asked) == 1 else None
    if variant is None:
        raise ValueError(
            f"Invalid or unsupported variant combination: lora.{type(layer).__name__} does not support "
            f"{' with '.join(asked)}; unset it, or do not target this layer."
        )
    return variant()
