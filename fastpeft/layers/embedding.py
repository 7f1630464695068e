"""LoRA on `nn.Embedding`: the token's column of A, times B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.layers.base import embed_scale
from fastpeft.layers.dora import DoraEmbedding
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.plain import any_global_hook, bare
from fastpeft.layers.variants import LoraVariant
from fastpeft.ops.lora_embedding import lora_embedding
from fastpeft.ops.products import MAX_RANK


class Embedding(LoraLayer, nn.Module):
    """y = W[i] + sum over active adapters of scaling · A[:, i]ᵀ Bᵀ, with A (r, V) and B (D, r).

    Where the base layer multiplies its output (Gemma's `embed_scale`), the adapter's is multiplied too. There is no
    dropout: an index has nothing to drop.
    """

    _peft_name: ClassVar[str] = "peft.tuners.lora.layer.Embedding"
    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {"use_dora": DoraEmbedding}

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn(self.out_features, r))

    def _reset_factors(self, adapter_name: str, fill: Callable[[Tensor], Any]) -> None:
        # An embedding starts with A zero and B normal, whatever the method: A is what every token has of its own.
        self.lora_embedding_A[adapter_name].data.zero_()
        self.lora_embedding_B[adapter_name].data.normal_()

    def _has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_embedding_A

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling · (B A)ᵀ, (V, D)."""
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        return low_rank_product(A, B, self.scaling[adapter]).T

    def _merge_deltas(self, name: str) -> list[tuple[Tensor, Tensor]]:
        weight = self.get_base_layer().weight
        return [(weight, self.get_delta_weight(name).to(weight.dtype))]

    def _adapter_product(self, adapter_name: str, x: Tensor, **kwargs: Any) -> Tensor:
        A, B = self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]
        product = self._embed(x, A.T) @ B.T
        scale = embed_scale(self.get_base_layer())
        return product if scale is None else product * scale.to(product.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters'; `adapter_names`: one adapter a sample instead."""
        name = None if args or kwargs else self._only_adapter()
        base: Any = self._modules["base_layer"]
        if name is not None and name in self.lora_embedding_A and _is_lookup(base):
            A, B, scaling = self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]
            if type(scaling) in (float, int) and self.r[name] <= MAX_RANK:
                return lora_embedding(x, base.weight, A, B, scaling, base.padding_idx)
        return super().forward(x, *args, **kwargs)

    def _embed(self, indices: Tensor, weight: Tensor) -> Tensor:
        """F.embedding with the base layer's options."""
        base = self.get_base_layer()
        return F.embedding(
            indices,
            weight,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )


def _is_lookup(base: Any) -> bool:
    """Whether the base layer takes rows of its weight and does nothing else."""
    if type(base) is not nn.Embedding or base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return False
    return bare(base) and not any_global_hook()
