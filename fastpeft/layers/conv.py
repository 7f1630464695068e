"""LoRA on convolutions: A is a convolution like the base's with r output channels, B a 1 × 1 convolution."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.layers.dora import DoraConv
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.variants import LoraVariant


class _ConvNd(LoraLayer, nn.Module):
    """y = conv(x) + sum over active adapters of scaling · B(A(dropout(x))).

    A has the base's kernel size, stride, padding and dilation, over all input channels; B has the base's groups. As in
    PEFT, A pads with zeros whatever the base's padding mode.
    """

    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {"use_dora": DoraConv}
    _conv: ClassVar[type[nn.Module]]  # the PyTorch layer adapted
    _dim: ClassVar[int]  # the dimensions of its kernel

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        base = self.get_base_layer()
        if base.weight.dim() != self._dim:
            raise ValueError(
                f"{type(self).__name__} layer kernel must have {self._dim} dimensions, not {base.weight.dim()}"
            )
        if base.groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=3)
        self._kernel_dim = self._dim
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        base = self.get_base_layer()
        if r % base.groups != 0:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                "not target this specific layer."
            )
        if config.velora_config is not None:
            raise ValueError("VeLoRA does not support adapting conv layers.")
        super()._check_config(r, config)

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        base, conv = self.get_base_layer(), self._conv
        self.lora_A[adapter_name] = conv(
            self.in_features, r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.lora_B[adapter_name] = conv(r, self.out_features, 1, groups=base.groups, bias=lora_bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling · sum over r of B[o, r] A[r, i, …], in the shape of the kernel.

        Raises `NotImplementedError` with groups: A sees all input channels, so the sum is no grouped kernel.
        """
        base = self.get_base_layer()
        if base.groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        delta = low_rank_product(A.weight.flatten(1), B.weight.flatten(1), self.scaling[adapter])
        return delta.view(base.weight.shape)


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Conv1d"
    _conv, _dim = nn.Conv1d, 3


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Conv2d"
    _conv, _dim = nn.Conv2d, 4


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Conv3d"
    _conv, _dim = nn.Conv3d, 5
