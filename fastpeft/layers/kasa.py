"""KaSA (arXiv:2412.06071): LoRA with a trained diagonal between the factors, on a base weight without its least part.

    y = x (W⁻ + c B diag(d) A)ᵀ + bias

W⁻ is W without its r least singular triples, whose place the adapter learns anew. It replaces W for good: an adapter of
this kind belongs to its changed base, and every adapter of a layer has to be of this kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.lora import low_rank_product
from fastpeft.layers.variants import AdditiveVariant

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig


class Kasa(AdditiveVariant):
    """LoRA with `lora_diag`; takes the r least singular triples out of the base weight when it is made.

    An adapter made on the meta device, to be loaded into, does that when the base weight is first used.
    """

    name = "KaSA"
    pending = False  # the base weight still has its least triples

    def init(self, layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Make d, normal, and reduce the base weight.

        Raises `ValueError` for Conv1D, and if r is not less than the rank that the weight can have.
        """
        if layer.fan_in_fan_out:
            raise ValueError(
                "KaSA does not support `fan_in_fan_out=True` layers (e.g. Conv1D). Please target nn.Linear layers."
            )
        A: Any = layer.lora_A[adapter_name].weight
        _check_rank(layer, layer.r[adapter_name])
        if "lora_diag" not in layer.adapter_layer_names:
            layer.lora_diag = nn.ParameterDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_diag")
        draw = torch.empty if A.is_meta else torch.randn
        layer.lora_diag[adapter_name] = nn.Parameter(draw(A.shape[0], device=A.device, dtype=A.dtype))
        self.pending = A.is_meta
        if not self.pending:
            _reduce_base(layer, layer.r[adapter_name])

    def forward(self, layer: Any, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scaling · B (d ∘ A dropout(x))."""
        A: Any = layer.lora_A[adapter_name]
        x = layer._cast_input_dtype(x, A.weight.dtype)
        if self.pending:  # `result` is that of the whole weight
            outer, inner = self._catch_up(layer, adapter_name)
            result = result - F.linear(F.linear(x.to(inner.dtype), inner), outer).to(result.dtype)
        s = A(layer.lora_dropout[adapter_name](x)) * layer.lora_diag[adapter_name]
        return result + layer.lora_B[adapter_name](s) * layer.scaling[adapter_name]

    def merge(self, layer: Any, adapter_name: str, weight: Tensor) -> Tensor:
        """W⁻ + scaling · B diag(d) A, a new tensor."""
        if self.pending:
            self._catch_up(layer, adapter_name)
            weight = layer.get_base_layer().weight.data
        return super().merge(layer, adapter_name, weight)

    def delta(self, layer: Any, adapter_name: str) -> Tensor:
        """scaling · B diag(d) A."""
        A: Any = layer.lora_A[adapter_name].weight
        B: Any = layer.lora_B[adapter_name].weight
        return low_rank_product(A * layer.lora_diag[adapter_name].unsqueeze(1), B, layer.scaling[adapter_name])

    def supports_lora_conversion(self) -> bool:
        """No: the base weight is another one."""
        return False

    def _catch_up(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
        weight = layer.get_base_layer().weight
        if weight.is_meta:
            raise RuntimeError(
                "KaSA could not reduce the base weight because it is still on the meta device. Materialize the base "
                "model weights before running a forward pass or merging."
            )
        d = layer.lora_diag[adapter_name]
        if d.is_meta:
            fresh = torch.randn(d.shape[0], device=weight.device, dtype=weight.dtype)
            layer.lora_diag[adapter_name] = nn.Parameter(fresh, requires_grad=d.requires_grad)
        self.pending = False
        return _reduce_base(layer, layer.r[adapter_name])


def regularisation(layer: Any, adapter_name: str, beta: float, gamma: float) -> Tensor:
    """beta · |d|² + gamma · (|Bᵀ B - 1| + |A Aᵀ - 1|), Frobenius norms, in fp32: to be added to the loss."""
    d: Any = layer.lora_diag[adapter_name]
    A, B = (getattr(layer, name)[adapter_name].weight.float() for name in ("lora_A", "lora_B"))
    eye = torch.eye(d.shape[0], device=d.device)
    orthogonality = torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye)
    return beta * d.float().square().sum() + gamma * orthogonality


def _check_rank(layer: Any, r: int) -> None:
    shape = layer.get_base_layer().weight.shape
    if r >= min(shape):
        raise ValueError(
            f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({min(shape)}) so that at "
            "least one singular component of the base weight is preserved after truncation."
        )


@torch.no_grad()
def _reduce_base(layer: Any, r: int) -> tuple[Tensor, Tensor]:
    """Take the r least singular triples out of the base weight; what was taken, as (N, r) and (r, K) in fp32."""
    base = layer.get_base_layer()
    U, S, Vh = torch.linalg.svd(base.weight.float(), full_matrices=False)
    base.weight.data = ((U[:, :-r] * S[:-r]) @ Vh[:-r]).to(base.weight.dtype)
    return U[:, -r:] * S[-r:], Vh[-r:]
