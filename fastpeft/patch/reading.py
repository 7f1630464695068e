"""What a LoRA linear layer is made of right now, and whether that still holds at the next call.

The layers of fastpeft and of peft keep their state in the same attributes, so one reader serves both. `read_lora` looks
at everything once and refuses, with a reason, what the operators do not compute. A `Reading` then answers the question
of the hot path, "is it all still so?", with a few dictionary look-ups: adapters may be switched, merged, disabled or
deleted, hooks registered and weights replaced at any moment, and the layer's own forward must take over at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..layers.bnb import is_plain_4bit, read_4bit
from ..ops.nf4 import Weight4bit, dequantize_4bit
from ..ops.products import MAX_RANK

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsupported(Exception):
    """A module that stays as it is; the message is the reason shown in the report."""


# Weight (N, K), bias, A, B, scaling and dropout probability of one projection at one call; A and B are None without an
# adapter. The weight of a 4-bit layer is a Weight4bit.
Operands: TypeAlias = tuple[Any, Tensor | None, Tensor | None, Tensor | None, float, float]


_LINEAR_LAYERS = (
    ("fastpeft", "fastpeft.layers.linear", "Linear"),
    ("peft", "peft.tuners.lora.layer", "Linear"),
    ("fastpeft", "fastpeft.layers.bnb", "Linear4bit"),
    ("peft", "peft.tuners.lora.bnb", "Linear4bit"),
)


def lora_library(module: nn.Module, own_forward: bool = True) -> str | None:
    """ "fastpeft" or "peft" if `module` is that library's LoRA linear layer (with its own forward), else None."""
    for library, name, kind in _LINEAR_LAYERS:
        cls = getattr(sys.modules.get(name), kind, None)
        if cls is None or not isinstance(module, cls):
            continue
        if library == "fastpeft" or type(module) is cls:
            return library if type(module).forward is cls.forward or not own_forward else None
    return None


def is_tuner_layer(module: nn.Module) -> bool:
    """True for any module of either library that holds adapters around a base layer."""
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple) and "base_layer" in module._modules


class Reading:
    """One LoRA linear layer with one active, unmerged adapter, plain or DoRA, or (name None) with none active."""

    def __init__(self, module: Any, name: str | None) -> None:
        modules = module._modules
        self.module, self.name = module, name
        self._state, self._modules = module.__dict__, modules
        active = module._active_adapter
        self.active = list(active) if isinstance(active, list) else active
        self.base = modules["base_layer"]
        self._A_of, self._B_of = modules["lora_A"]._modules, modules["lora_B"]._modules
        self._dropout_of = modules["lora_dropout"]._modules
        self.A, self.B, self.dropout = (parts.get(name) for parts in (self._A_of, self._B_of, self._dropout_of))
        self._magnitude_of = getattr(modules.get("lora_magnitude_vector"), "_modules", {})
        self.dora = is_dora(module, name)
        self.magnitude_module: Any = self._magnitude_of.get(name)
        self.scaling: dict[str | None, float] = module.scaling
        self.transposed = not isinstance(self.base, nn.Linear)  # a Conv1D keeps (K, N)
        self.packed = is_plain_4bit(self.base)
        # Else only a trial can tell what it computes.
        self.known = type(self.base) is nn.Linear or self.transposed or self.packed
        self._hooks = tuple(hooks_of((self.base, self.A, self.B, self.dropout)))

    def holds(self) -> bool:
        """The layer still has the parts and the active adapter that were read."""
        name = self.name
        return (
            self._state["_active_adapter"] == self.active
            and self._modules["base_layer"] is self.base
            and self._A_of.get(name) is self.A
            and self._B_of.get(name) is self.B
            and self._dropout_of.get(name) is self.dropout
            and self._magnitude_of.get(name) is self.magnitude_module
            and (name is not None or self._A_of.keys().isdisjoint(self.module.active_adapters))
        )

    def operands(self) -> Operands | None:
        """The tensors as they are now; None while the layer's own forward must run.

        That is: it has changed (`holds` is false), is merged or disabled, has got hooks inside, or a weight is not an
        ordinary parameter any more.
        """
        state = self._state
        if (
            not self.holds()
            or state["_disable_adapters"]
            or state["merged_adapters"]
            or any(self._hooks)
            or "forward" in self.base.__dict__
            or not state.get("cast_input_dtype_enabled", True)
            or _has_any_global_hook()
            or (self.dora and self.magnitude is None)
        ):
            return None
        return self.tensors()

    @property
    def magnitude(self) -> Tensor | None:
        """A DoRA adapter's m as it is now; None for LoRA, or where it is no longer a parameter of its module."""
        return self.magnitude_module._parameters.get("weight") if self.dora else None

    def tensors(self) -> Operands | None:
        """The tensors, whatever state the layer is in; None if one is missing, or if dropout leaves nothing."""
        dropout = self.dropout
        try:
            parameters = self.base._parameters
            weight, bias = parameters["weight"], parameters["bias"]
            if self.packed:
                weight = read_4bit(self.base)
            elif self.transposed:
                weight = weight.t()
            if dropout is None:
                return (weight, bias, None, None, 0.0, 0.0)
            A, B = self.A._parameters["weight"], self.B._parameters["weight"]
        except KeyError:  # flattened (FSDP) or offloaded: no longer parameters of these modules
            return None
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        return (weight, bias, A, B, self.scaling[self.name], p) if p < 1.0 else None


def read_lora(module: Any, ours: Any = None) -> Reading:
    """Read a layer that `lora_library` knows. Raises Unsupported, with the reason, if it must be left as it is.

    ours: the forward that this package has put on the module, when it is read again after a change.
    """
    if ours is None or module.__dict__.get("forward") is not ours:
        _own_forward(module)
    state = module.__dict__
    if state.get("merged_adapters"):
        raise Unsupported("merged into the base weight; unmerge, then patch again")
    active = module.active_adapters
    names = [name for name in active if name in module.lora_A]
    if len(names) > 1:
        raise Unsupported(f"{len(names)} active adapters ({', '.join(names)})")
    name = names[0] if names else None
    variant = getattr(module, "lora_variant", {}).get(name)
    if variant is not None and not is_dora(module, name):
        raise Unsupported(f"the adapter is not a plain LoRA but {type(variant).__name__}")
    base = check_base(module._modules["base_layer"])
    if not {"lora_A", "lora_B", "lora_dropout"} <= module._modules.keys() or "_disable_adapters" not in state:
        raise Unsupported("the layer does not keep its adapters where LoRA layers do")
    reading = Reading(module, name)
    if name is not None:
        _check_adapter(reading)
    if any(hooks_of((base, reading.A, reading.B, reading.dropout))):
        raise Unsupported("other code has registered hooks inside the layer")
    return reading


def is_dora(module: Any, name: str | None) -> bool:
    """Whether the adapter is DoRA as both libraries compute it on linear layers."""
    variant = getattr(module, "lora_variant", {}).get(name)
    for library, home, cls in (
        ("fastpeft", "fastpeft.layers.dora", "DoraLinear"),
        ("peft", "peft.tuners.lora.variants", "DoraLinearVariant"),
    ):
        known = getattr(sys.modules.get(home), cls, None)
        if known is not None and type(variant) is known and lora_library(module, own_forward=False) == library:
            return True
    return False


def _check_adapter(reading: Reading) -> None:
    """Raises Unsupported unless A, B, dropout and scaling are what the operators take."""
    for part, label in ((reading.A, "lora_A"), (reading.B, "lora_B")):
        if type(part) is not nn.Linear:
            raise Unsupported(f"{label} is a {type(part).__name__}, not an nn.Linear")
        _own_forward(part, label)
        check_tensor(part._parameters.get("weight"), f"{label}.weight")
    if type(reading.dropout) not in (nn.Dropout, nn.Identity):
        raise Unsupported(f"lora_dropout is a {type(reading.dropout).__name__}")
    if isinstance(reading.dropout, nn.Dropout) and reading.dropout.p >= 1.0:
        raise Unsupported("lora_dropout is 1: the adapter never sees its input")
    if reading.B._parameters.get("bias") is not None:
        raise Unsupported("lora_bias: the adapter has a bias of its own")
    if reading.dora:
        check_tensor(reading.magnitude, "lora_magnitude_vector.weight")
    A, B = reading.A._parameters["weight"], reading.B._parameters["weight"]
    if A.dtype != B.dtype or A.device != reading.base.weight.device or B.device != A.device:
        raise Unsupported("lora_A, lora_B and the base weight differ in dtype or device")
    if A.shape[0] > MAX_RANK:
        raise Unsupported(f"rank {A.shape[0]} is above {MAX_RANK}")
    if not isinstance(reading.scaling[reading.name], int | float):
        raise Unsupported(f"its scaling is a {type(reading.scaling[reading.name]).__name__}, not a number")


def check_base(base: Any) -> Any:
    """The base layer, if it is a dense nn.Linear or Conv1D, or a Linear4bit, held whole on one device.

    Raises Unsupported otherwise.

    A subclass of nn.Linear that holds nothing but weight and bias is let through: verification shows what it computes.
    """
    if is_plain_4bit(base):
        if "_hf_hook" in base.__dict__:
            raise Unsupported(f"accelerate moves the base layer between devices ({type(base._hf_hook).__name__})")
        return base
    if type(base) is not nn.Linear and not is_conv1d(base) and not _is_linear_in_other_words(base):
        raise Unsupported(_why_not_linear(base))
    _own_forward(base, "the base layer")
    check_tensor(base._parameters.get("weight"), "the base weight")
    if base._parameters["weight"].is_meta and hasattr(base, "_hf_hook"):
        raise Unsupported("the base weight is on the meta device (offloaded)")
    if base._parameters.get("bias") is not None:
        check_tensor(base._parameters["bias"], "the base bias")
    return base


def as_dense(weight: Tensor | Weight4bit, dtype: torch.dtype) -> Tensor:
    """The base weight (N, K) as an ordinary matrix; a 4-bit one decoded into `dtype`."""
    return dequantize_4bit(weight, dtype) if isinstance(weight, Weight4bit) else weight


def dense_weight(reading: Reading) -> Tensor:
    """The base weight of a layer, a 4-bit one decoded into fp32."""
    return dequantize_4bit(read_4bit(reading.base), torch.float32) if reading.packed else reading.base.weight


def input_dtype(weight: Tensor | Weight4bit, A: Tensor | None) -> torch.dtype:
    """The dtype of the inputs that a base layer gets: its own, or the adapter's over 4 bits, which take any."""
    if not isinstance(weight, Weight4bit):
        return weight.dtype
    return weight.compute_dtype or weight.dtype if A is None else A.dtype


def check_tensor(tensor: Any, label: str) -> None:
    """Raises Unsupported unless `tensor` is an ordinary, dense, floating parameter with storage."""
    if tensor is None:
        raise Unsupported(f"{label} is not a parameter of its module (flattened or offloaded)")
    if type(tensor) not in (Parameter, Tensor):
        raise Unsupported(f"{label} is a {type(tensor).__name__} (sharded or quantised)")
    if hasattr(tensor, "ds_id"):
        raise Unsupported(f"{label} is partitioned by DeepSpeed")
    if tensor.layout != torch.strided or tensor.dtype not in FLOATS:
        raise Unsupported(f"{label} is {str(tensor.dtype).removeprefix('torch.')}, not a dense floating tensor")


def hooks_of(modules: Iterable[nn.Module | None]) -> Iterable[dict[int, Any]]:
    """The hook dictionaries of some modules: the objects themselves, so that their emptiness can be asked again."""
    for module in modules:
        for name in _HOOKS:
            hooks = getattr(module, name, None)
            if hooks is not None:
                yield hooks


def _own_forward(module: Any, label: str = "the layer") -> None:
    if "_hf_hook" in module.__dict__:
        raise Unsupported(f"accelerate moves {label} between devices ({type(module._hf_hook).__name__})")
    if "forward" in module.__dict__:
        raise Unsupported(f"other code has replaced the forward of {label}")


def is_conv1d(base: Any) -> bool:
    """Transformers' linear layer that keeps its weight transposed."""
    cls = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return cls is not None and type(base) is cls


def _is_linear_in_other_words(base: Any) -> bool:
    """A subclass of nn.Linear with no other state; its forward may say the same differently, as Falcon's does."""
    state = {**base._parameters, **base._buffers, **base._modules}
    return isinstance(base, nn.Linear) and state.keys() <= {"weight", "bias"} and not _is_quantised(base)


def _is_quantised(base: Any) -> bool:
    return hasattr(base, "quant_state") or "bitsandbytes" in type(base).__module__ or hasattr(base, "qweight")


def _why_not_linear(base: Any) -> str:
    name = type(base).__name__
    if is_tuner_layer(base):
        return f"the base layer is itself an adapter layer ({name})"
    if _is_quantised(base):
        return f"the base layer is quantised ({name})"
    return f"the base layer is a {name}, not an nn.Linear"
