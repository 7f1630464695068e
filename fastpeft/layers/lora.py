"""What LoRA's layer kinds share: the adapters' state, adding one, merging, scaling, and the general forward.

A kind supplies how its factors are made (`_make_factors`), the adapter's product for an input (`_adapter_product`,
before the scale) and for the weight (`get_delta_weight`); everything else is here, once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import PeftWarning, UnsupportedOptionError
from fastpeft.layers.base import BaseTunerLayer, check_adapters_to_merge, in_out_features
from fastpeft.layers.init import initialise
from fastpeft.layers.variants import LoraVariant, resolve_variant


class LoraLayer(BaseTunerLayer):
    """A layer with LoRA adapters (arXiv:2106.09685): y = base(x) + sum over the active of scaling · B A dropout(x).

    A mixin, put before `nn.Module` among the bases (or behind it, with a `forward` of your own) and initialised after
    it. The attribute names are PEFT's.
    """

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.LoraLayer"

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )
    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {}  # config option -> variant, of this layer kind
    fan_in_fan_out: bool = False  # the base weight is (in, out)

    base_layer: Any
    in_features: Any
    out_features: Any
    lora_dropout: nn.ModuleDict
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict
    # by adapter
    r: dict[str, int]
    lora_alpha: dict[str, int]
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, LoraVariant]  # plain LoRA has none

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        if ephemeral_gpu_offload:
            raise UnsupportedOptionError(
                "runtime_config.ephemeral_gpu_offload=True is not implemented in fastpeft; leave it at False."
            )
        # Past nn.Module.__setattr__, which costs as much as all the rest of making a layer.
        self._modules["base_layer"] = base_layer
        for name in _DICTS:
            self.__dict__[name] = {}
        for name in ("lora_dropout", "lora_A", "lora_B"):
            self._modules[name] = nn.ModuleDict()
        for name in ("lora_embedding_A", "lora_embedding_B"):
            self._modules[name] = nn.ParameterDict()
        self._modules["lora_magnitude_vector"] = nn.ModuleDict()
        self.__dict__.update(
            _disable_adapters=False,
            merged_adapters=[],
            cast_input_dtype_enabled=True,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            kwargs=kwargs,
        )
        self.in_features, self.out_features = self._get_in_out_features(self.get_base_layer())

    def _get_in_out_features(self, module: nn.Module) -> tuple[int | None, int | None]:
        return in_out_features(module)

    # What a kind supplies

    def base_weight(self) -> Tensor:
        """The base weight; a layer over a quantised one decodes it."""
        return self.get_base_layer().weight

    def norm_weight(self) -> Any:
        """The base weight as `ops.weight_norm` takes it."""
        return self.base_weight()

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        """Make A and B as PEFT makes them, random."""
        raise NotImplementedError

    def _reset_factors(self, adapter_name: str, fill: Callable[[Tensor], Any]) -> None:
        """Start the adapter as nothing: A by `fill`, B and its bias zero."""
        A: Any = self.lora_A[adapter_name]
        B: Any = self.lora_B[adapter_name]
        fill(A.weight)
        B.weight.data.zero_()
        if B.bias is not None:
            B.bias.data.zero_()

    def _adapter_product(self, adapter_name: str, x: Tensor, **kwargs: Any) -> Tensor:
        """B A dropout(x), without the scale, for an input of the layer; dropout is what the adapter's module does."""
        A: Any = self.lora_A[adapter_name]
        x = self._cast_input_dtype(x, A.weight.dtype)
        return self.lora_B[adapter_name](A(self.lora_dropout[adapter_name](x)))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging the adapter adds to the base weight, in its shape."""
        raise NotImplementedError

    def _check_config(self, r: int, config: LoraConfig) -> None:
        """Raise or warn, before anything changes, about what the kind cannot do."""
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                "`lora_bias=True` was passed but the targeted layer of type "
                f"{type(self.get_base_layer()).__name__} has no bias. This means that merging LoRA weights won't be "
                "possible.",
                PeftWarning,
                stacklevel=4,
            )

    # Adding, deleting

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or make one of that name anew. It is trainable if it is active and not in inference mode.

        Raises `ValueError` for r < 1 and for options that this kind of layer does not have.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self._check_config(r, config)
        variant = resolve_variant(self, config)

        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        self.scaling[adapter_name] = self._initial_scaling(adapter_name)
        p = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(p) if p > 0.0 else nn.Identity()
        self._make_factors(adapter_name, r, config.lora_bias)
        initialise(self, adapter_name, config.init_lora_weights, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)

        self.lora_variant.pop(adapter_name, None)
        if variant is not None:
            self.lora_variant[adapter_name] = variant
            variant.init(self, adapter_name, config, **kwargs)

        # What set_adapter(active) would do, without walking over the adapters that it would not change.
        active = self._active_adapter = self.active_adapters
        self.set_requires_grad(active, not config.inference_mode)
        if adapter_name not in active:
            self.set_requires_grad(adapter_name, False)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Fill A and B anew by `init_lora_weights`: True, False or "gaussian"."""
        initialise(self, adapter_name, init_lora_weights)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others by name is activated."""
        super().delete_adapter(adapter_name)
        self.lora_variant.pop(adapter_name, None)

    def _has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self._modules["lora_A"]._modules  # type: ignore[union-attr]

    def _only_adapter(self) -> str | None:
        """The active adapter, if one plain LoRA adapter is what `forward` has to add to the base."""
        if self._disable_adapters or self.merged_adapters or self.lora_variant:
            return None
        active = self._active_adapter
        if type(active) is str:
            return active
        return active[0] if len(active) == 1 else None

    # Scale

    def _initial_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora.get(adapter, False) else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale to `scale` times the one it began with; nothing if the layer does not have it."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter in self.active_adapters:
            if scale != 1 and self._has_adapter(adapter):
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or set it to what it began with."""
        for adapter in self.active_adapters:
            if self._has_adapter(adapter):
                self.scaling[adapter] = (
                    self._initial_scaling(adapter) if scale is None else self.scaling[adapter] / scale
                )

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to the base weight.

        safe_merge: work on a copy, and raise `ValueError` with the base untouched if the sum is not finite.
        Raises `RuntimeError` if an adapter has a bias and the base layer has none.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if self._has_adapter(name):
                self._merge_one(name, safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def _merge_one(self, name: str, safe: bool) -> None:
        variant = self.lora_variant.get(name)
        if variant is None:
            pairs = self._merge_deltas(name)
            if not safe:
                for parameter, delta in pairs:
                    parameter.data += delta
                return
            new = [(parameter, parameter.data + delta.to(parameter.dtype)) for parameter, delta in pairs]
        else:
            weight = self.get_base_layer().weight
            new = [(weight, variant.merge(self, name, weight.data))]
        if safe and not all(value.isfinite().all() for _, value in new):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        for parameter, value in new:
            parameter.data = value

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, to within rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if not self._has_adapter(name):
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                for parameter, delta in self._merge_deltas(name):
                    parameter.data -= delta.to(parameter.dtype)
            else:
                weight = self.get_base_layer().weight
                weight.data = variant.unmerge(self, name, weight.data)

    def _merge_deltas(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(parameter of the base layer, what merging adds to it)."""
        base = self.get_base_layer()
        pairs = [(base.weight, self.get_delta_weight(name))]
        bias: Any = self.lora_B[name].bias if self.lora_bias.get(name) else None
        if bias is not None:
            if getattr(base, "bias", None) is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
            pairs.append((base.bias, bias * self.scaling[name]))
        return pairs

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a plain LoRA adapter can stand for this one."""
        variant = self.lora_variant.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()

    # Forward

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Raise `ValueError` if `adapter_names` does not fit the input or the layer's state."""
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        for name in set(names) & set(self.lora_variant):
            if not self.lora_variant[name].supports_mixed_batch:
                variant = self.lora_variant[name].name
                raise ValueError(f"Cannot pass `adapter_names` when {variant} is enabled. Adapter {name!r} uses it.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters'; `adapter_names`: one adapter a sample instead."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if self._has_adapter(name):
                result = self._add_adapter(name, x, result, **kwargs)
        return result.to(dtype)

    def _add_adapter(self, name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if name in self.lora_variant:
            return self.lora_variant[name].forward(self, name, x, result, **kwargs)
        product, scaling = self._adapter_product(name, x), self.scaling[name]
        if isinstance(scaling, Tensor):
            return result + product * scaling
        return torch.add(result, product, alpha=scaling)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each sample with its own adapter ("__base__": none), one adapter's samples after another's."""
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name == "__base__" or not self._has_adapter(name):
                continue
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            part = self._add_adapter(name, x[rows], result[rows], rows=rows, **kwargs)
            result = result.index_put((torch.tensor(rows, device=result.device),), part.to(result.dtype))
        return result

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


_DICTS = ("r", "lora_alpha", "scaling", "use_dora", "use_rslora", "lora_bias", "lora_variant")


def low_rank_product(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """scaling · B (N, r) · A (r, K); half types on the CPU, where their products are slow, through fp32."""
    if B.device.type == "cpu" and B.dtype in (torch.float16, torch.bfloat16):
        return ((B.float() @ A.float()) * scaling).to(B.dtype)
    return (B @ A) * scaling
