"""Projections of one input as one product, called one at a time by attention code that knows nothing of it.

A group is computed at one of two moments.

*Shared*: the parent module (the attention, the MLP) opens the group while its forward runs. The first member called
computes all of them; another takes its part if it is handed the very same tensor in the same mode, else it computes
alone. When the parent returns or raises, nothing is left.

*Joined*: the producer of the input (a norm, an activation: see `producers`) computes the members' outputs together with
its own. They wait for the members as long as the produced tensor is alive, which is as long as somebody can hand it to
one of them; no module needs to be open, so it is the same when a checkpoint runs the code again in the backward.

Outside of both a member always computes alone, so calling a projection by hand behaves as it does unpatched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dora_linear_group, lora_linear_group
from ..ops.backend import autocast_enabled
from ..ops.lora_linear import NATIVE_ELEMENTS
from ..ops.nf4 import DTYPES, Weight4bit
from ..ops.promise import Promise
from .forwards import TENSORS, LoraForward, PlainForward, fits
from .stacking import Stack

# On a GPU a product of this many rows or fewer costs its launch, and what it keeps alive is small.
FEW_ROWS = 256

# The members' weights, biases, A's, B's, scalings and dropout probability, then the stacked weight and bias, and where
# the adapters are DoRA the magnitudes, and which outputs a rotary embedding will tell in the backward (`ops.promise`).
Gathered = tuple[Any, ...]


class Entry:
    """What one computation left for the members: outputs for the tensor `x`, in the mode and thread of that moment."""

    __slots__ = ("__weakref__", "mode", "outs", "thread", "x")

    def __init__(self, x: Callable[[], Tensor | None], mode: Any, outs: Sequence[Tensor]) -> None:
        self.x, self.mode = x, mode
        self.outs: list[Tensor | None] = list(outs)
        self.thread = get_ident()


class Group:
    """The members, how they are computed, and what has been computed for those that are still to be called.

    one_product: "never", "always", or "free": then the base weights, stacked, are one product where that keeps no
    additional activation for the backward, and a product each elsewhere. probing: `patch` tries the group in the model;
    small inputs are not left to the members, and outputs have the strides that one product gives them. told: DoRA's
    outputs that rotary embeddings were seen to take at that. between: the modules around members and producer within
    the module that contains all of them.
    """

    __slots__ = (
        "__weakref__",
        "_homes",
        "_hooks",
        "between",
        "bias_stack",
        "entry",
        "form",
        "members",
        "one_product",
        "owner",
        "probing",
        "seen",
        "stack",
        "told",
    )

    def __init__(
        self,
        members: Sequence[LoraForward | PlainForward],
        homes: Sequence[tuple[nn.Module, str, nn.Module]],
        between: Sequence[nn.Module] = (),
    ) -> None:
        """homes: (module, attribute, module registered there) for each member and for what surrounds it."""
        self.members = tuple(members)
        self.between = tuple(between)
        self._homes = tuple(homes)
        self.form = "auto"
        self.one_product = "never"
        self.told: tuple[bool, ...] = ()
        self.stack: Stack | None = None
        self.bias_stack: Stack | None = None
        self._begin()
        for index, member in enumerate(members):
            member.group, member.index = self, index

    def _begin(self) -> None:
        self.owner: int | None = None
        self.entry: Entry | None = None
        self.probing = False
        self.seen: list[tuple[Tensor, ...]] = []  # the outputs of each call while probing
        self._hooks: tuple[dict[int, Any], ...] | None = None

    def close(self) -> None:
        """The parent's call has ended: what it shared is dropped, what a producer made waits for its tensor's end."""
        self.owner = None
        if self.entry is not None and not isinstance(self.entry.x, weakref.ref):
            self.entry = None

    def take(self, index: int, x: Any) -> Tensor | None:
        """Member `index`'s output for x; None if it must compute alone."""
        entry = self.entry
        if entry is None:
            entry = self._share(x) if self.owner == get_ident() else None
            if entry is None:
                return None
        elif entry.x() is not x or entry.mode != _mode(x) or entry.thread != get_ident():
            return None
        y, entry.outs[index] = entry.outs[index], None
        if not any(out is not None for out in entry.outs):
            self.entry = None
        return y

    def _share(self, x: Any) -> Entry | None:
        """Compute all members for x, the first of them having been called."""
        if type(x) not in TENSORS or x.is_inference():  # such a tensor does not tell whether it was written to
            return None
        if x.numel() <= NATIVE_ELEMENTS and not (self._drops() or self.probing):
            return None  # so small that plain calls, one by one, are faster
        outs = self.compute(x)
        if outs is None:
            return None
        self.entry = Entry(lambda: x, _mode(x), outs)
        return self.entry

    def compute(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The outputs of all members for x (..., K), or None while something in the group forbids one product."""
        gathered = self.gather(x, x)
        if gathered is None or all(a is None for a in gathered[2]):
            return None
        *lists, block, block_bias, magnitudes, told = gathered
        if magnitudes is not None:
            weights, biases, A, B, scaling, p = lists
            return self._probed(dora_linear_group(x, weights, biases, A, B, magnitudes, scaling, p, told=told))
        outs = lora_linear_group(x, *lists, stacked_weight=block, stacked_bias=block_bias, form=self.form)
        return self._probed(outs)

    def join(
        self, like: Tensor, dtype: torch.dtype, compute: Callable[[Gathered], tuple[Tensor, tuple[Tensor, ...]]]
    ) -> Tensor | None:
        """The produced tensor, its members' outputs laid down for them; None if the producer must compute alone.

        like: the producer's input; dtype: of what it produces. compute: the joined operator on what was gathered.
        """
        if like.is_inference() or (like.numel() <= NATIVE_ELEMENTS and not self.probing):
            return None
        if any(_recomputed(module) for module in self.between):
            return None  # a member called in another checkpoint than the producer would be recomputed without it
        gathered = self.gather(like, None)
        if gathered is None or not all(_takes(w, dtype) for w in gathered[0]):
            return None
        *_, magnitudes, _told = gathered
        if magnitudes is not None and any(isinstance(w, Weight4bit) for w in gathered[0]):
            return None  # DoRA over 4 bits is a group of its own
        device = like.device.type
        if autocast_enabled(like.device):
            cast = torch.get_autocast_dtype(device)
            if cast is not dtype:
                return None
            weights, biases, A, B, *rest = gathered
            weights = [w.to(cast) if isinstance(w, Weight4bit) else w for w in weights]
            gathered = (weights, biases, *([t if t is None else t.to(cast) for t in part] for part in (A, B)), *rest)
        produced, outs = compute(gathered)
        entry = Entry(weakref.ref(produced), _mode(produced), self._probed(outs))
        entry.x = weakref.ref(produced, _Clearing(self, entry))
        self.entry = entry
        return produced

    def gather(self, like: Tensor, x: Tensor | None) -> Gathered | None:
        """The members' tensors as they are now, or None while something forbids computing them together.

        like: tells the device and the number of rows. x: the members' input, where it exists already.
        """
        if self._hooks is None:
            self._hooks = self._members_hooks()
        if any(self._hooks):
            return None
        for home, key, module in self._homes:
            if home._modules.get(key) is not module:
                return None
        operands = []
        for member in self.members:
            found = member.operands()
            if found is None:
                return None
            operands.append(found)
        weights, biases, A, B, scaling, dropouts = zip(*operands)
        adapted = [(a.dtype, p) for a, p in zip(A, dropouts) if a is not None]
        if adapted and adapted.count(adapted[0]) < len(adapted):
            return None
        if x is not None and not fits(x, weights[0]):
            return None
        p = adapted[0][1] if adapted else 0.0
        magnitudes = [member.magnitude for member in self.members]
        given = sum(m is not None for m in magnitudes)  # list.count would compare tensors with None, 0.1 ms each time
        if given and (given < len(magnitudes) or any(w.requires_grad for w in weights)):
            return None  # DoRA is for adapters on every member, over frozen weights
        blocks = (None, None) if given else self._blocks(like, weights, biases)
        told = (True,) * given if self.probing else self.told
        return (weights, biases, A, B, scaling, p, *blocks, magnitudes if given else None, told)

    def _probed(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.probing:
            self.seen.append(outs)
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

    def end_probing(self) -> None:
        """From now on outputs that a rotary embedding took at every call are not kept."""
        self.probing = False
        self.told = tuple(all(map(Promise.taken_from, outs)) for outs in zip(*self.seen))
        self.seen = []

    def _drops(self) -> bool:
        """Dropout is on; all members have the same."""
        for member in self.members:
            dropout = member.reading.dropout if isinstance(member, LoraForward) else None
            if dropout is not None:
                return dropout.training and type(dropout) is nn.Dropout and dropout.p > 0.0
        return False

    def __getstate__(self) -> Any:
        stacks = self.stack, self.bias_stack
        return (self.members, self._homes, self.between, self.form, self.one_product, self.told, *stacks)

    def __setstate__(self, state: Any) -> None:
        self.members, self._homes, self.between, self.form, self.one_product, self.told, *stacks = state
        self.stack, self.bias_stack = stacks
        self._begin()

    def _members_hooks(self) -> tuple[dict[int, Any], ...]:
        """Hooks on the members that may change a member's input, or make it another tensor."""
        modules = [member.module for member in self.members]
        return tuple(
            hooks for m in modules for hooks in (m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        )


class _Clearing:
    """Forgets an entry when the tensor it is for has gone."""

    __slots__ = ("entry", "group")

    def __init__(self, group: Group, entry: Entry) -> None:
        self.group, self.entry = weakref.ref(group), weakref.ref(entry)

    def __call__(self, _: Any) -> None:
        group, entry = self.group(), self.entry()
        if group is not None and entry is not None and group.entry is entry:
            group.entry = None


def _recomputed(module: nn.Module) -> bool:
    """The module's forward runs again in the backward: by Transformers' switch, or by a mode of `fastpeft.memory`."""
    if not module.training:
        return False
    mode = getattr(module.__dict__.get("forward"), "mode", "none")
    return mode != "none" or getattr(module, "gradient_checkpointing", False)


def _takes(weight: Any, dtype: torch.dtype) -> bool:
    """The base weight is for inputs of this dtype."""
    if isinstance(weight, Weight4bit):
        return dtype in DTYPES
    return weight.dtype is dtype and type(weight) in TENSORS


def _mode(x: Any) -> tuple[Any, ...]:
    """What must be the same for two projections of x to come from one product."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if autocast_enabled(x.device) else None
    return (x._version, x.data_ptr(), x.requires_grad, torch.is_grad_enabled(), autocast)


def _as_column_block(y: Tensor) -> Tensor:
    """y with the strides of a column block of a wider matrix, to see whether the model's code bears it."""
    wide = y.new_zeros(*y.shape[:-1], y.shape[-1] + 16)
    return torch.cat([y, wide[..., y.shape[-1] :]], dim=-1)[..., : y.shape[-1]]
