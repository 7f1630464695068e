"""DoRA (arXiv:2402.09353): the rows of W + c B A keep their direction, and a trained magnitude m is their length.

    y = x (g ∘ (W + c B A))ᵀ + bias,    g = m / |W + c B A| by row, the norm taken as a constant in the gradient

m starts as the norms of W, so that the adapter starts as nothing. With t the output a LoRA layer would give,

    y = t + (g - 1) ∘ (t - bias),       g - 1 = (m - norm) / norm in fp32

so DoRA costs LoRA, the norms (`ops.weight_norm`) and one pass over the output. With dropout the adapter *and* the base
weight see dropout(x), as in PEFT: then t - bias is dropout(x) (W + c B A)ᵀ, a second product with W.

A linear layer with one active adapter is `ops.dora_linear`. The rest (embeddings, convolutions, several adapters at
once, hooks inside the layer) is here, in ordinary operators.

A row is what makes one output: a row of a linear weight, an output channel of a convolution, a column (one feature of
all tokens) of an embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.variants import LoraVariant
from fastpeft.ops import weight_norm as norms

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig
    from fastpeft.layers.lora import LoraLayer


class Magnitude(nn.Module):
    """One adapter's m, as `lora_magnitude_vector.<adapter>.weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.merged_gain: Tensor | None
        self.register_buffer("merged_gain", None, persistent=False)  # the g merged into the base, to take it out again
        self.known_norm: tuple[int, Tensor] | None = None  # within DoraCaching: its number, and the norm

    def train(self, mode: bool = True) -> Magnitude:
        """Training forgets the norm that was kept for inference."""
        self.known_norm = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class DoraCaching:
    """Keep the norms of DoRA layers in evaluation: generating a token then reads each weight once, not twice.

    Whoever changes weights meanwhile gets the old norms, as in PEFT, so it is off unless asked for. As a context
    manager, or called to switch it on and off for good: `DoraCaching()(enabled=True)`. A layer in training mode keeps
    nothing.
    """

    _switched = 0  # odd while it is on; a norm is good for the number it was kept under

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self._before = DoraCaching._switched % 2 == 1
        self(self.enabled)

    def __exit__(self, *error: object) -> None:
        self(self._before)

    def __call__(self, enabled: bool = True) -> None:
        """Switch it on or off."""
        if enabled != (DoraCaching._switched % 2 == 1):
            DoraCaching._switched += 1

    @staticmethod
    def on(layer: nn.Module) -> bool:
        """The norms of this layer are to be kept now."""
        return DoraCaching._switched % 2 == 1 and not layer.training


class DoraLinear(LoraVariant):
    """DoRA on linear layers, and what all kinds share."""

    name = "DoRA"
    supports_mixed_batch = False

    def init(self, layer: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Make m: the norms of the rows as they are now."""
        weight, factor = layer.base_weight(), self._factors(layer, adapter_name)[0]
        if weight.is_meta or factor.is_meta:
            norm = torch.empty(self._rows(layer, weight).shape[0], device="meta")
        else:
            norm = self._norm(layer, adapter_name, weight)
        dtype = torch.promote_types(weight.dtype, factor.dtype)
        layer.lora_magnitude_vector[adapter_name] = Magnitude(norm.to(dtype).view(self._magnitude_shape(layer)))

    def forward(self, layer: LoraLayer, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's whole output."""
        gain = self._gain(layer, adapter_name)
        scaling = layer.scaling[adapter_name]
        dropped = self._dropped(layer, adapter_name, x)
        if dropped is None:
            output = _add(result, self._product(layer, adapter_name, x), scaling)
            bias = getattr(layer.get_base_layer(), "bias", None)
            scaled = output if bias is None else output - self._along(layer, bias)
        else:
            product = self._product(layer, adapter_name, dropped)
            output = _add(result, product, scaling)
            scaled = _add(self._base_product(layer, dropped), product, scaling)
        return torch.addcmul(output, scaled, self._along(layer, gain))

    @torch.no_grad()
    def merge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """g ∘ (weight + c B A), a new tensor. g is that of the base weight without any adapter, as in `forward`."""
        norm = self._norm(layer, adapter_name, _without_adapters(layer, weight))
        magnitude: Any = layer.lora_magnitude_vector[adapter_name]
        gain = magnitude.weight.flatten().to(norm.dtype) / self._rounded(layer, adapter_name, norm)
        magnitude.merged_gain = gain
        whole = weight.to(gain.dtype) + layer.get_delta_weight(adapter_name)
        return whole.mul_(self._across(layer, gain)).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """weight / g - c B A, a new tensor, for the g that was merged."""
        gain: Any = layer.lora_magnitude_vector[adapter_name].merged_gain
        whole = weight.to(gain.dtype) / self._across(layer, gain)
        return whole.sub_(layer.get_delta_weight(adapter_name)).to(weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """No: it scales the weight, and adds nothing of low rank to it."""
        return False

    def known_norm(self, layer: LoraLayer, adapter_name: str) -> Tensor | None:
        """The norm where `DoraCaching` keeps it, made if it is not there yet; None where it must be made anew."""
        number = DoraCaching._switched
        if number % 2 == 0 or layer.training:  # type: ignore[attr-defined]
            return None
        magnitude: Any = layer.lora_magnitude_vector[adapter_name]
        if magnitude.known_norm is None or magnitude.known_norm[0] != number:
            norm = self._norm(layer, adapter_name, layer.norm_weight())
            magnitude.known_norm = (number, norm)
        return magnitude.known_norm[1]

    def _gain(self, layer: LoraLayer, adapter_name: str) -> Tensor:
        """g - 1, (N,), differentiable in m."""
        magnitude: Any = layer.lora_magnitude_vector[adapter_name].weight
        norm = self.known_norm(layer, adapter_name)
        if norm is None:
            norm = self._norm(layer, adapter_name, layer.norm_weight())
        norm = self._rounded(layer, adapter_name, norm)
        return (magnitude.flatten().to(norm.dtype) - norm) / norm

    def _norm(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        """|weight + c B A| by row, (N,), detached."""
        A, B = self._factors(layer, adapter_name)
        return norms.weight_norm(self._rows(layer, weight), A, B, layer.scaling[adapter_name])

    def _rounded(self, layer: LoraLayer, adapter_name: str, norm: Tensor) -> Tensor:
        """The norm as exact as m is, so that m at its start gives g = 1 to the bit. A row of zeros divides by no 0."""
        magnitude: Any = layer.lora_magnitude_vector[adapter_name].weight
        return norm.to(magnitude.dtype).to(norm.dtype).clamp_min(torch.finfo(norm.dtype).tiny)

    # What a kind of layer says about itself

    def _rows(self, layer: LoraLayer, weight: Tensor) -> Tensor:
        """A base weight as (N, K)."""
        return weight.T if layer.fan_in_fan_out else weight

    def _factors(self, layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r)."""
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight  # type: ignore[return-value]

    def _magnitude_shape(self, layer: LoraLayer) -> tuple[int, ...]:
        """The shape that m has in files."""
        return (-1,)

    def _along(self, layer: LoraLayer, vector: Tensor) -> Tensor:
        """A vector (N,), shaped to multiply an output."""
        return vector

    def _across(self, layer: LoraLayer, vector: Tensor) -> Tensor:
        """A vector (N,), shaped to multiply a base weight."""
        return vector if layer.fan_in_fan_out else vector.unsqueeze(1)

    def _dropped(self, layer: LoraLayer, adapter_name: str, x: Tensor) -> Tensor | None:
        """dropout(x) in the adapter's dtype; None where there is no dropout now."""
        dropout: Any = layer.lora_dropout[adapter_name]
        if isinstance(dropout, nn.Identity) or not layer.training:  # type: ignore[attr-defined]
            return None
        return dropout(layer._cast_input_dtype(x, self._factors(layer, adapter_name)[0].dtype))

    def _product(self, layer: LoraLayer, adapter_name: str, x: Tensor) -> Tensor:
        """x Aᵀ Bᵀ, for an x that has had its dropout."""
        A: Any = layer.lora_A[adapter_name]
        return layer.lora_B[adapter_name](A(layer._cast_input_dtype(x, A.weight.dtype)))

    def _base_product(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """x Wᵀ, without bias."""
        return F.linear(x, self._rows(layer, layer.base_weight()).to(x.dtype))


class DoraEmbedding(DoraLinear):
    """DoRA on embeddings: there is no dropout, and no bias."""

    def _rows(self, layer: LoraLayer, weight: Tensor) -> Tensor:
        return weight.T

    def _factors(self, layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]

    def _across(self, layer: LoraLayer, vector: Tensor) -> Tensor:
        return vector

    def _dropped(self, layer: LoraLayer, adapter_name: str, x: Tensor) -> Tensor | None:
        return None

    def _product(self, layer: LoraLayer, adapter_name: str, x: Tensor) -> Tensor:
        return layer._adapter_product(adapter_name, x)


class DoraConv(DoraLinear):
    """DoRA on convolutions; m is (1, N, 1, …)."""

    def _norm(self, layer: LoraLayer, adapter_name: str, weight: Tensor) -> Tensor:
        base = layer.get_base_layer()
        if base.groups == 1:
            return super()._norm(layer, adapter_name, weight)
        # A sees all input channels, so that B A has no shape that fits a grouped kernel. PEFT adds its elements in the
        # order they lie in; the norms, and so the adapters trained with them, are of that sum. A row of B A, cut into
        # as many pieces as there are groups, thus goes to as many rows of the kernel: each has its piece of A.
        A, B = (getattr(layer, name)[adapter_name].weight.detach() for name in ("lora_A", "lora_B"))
        rows, B, scaling = weight.detach().flatten(1), B.reshape(-1, A.shape[0]), layer.scaling[adapter_name]
        pieces = A.flatten(1).split(rows.shape[1], dim=1)
        each = [norms.weight_norm(rows[i :: len(pieces)], piece, B, scaling) for i, piece in enumerate(pieces)]
        return torch.stack(each, dim=1).flatten()

    def _rows(self, layer: LoraLayer, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _factors(self, layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
        A, B = super()._factors(layer, adapter_name)
        return A.flatten(1), B.flatten(1)

    def _magnitude_shape(self, layer: LoraLayer) -> tuple[int, ...]:
        return (1, -1, *self._trailing(layer))

    def _along(self, layer: LoraLayer, vector: Tensor) -> Tensor:
        return vector.view(-1, *self._trailing(layer))

    def _across(self, layer: LoraLayer, vector: Tensor) -> Tensor:
        return vector.view(-1, 1, *self._trailing(layer))

    def _trailing(self, layer: LoraLayer) -> tuple[int, ...]:
        return (1,) * (layer.get_base_layer().weight.dim() - 2)

    def _base_product(self, layer: LoraLayer, x: Tensor) -> Tensor:
        base = layer.get_base_layer()
        return base._conv_forward(x, base.weight.to(x.dtype), None)


def _without_adapters(layer: LoraLayer, weight: Tensor) -> Tensor:
    """The base weight with the adapters already merged taken out, in a copy if there are any."""
    for name in reversed(layer.merged_adapters):
        variant = layer.lora_variant.get(name)
        if variant is not None:
            weight = variant.unmerge(layer, name, weight)
        elif layer._has_adapter(name):
            weight = weight - layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _add(result: Tensor, product: Tensor, scaling: Any) -> Tensor:
    """result + scaling * product."""
    if isinstance(scaling, Tensor):
        return result + product * scaling
    return torch.add(result, product, alpha=scaling)
