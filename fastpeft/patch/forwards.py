"""What stands in the place of a patched module's forward, and calls the operators where their conditions hold.

They are instance attributes (`module.forward`), callable objects that copy and pickle with their modules.
"""

from __future__ import annotations

from threading import get_ident
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ..layers.dora import DoraCaching
from ..ops import dora_linear, lora_linear, nf4_linear
from ..ops.backend import autocast_enabled
from ..ops.nf4 import DTYPES, Weight4bit
from .reading import Operands, Reading, Unsupported, check_base, hooks_of, read_lora

if TYPE_CHECKING:
    from .group import Group

TENSORS = (Tensor, Parameter)


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
            if group is not None and (group.entry is not None or group.owner is not None):
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
        if type(operands[0]) is Weight4bit:
            return nf4_linear(x, *operands)
        return lora_linear(x, *operands)  # type: ignore[arg-type]

    def operands(self) -> Operands | None:
        """The tensors for a group's operator; None while the layer must be computed alone."""
        found = self.current()
        if self.native and self.reading.dora and DoraCaching.on(self.module):
            return None  # its own forward has the norms
        return found

    @property
    def magnitude(self) -> Tensor | None:
        """m of a DoRA layer as it is now; None for LoRA."""
        return self.reading.magnitude

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
    """The forward of a linear layer without an adapter, a member of a group."""

    __slots__ = ("group", "index")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.group: Group | None = None
        self.index = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        group = self.group
        if group is None or (group.entry is None and group.owner is None):
            return self.original(*args, **kwargs)
        if len(args) == 1 and not kwargs and self.active:
            y = group.take(self.index, args[0])
            if y is not None:
                return y
        return self.original(*args, **kwargs)

    def operands(self) -> Operands | None:
        """Weight and bias as they are now."""
        parameters = self.module._parameters
        weight: Tensor | None = parameters.get("weight")
        if weight is None:
            return None
        if not isinstance(self.module, nn.Linear):  # a Conv1D keeps its weight transposed
            weight = weight.t()
        return (weight, parameters.get("bias"), None, None, 0.0, 0.0)

    @property
    def magnitude(self) -> None:
        """There is no adapter."""
        return None


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
            group.owner = me
        try:
            return self.original(*args, **kwargs)
        finally:
            for group in self.groups:
                group.close()


def fits(x: Any, weight: Any) -> bool:
    """x is an ordinary tensor in the dtype that the base layer takes (any, under autocast)."""
    if type(x) not in TENSORS or x.dim() == 0:
        return False
    if isinstance(weight, Weight4bit):
        return x.dtype in DTYPES
    return x.dtype is weight.dtype or (
        x.is_floating_point() and autocast_enabled(x.device) and x.dtype is not torch.float64
    )


def read_plain(module: nn.Module) -> nn.Module:
    """A linear layer without an adapter and without hooks. Raises Unsupported."""
    base = check_base(module)
    if any(hooks_of((base,))):
        raise Unsupported("other code has registered hooks on it")
    return base


def _parts(modules: Any, name: str) -> list[Any]:
    return [modules["base_layer"], *(modules[key]._modules.get(name) for key in ("lora_A", "lora_B", "lora_dropout"))]
