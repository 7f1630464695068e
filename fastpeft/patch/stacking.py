"""Several weights side by side in one memory block, each still an ordinary parameter.

The block is one allocation; each parameter's data becomes a tensor over a *storage of its own* that points into it.
So everything that looks at storages (safetensors, accelerate's `save_model`, `torch.save`, tied-weight detection) sees
separate weights, and only `stacked.tensor()` knows that they are neighbours. The parameter objects stay the same.

Nobody but the weights keeps the block alive: the tensor over the whole block hangs on the first weight's storage, and
is held here by a weak reference. After `model.to(...)`, which gives every parameter new data, the block is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

ALIGNMENT = 16  # bytes: what vectorised loads and cuBLAS want of a matrix's start


def ownable(parameters: Sequence[Parameter]) -> str | None:
    """Why these parameters' memory cannot be laid side by side, or None if it can."""
    first = parameters[0]
    for parameter in parameters:
        if type(parameter) is not Parameter or parameter.is_meta or hasattr(parameter, "ds_id"):
            return "a weight is sharded, offloaded or quantised"
        if parameter.requires_grad:
            return "a weight is trained"
        if parameter.dtype != first.dtype or parameter.device != first.device or parameter.shape[1:] != first.shape[1:]:
            return "the weights differ in dtype, device or width"
        if not parameter.is_contiguous() or parameter.numel() == 0:
            return "a weight is not contiguous"
        if parameter is not parameters[-1] and parameter.numel() * parameter.element_size() % ALIGNMENT:
            return f"a weight does not end on a {ALIGNMENT}-byte boundary"
        if parameter.is_shared() and parameter.device.type == "cpu":
            return "a weight lies in memory shared between processes"
    return None


class Stack:
    """Row blocks of one matrix (or pieces of one vector), each the data of a parameter."""

    __slots__ = ("_block", "_parameters", "_places", "device", "dtype")

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        """Copy the parameters into one new block and point them there. Raises ValueError where `ownable` objects."""
        reason = ownable(parameters)
        if reason is not None:
            raise ValueError(reason)
        self._parameters = tuple(parameters)
        self._lay()

    def _lay(self) -> None:
        first = self._parameters[0]
        rows = sum(parameter.shape[0] for parameter in self._parameters)
        block = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=first.device)
        storage, start, homes = block.untyped_storage(), 0, []
        for parameter in self._parameters:
            stop = start + parameter.numel() * parameter.element_size()
            home = torch.empty(0, dtype=first.dtype, device=first.device)
            home.set_(storage[start:stop], 0, parameter.shape, parameter.stride())
            homes.append(home)
            start = stop
        with torch.no_grad():
            for parameter, home in zip(self._parameters, homes):
                home.copy_(parameter)
        for parameter, home in zip(self._parameters, homes):
            parameter.data = home
        homes[0].untyped_storage()._fastpeft_block = block  # type: ignore[attr-defined]
        self._block: Callable[[], Tensor | None] = weakref.ref(block)
        self._places = tuple(home.data_ptr() for home in homes)
        self.dtype: torch.dtype | None = first.dtype
        self.device: torch.device | None = first.device

    def tensor(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The whole block, if `weights` are the parameters stacked here and still lie in it; else None."""
        block = self._block()
        if block is None:
            return None
        for weight, parameter, place in zip(weights, self._parameters, self._places):
            if weight is not parameter or weight.requires_grad or weight.data_ptr() != place:
                return None
        return block

    def intact(self) -> bool:
        """The parameters still lie side by side."""
        return self.tensor(self._parameters) is not None

    def follow(self) -> bool:
        """Lay the parameters side by side again after `model.to(...)` has moved or cast all of them.

        Only then: data that was replaced on the same device and in the same dtype was replaced by somebody who
        manages it, and is left alone.
        """
        first = self._parameters[0]
        moved = first.device != self.device or first.dtype != self.dtype
        whole = all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in self._parameters)
        if not moved or not whole or ownable(self._parameters) is not None:
            return False
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self._lay()
        return True

    def release(self) -> None:
        """Give every parameter that still lies in the block memory of its own again, bit for bit."""
        block = self._block()
        if block is None:
            return
        for parameter, place in zip(self._parameters, self._places):
            if not parameter.is_meta and parameter.data_ptr() == place:
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)

    def __getstate__(self) -> Any:
        return (self._parameters, self.dtype, self.device)

    def __setstate__(self, state: Any) -> None:
        self._parameters, _, _ = state
        self.dtype, self.device = None, None  # the copies lie apart: `follow` may lay them side by side
        self._places = ()
        self._block = _nothing


def _nothing() -> None:
    """Stands for the dead weak reference of a stack that was copied or unpickled: the copies lie apart."""
    return None
