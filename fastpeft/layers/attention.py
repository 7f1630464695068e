"""LoRA on `nn.MultiheadAttention`: its stacked q/k/v projection and its output projection."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import PeftWarning
from fastpeft.layers.init import make_linear
from fastpeft.layers.linear import Linear
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.swap import swapped
from fastpeft.layers.variants import resolve_variant


class MultiheadAttention(LoraLayer, nn.Module):
    """W_in + scaling · B A in place of W_in (3E, E), and the same for the output projection, a `Linear` inside.

    PyTorch's attention reads these weights instead of calling layers, so the adapted weights are lent to it for the
    call. That leaves no input to drop from: `lora_dropout` has no effect. Only q, k and v of one width are supported.

    PEFT 0.21 adds the output projection's delta twice, once by itself and once by merging the `Linear` inside, with the
    gradient of one. Adapters are trained with that, so it is the same here.
    """

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.MultiheadAttention"

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        if not getattr(base_layer, "_qkv_same_embed_dim", True):
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {type(self).__name__}.")
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {type(self).__name__}.")
        if config.use_dora:
            raise ValueError(f"{type(self).__name__} does not support DoRA (yet), please set use_dora to False")
        if config.velora_config is not None:
            raise ValueError(f"{type(self).__name__} does not support VeLoRA, please set `velora_config=None`.")
        if config.kasa_config is not None:
            raise ValueError(f"{type(self).__name__} does not support KaSA, please set `kasa_config=None`.")
        resolve_variant(self, config)  # raises before anything changes
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        # PEFT makes the inner layer's factors twice, here and in update_layer; the random numbers must be the same.
        base_layer.out_proj = Linear(
            base_layer.out_proj, adapter_name, r=r, lora_alpha=lora_alpha, config=config, **kwargs
        )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout} has no effect on {type(self).__name__}: PyTorch's attention takes "
                "weights, and an adapter that is part of the weight has no input of its own to drop from.",
                PeftWarning,
                stacklevel=4,
            )

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = make_linear(self.in_features, r, False)
        self.lora_B[adapter_name] = make_linear(r, self.out_features, lora_bias)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to both projections; see `LoraLayer.update_layer`."""
        super().update_layer(*args, **kwargs)
        self._inner.update_layer(*args, **kwargs)

    @property
    def _inner(self) -> Linear:
        """The adapter layer around the output projection."""
        return self.get_base_layer()._modules["out_proj"]

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        return super()._get_base_layer_device_and_dtype(self._inner.get_base_layer())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling · B A for q, k and v, (3E, E)."""
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return low_rank_product(A.weight, B.weight, self.scaling[adapter])

    # Merging

    def _merge_deltas(self, name: str) -> list[tuple[Tensor, Tensor]]:
        base, out = self.get_base_layer(), self._inner.get_base_layer()
        again = self._inner.get_delta_weight(name).detach()
        pairs = [(base.in_proj_weight, self.get_delta_weight(name)), (out.weight, again)]
        bias: Any = self.lora_B[name].bias
        if bias is not None and base.in_proj_bias is not None:
            pairs.append((base.in_proj_bias, bias * self.scaling[name]))
        return [(parameter, delta.to(out.weight.dtype)) for parameter, delta in pairs]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to both projections' weights; see `LoraLayer.merge`."""
        before = set(self.merged_adapters)
        super().merge(safe_merge, adapter_names)
        added = [name for name in self.merged_adapters if name not in before]
        if added:
            self._inner.merge(safe_merge, added)

    def unmerge(self) -> None:
        """Take all merged adapters out of both projections' weights again, to within rounding."""
        super().unmerge()
        if self._inner.merged:
            self._inner.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain attention module, with the adapters in its weights if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        base.out_proj = self._inner.get_base_layer()
        return base

    # Forward

    def _live_adapters(self) -> list[str]:
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if self._has_adapter(name)]

    def _adapted(self) -> list[tuple[nn.Module, str, Tensor]]:
        """(module, parameter name, value with the active adapters) of what the adapters change; empty without any."""
        base, inner = self.get_base_layer(), self._inner
        out = inner.get_base_layer()
        sums: dict[int, Tensor] = {}
        for name in self._live_adapters():
            for parameter, delta in (*self._merge_deltas(name), *inner._merge_deltas(name)):
                sums[id(parameter)] = sums.get(id(parameter), parameter) + delta.to(parameter.dtype)
        slots = ((base, "in_proj_weight"), (base, "in_proj_bias"), (out, "weight"), (out, "bias"))
        return [(m, n, sums[id(getattr(m, n))]) for m, n in slots if id(getattr(m, n)) in sums]

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """As `nn.MultiheadAttention.forward`, with the active adapters; outputs in the query's dtype."""
        self._check_forward_args(query, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._live_adapters() and self._inner.active_adapters != self.active_adapters:
            raise ValueError(
                f"The out_proj layer of {type(self.get_base_layer()).__name__} has other active adapters "
                f"({self._inner.active_adapters}) than the module itself ({self.active_adapters}); set the adapters of "
                "both with set_adapter of the model."
            )
        with swapped(*self._adapted()):
            output, weights = self.base_layer(query, *args, **kwargs)
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)

    # What others read from an attention module is the base's, but for the weights: in inference
    # nn.TransformerEncoderLayer takes them into a fused operator of its own, without calling the module.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    @property
    def in_proj_weight(self) -> Tensor:
        """The q/k/v weight that the next forward uses."""
        return self._value("in_proj_weight")

    @property
    def in_proj_bias(self) -> Tensor:
        """The q/k/v bias that the next forward uses."""
        return self._value("in_proj_bias")

    def _value(self, wanted: str) -> Tensor:
        for _, name, value in self._adapted():
            if name == wanted:
                return value
        return getattr(self.get_base_layer(), wanted)

    @property
    def out_proj(self) -> nn.Module:
        """The output projection that the next forward uses, a plain `nn.Linear`."""
        out = self._inner.get_base_layer()
        values = {name: value for module, name, value in self._adapted() if module is out}
        if not values:
            return out
        adapted = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(adapted)
        adapted.in_features, adapted.out_features = out.in_features, out.out_features
        lent: dict[str, Any] = {**out._parameters, **values}
        adapted._parameters.update(lent)
        return adapted
