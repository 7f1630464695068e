"""LoRA on a parameter that is no layer's weight, such as the stacked weights of a mixture's experts."""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.layers.init import make_linear
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.swap import swapped
from fastpeft.layers.weight_sum import WeightSum
from fastpeft.ops.backend import exact


class ParamWrapper(LoraLayer, nn.Module):
    """W + scaling · B A in place of a module's parameter W, lent to the module for the length of its call.

    W of two dimensions is (N, K). Of three, it is a stack over experts, (E, N, K), or (E, K, N) if the module says
    `is_transposed`. A is (r·E, K) with expert e in rows e·r … e·r + r, and B is (N, r·E) with expert e in columns e,
    e + E, …: PEFT's layout. Several parameters of one module are adapted by wrappers around wrappers.
    Read directly, outside the module's forward, the parameter is the base's. The module's products with it are made of
    x W and (x A) B where they can be: see `weight_sum`.
    """

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.ParamWrapper"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        if is_target_conv_1d_layer:
            raise ValueError(f"lora.{type(self).__name__} does not work with is_target_conv_1d_layer=True.")
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def get_param(self) -> Any:
        """The base parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        parameter = self.get_param()
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed ZeRO-3 leaves the parameter itself empty
        if len(shape) not in (2, 3):
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter, but only 2d and "
                "3d are supported."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self._transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))  # (…, K, N)
        n, k = (shape[-1], shape[-2]) if self._transposed else (shape[-2], shape[-1])
        return k, n

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = self.get_param()
        return parameter.device, parameter.dtype

    def _check_config(self, r: int, config: LoraConfig) -> None:
        name = f"lora.{type(self).__name__}"
        if config.lora_dropout:
            # An adapter that is part of the weight has no input of its own to drop from.
            raise ValueError(f"{name} does not work with lora_dropout != 0.")
        if config.fan_in_fan_out:
            raise ValueError(f"{name} does not work with fan_in_fan_out.")
        if config.lora_bias:
            raise ValueError(f"{name} does not work with lora_bias=True.")
        if config.use_dora:
            raise ValueError(f"{name} does not work with use_dora=True.")
        for option in ("velora_config", "kasa_config"):
            if getattr(config, option) is not None:
                raise ValueError(f"{name} does not work when `{option}` is set.")

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        ranks = r * self.num_experts
        self.lora_A[adapter_name] = make_linear(self.in_features, ranks, False)
        self.lora_B[adapter_name] = make_linear(ranks, self.out_features, False)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """(left, right, scaling): the delta is scaling · left @ right, a stack over experts; in the base's dtype."""
        A: Any = self.lora_A[adapter_name].weight
        B: Any = self.lora_B[adapter_name].weight
        A = A.reshape(self.num_experts, -1, A.shape[-1])  # (E, r, K)
        B = B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (E, N, r)
        left, right = (A.mT, B.mT) if self._transposed else (B, A)
        dtype = self.get_param().dtype
        return left.to(dtype), right.to(dtype), self.scaling[adapter_name]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the parameter, in its shape and (of half and single precision) its dtype."""
        A: Any = self.lora_A[adapter].weight
        B: Any = self.lora_B[adapter].weight
        if self.num_experts == 1:
            delta = low_rank_product(A, B, self.scaling[adapter])
            delta = delta.T if self._transposed else delta
            delta = delta.view(self.get_param().shape)
        else:
            A = A.reshape(self.num_experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, self.num_experts)
            form = "ore,eri->eio" if self._transposed else "ore,eri->eoi"
            delta = torch.einsum(form, B, A) * self.scaling[adapter]
        parameter = self.get_param()
        return delta.to(parameter.device, None if _is_narrow(parameter) else parameter.dtype)

    def _merge_deltas(self, name: str) -> list[tuple[Tensor, Tensor]]:
        return [(self.get_param(), self.get_delta_weight(name))]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module, with the adapters of this and of the wrappers inside in its parameters if `merge`."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer if merge else self.get_base_layer()

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with the active adapters in its parameter."""
        self._check_forward_args(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return self.base_layer(*args, **kwargs)
        names = [name for name in self.active_adapters if self._has_adapter(name)]
        if not names:
            return self.base_layer(*args, **kwargs)
        with swapped((self.get_base_layer(), self.parameter_name, self._adapted(names))):
            return self.base_layer(*args, **kwargs)

    def _adapted(self, names: list[str]) -> Tensor:
        """The parameter with the adapters in it; with one, a sum that is made only if something else than products is
        asked of it."""
        parameter = self.get_param()
        if len(names) == 1 and not _is_narrow(parameter):
            lent = WeightSum.lent_by(self, names[0])
            if lent is not None:
                return lent
        if len(names) == 1 and self.num_experts > 1 and not _is_narrow(parameter):
            # One product that ends in the sum: no delta as large as the experts. Not under autocast, which would change
            # the parameter's dtype.
            left, right, scaling = self.get_delta_factors(names[0])
            with exact(parameter.device):
                return torch.baddbmm(parameter, left, right, alpha=scaling)
        delta = functools.reduce(operator.add, map(self.get_delta_weight, names))
        if not _is_narrow(parameter):
            return parameter + delta
        # Eight-bit floats have no sum; and their conversion overflows to NaN instead of stopping at the largest value.
        limits = torch.finfo(parameter.dtype)
        return (parameter.to(delta.dtype) + delta).clamp(limits.min, limits.max).to(parameter.dtype)

    def __repr__(self) -> str:
        head, _, tail = super().__repr__().partition("(")
        return f"{head}(\n  parameter_name='{self.parameter_name}',{tail}"


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1
