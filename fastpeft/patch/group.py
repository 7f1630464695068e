"""Projections of one input as one product, called one at a time by attention code that knows nothing of it.

A `Group` lives during one call of its parent module (the attention, the MLP), which opens and closes it. The first
member called computes all of them; another takes its part if it is handed the very same tensor in the same mode, else
it computes alone. When the parent returns or raises, nothing is left. Outside its parent's forward a member always
computes alone, so calling a projection by hand behaves as it does unpatched.

The parts are instance attributes (`module.forward`), callable objects that copy and pickle with their modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..ops import dora_linear, lora_linear, lora_linear_group
from ..ops.lora_linear import NATIVE_ELEMENTS
from .reading import Operands, Reading, Unsupported, check_base, hooks_of, read_lora
from .stacking import Stack

_TENSORS = (Tensor, Parameter)

# On a GPU a product of this many rows or fewer costs its launch, and what it keeps alive is small.
FEW_ROWS = 256


def eager() -> bool:
    """Neither torch.compile, torch.export, torch.jit.trace, a functorch transform nor a global hook is looking on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _has_any_global_hook()
    )


class Forward:
    """What stands in a patched module's `__dict__["forward"]`; without an active patch it calls what was there."""

    __slots__ = ("__weakref__", "active", "module", "previous")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = module.__dict__.get("forward")
        self.active = True

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward as it was before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        return self.previous or MethodType(type(self.module).forward, self.module)


class LoraForward(Forward):
    """The forward of a LoRA or DoRA linear layer: one operator call, where its conditions hold."""

    __slots__ = ("group", "index", "native", "reading", "refused")

    def __init__(self, module: nn.Module, reading: Reading, native: bool) -> None:
        """native: the layer is fastpeft's own, whose forward is the operator call already."""
        super().__init__(module)
        self.reading = reading
        self.native = native
        self.refused: Any = None
        self.group: Group | None = None
        self.index = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.active:
            group = self.group
            if group is not None and group.owner is not None and group.owner == get_ident():
                y = group.take(self.index, args[0])
                if y is not None:
                    return y
            if not self.native:
                y = self.alone(args[0])
                if y is not None:
                    return y
        return self.original(*args, **kwargs)

    def alone(self, x: Any) -> Tensor | None:
        """The operator on this layer only; None where the layer's own forward must run."""
        operands = self.current()
        if (
            operands is None
            or operands[2] is None
            or not fits(x, operands[0])
            or torch._C._get_tracing_state() is not None
        ):
            return None
        if self.reading.dora:
            weight, bias, A, B, scaling, p = operands
            return dora_linear(x, weight, bias, A, B, self.reading.magnitude, scaling, p)  # type: ignore[arg-type]
        return lora_linear(x, *operands)  # type: ignore[arg-type]

    def operands(self) -> Operands | None:
        """The tensors for a group's operator, which is LoRA's; None while the layer must be computed alone."""
        found = self.current()
        return None if self.reading.dora else found

    def current(self) -> Operands | None:
        """The layer's tensors now; None while its own forward must run. Reads the layer anew if it has changed."""
        found = self.reading.operands()
        if found is None and not self.reading.holds():
            reading = self._read_again()
            if reading is not None:
                self.reading = reading
                found = reading.operands()
        return found

    def _read_again(self) -> Reading | None:
        modules, active = self.module._modules, self.module.active_adapters
        parts = [id(part) for name in active for part in _parts(modules, name)]  # type: ignore[union-attr]
        stamp = (list(active), bool(self.module.merged_adapters), parts)  # type: ignore[arg-type]
        if stamp == self.refused:
            return None
        try:
            return read_lora(self.module, ours=self)
        except Unsupported:
            self.refused = stamp
            return None

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.native, self.group, self.index, self.reading.name)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, self.native, self.group, self.index, name = state
        self.refused = None
        self.reading = _Unread(name)  # type: ignore[assignment]


class _Unread:
    """The reading of a copied layer before its first call: it never holds."""

    dropout = nn.Identity()
    dora = False

    def __init__(self, name: str | None) -> None:
        self.name = name

    def holds(self) -> bool:
        return False

    def operands(self) -> None:
        return None


class PlainForward(Forward):
    """The forward of an nn.Linear without an adapter that shares its input with layers that have one."""

    __slots__ = ("group", "index")

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.group: Group | None = None
        self.index = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        group = self.group
        if group is not None and group.owner is not None and len(args) == 1 and not kwargs and self.active:
            y = group.take(self.index, args[0]) if group.owner == get_ident() else None
            if y is not None:
                return y
        return self.original(*args, **kwargs)

    def operands(self) -> Operands | None:
        """Weight and bias as they are now."""
        parameters = self.module._parameters
        weight = parameters.get("weight")
        return None if weight is None else (weight, parameters.get("bias"), None, None, 0.0, 0.0)


class ParentForward(Forward):
    """The forward of the module that calls a group's members: the extent in which they may share one product."""

    __slots__ = ("groups",)

    def __init__(self, module: nn.Module, groups: list[Group]) -> None:
        super().__init__(module)
        self.groups = groups

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or not eager():
            return self.original(*args, **kwargs)
        me = get_ident()
        for group in self.groups:
            group.owner, group.entry = me, None
        try:
            return self.original(*args, **kwargs)
        finally:
            for group in self.groups:
                group.owner = group.entry = None


class Group:
    """The members, how they are computed, and during the parent's call what the first of them computed for the rest.

    one_product: "never", "always", or "free": then the base weights, stacked, are one product where that keeps no
    additional activation for the backward, and a product each elsewhere. probing: `patch` tries the group in the model;
    small inputs are not left to the members, and outputs have the strides that one product gives them.
    """

    __slots__ = (
        "_homes",
        "_hooks",
        "bias_stack",
        "entry",
        "form",
        "probing",
        "members",
        "one_product",
        "owner",
        "stack",
    )

    def __init__(self, members: Sequence[LoraForward | PlainForward], homes: Sequence[tuple[nn.Module, str]]) -> None:
        """homes: the module and the attribute under which each member is registered."""
        self.members = tuple(members)
        self._homes = tuple(homes)
        self.form = "auto"
        self.one_product = "never"
        self.stack: Stack | None = None
        self.bias_stack: Stack | None = None
        self.owner: int | None = None
        self.entry: tuple[Tensor, Any, list[Tensor | None]] | None = None
        self.probing = False
        self._hooks: tuple[dict[int, Any], ...] | None = None
        for index, member in enumerate(members):
            member.group, member.index = self, index

    def take(self, index: int, x: Any) -> Tensor | None:
        """Member `index`'s output for x; None if it must compute alone."""
        entry = self.entry
        if entry is None:
            if type(x) not in _TENSORS or x.is_inference():  # such a tensor does not tell whether it was written to
                return None
            if x.numel() <= NATIVE_ELEMENTS and not (self._drops() or self.probing):
                return None  # so small that plain calls, one by one, are faster
            computed = self.compute(x)
            if computed is None:
                return None
            self.entry = entry = (x, _mode(x), list(computed))
        elif entry[0] is not x or entry[1] != _mode(x):
            return None
        outs = entry[2]
        y, outs[index] = outs[index], None
        if not any(out is not None for out in outs):
            self.entry = None
        return y

    def compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The outputs of all members for x (..., K), or None while something in the group forbids one product."""
        if self._hooks is None:
            self._hooks = self._members_hooks()
        if any(self._hooks):
            return None
        operands = []
        for member, (home, key) in zip(self.members, self._homes):
            if home._modules.get(key) is not member.module:
                return None
            found = member.operands()
            if found is None:
                return None
            operands.append(found)
        weights, biases, A, B, scaling, dropouts = zip(*operands)
        adapted = [(a.dtype, p) for a, p in zip(A, dropouts) if a is not None]
        if not adapted or adapted.count(adapted[0]) < len(adapted) or not fits(x, weights[0]):
            return None
        p = adapted[0][1]
        block, block_bias = self._blocks(x, weights, biases)
        outs = lora_linear_group(
            x, weights, biases, A, B, scaling, p, stacked_weight=block, stacked_bias=block_bias, form=self.form
        )
        return tuple(_as_column_block(out) for out in outs) if self.probing and self.stack else outs

    def _blocks(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The stacked weight and bias, where this call is to use them and they are still in place."""
        stack = self.stack
        if stack is None or not self.wants_one_product(x):
            return None, None
        block = stack.tensor(weights)
        if block is None and stack.follow():
            block = stack.tensor(weights)
        if block is None or self.bias_stack is None:
            return block, None
        block_bias = self.bias_stack.tensor(biases)
        if block_bias is None and self.bias_stack.follow():
            block_bias = self.bias_stack.tensor(biases)
        return (block, block_bias) if block_bias is not None else (None, None)

    def wants_one_product(self, x: Tensor) -> bool:
        """For this input the stacked base weights are one product."""
        if self.one_product == "free":
            return not torch.is_grad_enabled() or (x.is_cuda and x.numel() <= FEW_ROWS * x.shape[-1])
        return self.one_product == "always"

    def _drops(self) -> bool:
        """Dropout is on; all members have the same."""
        for member in self.members:
            dropout = member.reading.dropout if isinstance(member, LoraForward) else None
            if dropout is not None:
                return dropout.training and type(dropout) is nn.Dropout and dropout.p > 0.0
        return False

    def __getstate__(self) -> Any:
        return (self.members, self._homes, self.form, self.one_product, self.stack, self.bias_stack)

    def __setstate__(self, state: Any) -> None:
        self.members, self._homes, self.form, self.one_product, self.stack, self.bias_stack = state
        self.owner = self.entry = None
        self.probing = False
        self._hooks = None

    def _members_hooks(self) -> tuple[dict[int, Any], ...]:
        """Hooks on the members that may change a member's input, or make it another tensor."""
        modules = [member.module for member in self.members]
        return tuple(
            hooks for m in modules for hooks in (m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        )


def fits(x: Any, weight: Tensor) -> bool:
    """x is an ordinary tensor in the dtype that the base layer takes (any, under autocast)."""
    if type(x) not in _TENSORS or x.dim() == 0:
        return False
    return x.dtype is weight.dtype or (
        x.is_floating_point() and torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    )


def read_plain(module: nn.Module) -> nn.Linear:
    """A frozen nn.Linear without an adapter and without hooks. Raises Unsupported."""
    base = check_base(module)
    if base.weight.requires_grad:
        raise Unsupported("its weight is trained")
    if any(hooks_of((base,))):
        raise Unsupported("other code has registered hooks on it")
    return base


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What must be the same for two projections of x to come from one product."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (x._version, x.data_ptr(), x.requires_grad, torch.is_grad_enabled(), autocast)


def _as_column_block(y: Tensor) -> Tensor:
    """y with the strides of a column block of a wider matrix, to see whether the model's code bears it."""
    wide = y.new_zeros(*y.shape[:-1], y.shape[-1] + 16)
    return torch.cat([y, wide[..., y.shape[-1] :]], dim=-1)[..., : y.shape[-1]]


def _parts(modules: Any, name: str) -> list[Any]:
    return [modules["base_layer"], *(modules[key]._modules.get(name) for key in ("lora_A", "lora_B", "lora_dropout"))]
