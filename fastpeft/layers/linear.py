"""LoRA on `nn.Linear`, and on Transformers' `Conv1D`, which is a linear layer that stores its weight transposed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.configs import LoraConfig
from fastpeft.layers.dora import DoraLinear
from fastpeft.layers.init import make_linear
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.mixed import mixed_linear
from fastpeft.layers.plain import any_global_hook, bare, dropout_probability
from fastpeft.layers.variants import LoraVariant
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.products import MAX_RANK


class Linear(LoraLayer, nn.Module):
    """y = x Wᵀ + bias + sum over active adapters of scaling · dropout(x) Aᵀ Bᵀ."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Linear"
    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {"use_dora": DoraLinear}

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        if is_target_conv_1d_layer and _is_transformers_conv1d(type(base_layer)):
            _PLAIN.add(type(base_layer))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = make_linear(self.in_features, r, False)
        self.lora_B[adapter_name] = make_linear(r, self.out_features, lora_bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling · B A, (N, K), transposed if the base weight is (in, out)."""
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        delta = low_rank_product(A.weight, B.weight, self.scaling[adapter])
        return delta.T if self.fan_in_fan_out else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters'; `adapter_names`: one adapter a sample instead."""
        # One plain adapter on a plain layer is one operator call. This is the whole cost of Python on a small input, so
        # everything is read from where nn.Module keeps it; and nothing is remembered that could go stale.
        name = None if args or kwargs else self._only_adapter()
        if name is not None:
            modules: dict[str, Any] = self._modules  # type: ignore[assignment]
            A: Any = modules["lora_A"]._modules.get(name)
            base = modules["base_layer"]
            if A is not None and type(base) in _PLAIN and bare(base) and not any_global_hook():
                B = modules["lora_B"]._modules[name]
                dropout = modules["lora_dropout"]._modules[name]
                scaling, p = self.scaling[name], dropout_probability(dropout)
                if type(A) is type(B) is nn.Linear and type(scaling) in _NUMBERS and bare(A) and bare(B) and p < 1.0:
                    own: Any = base._parameters
                    weight = own.get("weight")
                    if weight is not None and B._parameters["bias"] is None and self.r[name] <= MAX_RANK:
                        a: Any = A._parameters["weight"]
                        b: Any = B._parameters["weight"]
                        if self.cast_input_dtype_enabled or x.dtype == a.dtype:
                            if type(base) is not nn.Linear and self.is_target_conv_1d_layer:
                                weight = weight.t()
                            return lora_linear(x, weight, own["bias"], a, b, scaling, p)
        return super().forward(x, *args, **kwargs)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result = None
        if not kwargs and not self.lora_variant:
            result = mixed_linear(self, x, adapter_names)
        if result is None:
            result = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return result


_PLAIN: set[type] = {nn.Linear, NonDynamicallyQuantizableLinear}  # forward is x Wᵀ + bias and nothing else
_NUMBERS = (float, int)


def _is_transformers_conv1d(cls: type) -> bool:
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
