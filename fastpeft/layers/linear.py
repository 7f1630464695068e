"""LoRA on `nn.Linear`, and on Transformers' `Conv1D`, which is a linear layer that stores its weight transposed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.configs import LoraConfig
from fastpeft.layers.activated import Activated
from fastpeft.layers.block_diagonal import BlockDiagonal
from fastpeft.layers.dora import DoraLinear
from fastpeft.layers.init import make_linear
from fastpeft.layers.kasa import Kasa
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.mixed import mixed_linear
from fastpeft.layers.plain import any_global_hook, bare, dropout_probability
from fastpeft.layers.variants import LoraVariant
from fastpeft.layers.velora import Velora
from fastpeft.ops.dora_linear import dora_linear
from fastpeft.ops.lora_linear import lora_linear
from fastpeft.ops.products import MAX_RANK


class Linear(LoraLayer, nn.Module):
    """y = x Wᵀ + bias + sum over active adapters of scaling · dropout(x) Aᵀ Bᵀ."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Linear"
    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {
        "alora_invocation_tokens": Activated,
        "use_dora": DoraLinear,
        "use_bdlora": BlockDiagonal,
        "velora_config": Velora,
        "kasa_config": Kasa,
    }

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
        if not args and not kwargs:
            operands = self._operands(x)
            if operands is not None:
                weight, bias, A, B, scaling, p, magnitude = operands
                if magnitude is None:
                    return lora_linear(x, weight, bias, A, B, scaling, p)
                name = self.active_adapters[0]
                variant: Any = self.lora_variant[name]
                return dora_linear(x, weight, bias, A, B, magnitude, scaling, p, norm=variant.known_norm(self, name))
        return super().forward(x, *args, **kwargs)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, float, Tensor | None] | None:
        """The operands of `lora_linear` after x, and the magnitude for `dora_linear`, if one LoRA or DoRA adapter on a
        plain layer is all there is to compute.

        This is the whole cost of Python on a small input, so everything is read from where nn.Module keeps it; and
        nothing is remembered that could go stale. FSDP keeps parameters elsewhere, and goes the general way.
        """
        own = self.__dict__
        active = own["_active_adapter"]
        name = active[0] if type(active) is list and len(active) == 1 else active
        if own["_disable_adapters"] or own["merged_adapters"] or type(name) is not str:
            return None
        variant = own["lora_variant"].get(name)
        modules = own["_modules"]
        A, base = modules["lora_A"]._modules.get(name), modules["base_layer"]
        if A is None or type(base) not in _PLAIN or any_global_hook():
            return None
        magnitude = None
        if variant is not None:
            if type(variant) is not DoraLinear:
                return None
            magnitude = modules["lora_magnitude_vector"]._modules[name]._parameters.get("weight")
            if magnitude is None:
                return None
        B, scaling = modules["lora_B"]._modules[name], own["scaling"][name]
        dropout = modules["lora_dropout"]._modules[name]
        p = 0.0 if type(dropout) is nn.Identity else dropout_probability(dropout)
        if not (type(A) is type(B) is nn.Linear and bare(base, A, B)) or p >= 1.0 or type(scaling) not in _NUMBERS:
            return None
        of_base, of_B = base._parameters, B._parameters
        weight, lora_A, lora_B = of_base.get("weight"), A._parameters.get("weight"), of_B.get("weight")
        if weight is None or lora_A is None or lora_B is None or of_B["bias"] is not None or own["r"][name] > MAX_RANK:
            return None
        if not own["cast_input_dtype_enabled"] and x.dtype != lora_A.dtype:
            return None
        if type(base) not in _ROWS_ARE_OUTPUTS:
            weight = weight.t()
        return weight, of_base["bias"], lora_A, lora_B, scaling, p, magnitude

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result = None
        if not kwargs and not self.lora_variant:
            result = mixed_linear(self, x, adapter_names)
        if result is None:
            result = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return result


_ROWS_ARE_OUTPUTS = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN: set[type] = set(_ROWS_ARE_OUTPUTS)  # forward is x Wᵀ + bias and nothing else; Conv1D joins when it is first met
_NUMBERS = (float, int)


def _is_transformers_conv1d(cls: type) -> bool:
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
