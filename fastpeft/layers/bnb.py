"""LoRA on the quantised linear layers of bitsandbytes: `Linear4bit` on the fused 4-bit operator, `Linear8bitLt`.

Nothing here imports bitsandbytes before a layer of it is met.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.errors import PeftWarning
from fastpeft.layers.activated import Activated
from fastpeft.layers.base import check_adapters_to_merge
from fastpeft.layers.dora import DoraLinear
from fastpeft.layers.init import make_linear
from fastpeft.layers.lora import LoraLayer, low_rank_product
from fastpeft.layers.plain import any_global_hook, bare, dropout_probability
from fastpeft.layers.variants import LoraVariant
from fastpeft.ops.dora_linear import dora_linear
from fastpeft.ops.nf4 import Weight4bit, dequantize_4bit, weight_4bit
from fastpeft.ops.nf4_linear import nf4_linear
from fastpeft.ops.products import MAX_RANK
from fastpeft.ops.weight_norm import RowPanels

REPACKS = "support_avx512bf16_for_cpu"  # the attribute by which a Linear4bit repacks its weight in evaluation
_PANEL = 1 << 20  # elements of an 8-bit weight decoded at once, for its rows' norms

_weights: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Weight4bit]] = WeakKeyDictionary()


def kind_of(base: Any) -> str | None:
    """ "4bit" or "8bit" for a linear layer of bitsandbytes, else None."""
    if not any(cls.__module__.startswith("bitsandbytes.") for cls in type(base).__mro__):
        return None
    weight = type(getattr(base, "weight", None)).__name__
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(weight)


def format_of(base: Any) -> str | None:
    """What a linear layer of bitsandbytes keeps its weight as: "nf4, nested scales", "fp4", "int8"; else None."""
    kind = kind_of(base)
    if kind != "4bit":
        return "int8" if kind else None
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    nested = weight.compress_statistics if state is None else state.nested
    return weight.quant_type + (", nested scales" if nested else "")


def keep_scales(model: nn.Module) -> list[nn.Module]:
    """Let no 4-bit layer of the model repack its weight in evaluation any more; the layers that would have.

    On CPUs with bf16 arithmetic bitsandbytes does that for its own inference kernel, and rounds the scales to bf16;
    unpacking brings the layout back, but not the bits.
    """
    layers = [m for m in model.modules() if m.__dict__.get(REPACKS) and kind_of(m) == "4bit"]
    for layer in layers:
        layer.__dict__[REPACKS] = False
    return layers


def read_4bit(base: Any) -> Weight4bit:
    """The weight of a `Linear4bit` as the operators take it: views, made again when the module holds other storage.

    A weight that bitsandbytes has repacked for its own inference on this processor is put back as its own saving does
    it, and the layer told not to do it again: repacking rounds the scales to bf16.
    """
    weight = base._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    if state is None:  # FSDP gives a plain parameter back; the module has kept the state
        state = getattr(base, "quant_state", None)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        base.quant_state = state = weight.quant_state
        setattr(base, REPACKS, False)
        warnings.warn(
            "bitsandbytes had repacked a 4-bit weight for its inference on this processor and rounded its scales to "
            "bf16; it is unpacked again. Patch the model before it first runs in evaluation to keep the exact scales.",
            PeftWarning,
            stacklevel=2,
        )
    dtype = base.compute_dtype if getattr(base, "compute_type_is_set", True) else None
    with torch._C.DisableTorchFunctionSubclass():  # a quarter of the time that bitsandbytes' handler takes
        at = weight.data_ptr()
    key = (id(weight), at, id(state), id(getattr(state, "absmax", None)), dtype)
    found = _weights.get(base)
    if found is None or found[0] != key:
        found = _weights[base] = (key, weight_4bit(weight, state, dtype))
    return found[1]


class _Quantised(LoraLayer, nn.Module):
    """What both kinds share: the adapter's factors, and merging by way of the dequantised weight."""

    lora_variants: ClassVar[dict[str, type[LoraVariant]]] = {
        "alora_invocation_tokens": Activated,
        "use_dora": DoraLinear,
    }

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
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False
        self.moved_by: float | None = None  # how far quantising moved the last merged sum, relative to its norm
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _make_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = make_linear(self.in_features, r, False)
        self.lora_B[adapter_name] = make_linear(r, self.out_features, lora_bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling · B A, (N, K)."""
        A: Any = self.lora_A[adapter]
        B: Any = self.lora_B[adapter]
        return low_rank_product(A.weight, B.weight, self.scaling[adapter])

    def dequantized_weight(self) -> Tensor:
        """The base weight (N, K), decoded, in the dtype it was quantised from."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The decoded weight."""
        return self.dequantized_weight()

    def _set_weight(self, weight: Tensor) -> None:
        """Quantise `weight` (N, K) in place of the base layer's."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the dequantised base weight and quantise the sum again, as PEFT does.

        A warning says by how much quantising moved the sum. safe_merge: `ValueError`, with the base untouched, if the
        sum is not finite. To keep the sum as it is, in 16 or 32 bits: `merge_and_unload(dequantize=True)`.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self._has_adapter(name):
                continue
            with torch.no_grad():
                self._requantise(self._merged_weight(name, safe_merge), name)
                bias = self.lora_B[name].bias  # type: ignore[union-attr]
                if bias is not None:
                    self.get_base_layer().bias.data += bias.to(self.get_base_layer().bias.dtype)
            self.merged_adapters.append(name)

    def _merged_weight(self, name: str, safe: bool) -> Tensor:
        weight = self.dequantized_weight()
        variant = self.lora_variant.get(name)
        if variant is not None:
            merged = variant.merge(self, name, weight)
        else:
            delta = self.get_delta_weight(name)
            merged = weight.to(delta.dtype) + delta
        if safe and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return merged

    def _requantise(self, weight: Tensor, name: str) -> None:
        self._set_weight(weight)
        lost = (self.dequantized_weight().float() - weight.float()).norm() / weight.float().norm().clamp_min(1e-30)
        self.moved_by = lost.item()
        warnings.warn(
            f"Adapter {name} was merged into a quantised weight: quantising the sum moved it by {self.moved_by:.1%} of "
            "its norm, so outputs may differ. merge_and_unload(dequantize=True) keeps the sum exactly, in 16 bits.",
            PeftWarning,
            stacklevel=3,
        )

    def unmerge(self) -> None:
        """Take all merged adapters out again, to within what quantising twice loses."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if not self._has_adapter(name):
                continue
            with torch.no_grad():
                weight, variant = self.dequantized_weight(), self.lora_variant.get(name)
                if variant is not None:
                    weight = variant.unmerge(self, name, weight)
                else:
                    delta = self.get_delta_weight(name)
                    weight = weight.to(delta.dtype) - delta
                self._set_weight(weight)
                bias = self.lora_B[name].bias  # type: ignore[union-attr]
                if bias is not None:
                    self.get_base_layer().bias.data -= bias.to(self.get_base_layer().bias.dtype)

    @torch.no_grad()
    def merged_linear(self, names: list[str], safe_merge: bool = False) -> nn.Linear:
        """An nn.Linear that holds the decoded weight plus these adapters, rounded once to the weight's own dtype."""
        base = self.get_base_layer()
        if self.merged_adapters:
            raise ValueError(
                f"{', '.join(self.merged_adapters)} is merged into the quantised weight; unmerge_adapter() first, or "
                "load the model again: what requantising lost cannot be had back"
            )
        weight = self.dequantized_weight()
        dtype, bias = weight.dtype, None if base.bias is None else base.bias.detach().clone()
        total = weight.float()
        for name in names:
            if not self._has_adapter(name):
                continue
            variant = self.lora_variant.get(name)
            if variant is not None:
                total = variant.merge(self, name, total)
            else:
                A, B = self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[union-attr]
                total = total + low_rank_product(A.float(), B.float(), self.scaling[name])  # type: ignore[arg-type]
            added = self.lora_B[name].bias  # type: ignore[union-attr]
            if added is not None:
                bias = added.to(dtype) if bias is None else bias + added.to(bias.dtype)
        if safe_merge and not total.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. An adapter of {', '.join(names)} seems to be broken"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(total.to(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return linear


class Linear4bit(_Quantised):
    """LoRA on bitsandbytes' `Linear4bit`: base and adapter in one operator, W is never decoded whole."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.bnb.Linear4bit"

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        # Or a forward of the base layer in evaluation would repack its weight, rounding the scales to bf16.
        setattr(self.get_base_layer(), REPACKS, False)

    def dequantized_weight(self) -> Tensor:
        """The base weight (N, K), decoded, in the dtype it was quantised from: bitsandbytes' bits."""
        return dequantize_4bit(read_4bit(self.get_base_layer()))

    def _set_weight(self, weight: Tensor) -> None:
        base = self.get_base_layer()
        old = base.weight
        new = type(old)(
            weight.to(old.quant_state.dtype),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=base,
        )
        base.weight = new.to(old.device)

    def norm_weight(self) -> Any:
        """The base weight as it is: its rows' norms are made of panels of it."""
        return read_4bit(self.get_base_layer())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters'; `adapter_names`: one adapter a sample instead."""
        y = None if args or kwargs else self._fused(x)
        return super().forward(x, *args, **kwargs) if y is None else y

    def _fused(self, x: Tensor) -> Tensor | None:
        """The operator's output, if a plain or DoRA adapter, or none, on a plain layer is all there is to compute."""
        base = self._modules["base_layer"]
        if not is_plain_4bit(base) or any_global_hook():
            return None
        bias: Any = base._parameters.get("bias")  # type: ignore[union-attr]
        if self.merged_adapters:
            return None if self._disable_adapters else nf4_linear(x, read_4bit(base), bias)
        if self._disable_adapters:
            return nf4_linear(x, read_4bit(base), bias)
        active = self.active_adapters
        if len(active) != 1:
            return None
        name = active[0]
        if not self._has_adapter(name):
            return nf4_linear(x, read_4bit(base), bias)
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        p, scaling, variant = dropout_probability(dropout), self.scaling[name], self.lora_variant.get(name)
        if not (type(A) is type(B) is nn.Linear and bare(A, B)) or p >= 1.0 or type(scaling) not in (float, int):
            return None
        if B.bias is not None or self.r[name] > MAX_RANK:
            return None
        if not self.cast_input_dtype_enabled and x.dtype != A.weight.dtype:
            return None
        if variant is None:
            return nf4_linear(x, read_4bit(base), bias, A.weight, B.weight, scaling, p)
        if type(variant) is not DoraLinear:
            return None
        magnitude: Any = self.lora_magnitude_vector[name].weight
        norm = variant.known_norm(self, name)
        return dora_linear(x, read_4bit(base), bias, A.weight, B.weight, magnitude, scaling, p, norm=norm)


class Linear8bitLt(_Quantised):
    """LoRA on bitsandbytes' `Linear8bitLt`: its own products, and the adapter added."""

    _peft_name: ClassVar[str] = "peft.tuners.lora.bnb.Linear8bitLt"

    def dequantized_weight(self) -> Tensor:
        """The base weight (N, K), decoded, in fp32."""
        return self._decoded(slice(None))

    def _decoded(self, rows: slice) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        base = self.get_base_layer()
        if base.state.SCB is None:
            base.state.SCB = base.weight.SCB
        return int8_vectorwise_dequant(base.weight.data[rows], base.state.SCB.to(base.weight.device)[rows])

    def norm_weight(self) -> Any:
        """The base weight some rows at a time, 4 MiB of it decoded at once."""
        n, k = self.get_base_layer().weight.shape
        step = max(1, _PANEL // max(1, k))

        def panels() -> Iterator[tuple[slice, Tensor]]:
            for first in range(0, max(1, n), step):
                rows = slice(first, first + step)
                yield rows, self._decoded(rows)

        return RowPanels((n, k), panels)

    def _set_weight(self, weight: Tensor) -> None:
        base = self.get_base_layer()
        old = base.weight
        new = type(old)(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        base.weight = new.to(old.device)
        base.state.reset_grads()


def is_plain_4bit(base: Any) -> bool:
    """A `Linear4bit` whose forward is bitsandbytes' own and whose weight is quantised and where its scales are."""
    weight = base._parameters.get("weight") if isinstance(base, nn.Module) else None
    state = getattr(weight, "quant_state", None)
    return (
        type(base).__module__.startswith("bitsandbytes.")
        and type(weight).__name__ == "Params4bit"
        and state is not None
        and weight.is_meta == state.absmax.is_meta  # type: ignore[union-attr]
        and bare(base)
    )
