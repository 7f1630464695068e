"""BD-LoRA: LoRA whose A or B is block-diagonal, so that a server with sharded weights needs no exchange for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpeft.layers.lora import low_rank_product
from fastpeft.layers.variants import AdditiveVariant

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig
    from fastpeft.layers.lora import LoraLayer


class BlockDiagonalLinear(nn.Module):
    """y = x Dᵀ, D (out, in) zero outside of `nblocks` blocks on its diagonal.

    The weight is (out, in / nblocks): the blocks one below the other. It starts as zero or (He et al., 2015) uniform.

    Raises `ValueError` if a width is not divisible by the number of blocks.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int, init_zero: bool, like: Tensor) -> None:
        super().__init__()
        if in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"BD-LoRA: in_features={in_features} or out_features={out_features} is not divisible by "
                f"nblocks={nblocks}"
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        weight = torch.empty(out_features, in_features // nblocks, dtype=like.dtype, device=like.device)
        self.weight = nn.Parameter(weight.zero_() if init_zero else nn.init.kaiming_uniform_(weight))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        n = self.nblocks
        blocks = self.weight.view(n, self.out_features // n, self.in_features // n)
        y = torch.einsum("...bk,bnk->...bn", x.reshape(*x.shape[:-1], n, self.in_features // n), blocks)
        return y.reshape(*x.shape[:-1], self.out_features)

    def matrix(self) -> Tensor:
        """D (out, in)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))


class BlockDiagonal(AdditiveVariant):
    """Replaces A or B by a block-diagonal layer, by which of the config's name lists the layer's name is in."""

    name = "BD-LoRA"

    def init(self, layer: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Choose the factor by `target_name`, the layer's name in the model.

        Raises `ValueError` if the name is in both lists, or with `match_strict` in none.
        """
        options: Any = config.use_bdlora
        target = kwargs.get("target_name", "")
        in_a = any(pattern in target for pattern in options.target_modules_bd_a or [])
        in_b = any(pattern in target for pattern in options.target_modules_bd_b or [])
        if in_a and in_b:
            raise ValueError(f"Target {target} matches both A and B block-diagonal patterns")
        if options.match_strict and not (in_a or in_b):
            raise ValueError(
                f"Target {target} matches neither A nor B block-diagonal patterns. If this is intentional, set "
                "match_strict=False in BdLoraConfig."
            )
        r, weight, n = layer.r[adapter_name], layer.get_base_layer().weight, options.nblocks
        like = layer.lora_A[adapter_name].weight.new_empty(0, dtype=weight.dtype)  # type: ignore[operator, union-attr]
        if in_a:
            layer.lora_A[adapter_name] = BlockDiagonalLinear(layer.in_features, r, n, False, like)  # type: ignore[arg-type]
        elif in_b:
            layer.lora_B[adapter_name] = BlockDiagonalLinear(r, layer.out_features, n, True, like)  # type: ignore[arg-type]

    def delta(self, layer: LoraLayer, adapter_name: str) -> Tensor:
        """scaling · B A with the blocks in their places."""
        A, B = (
            factor.matrix() if isinstance(factor, BlockDiagonalLinear) else factor.weight
            for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        )
        delta = low_rank_product(A, B, layer.scaling[adapter_name])  # type: ignore[arg-type]
        return delta.T if layer.fan_in_fan_out else delta
