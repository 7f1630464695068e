"""An output that its operator does not keep, because who reads it tells it in the backward.

DoRA's magnitudes want the outputs again. Attention keeps its queries and keys rotated, and `rope` can rotate them back:
its backward comes first, and it fills the promise that came with the projection's output. A promise that nobody took or
could fill is no error: the projection computes its output again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NAME = "_fastpeft_promise"


class Promise:
    """That an output will be told in the backward, if somebody has taken it."""

    __slots__ = ("_layout", "taken", "value")

    def __init__(self) -> None:
        self.taken = False
        self.value: Tensor | None = None
        self._layout: tuple[Any, ...] = ()

    def of(self, y: Tensor) -> None:
        """It is of y, dense: whoever gets y, or a view of all of it, finds it there."""
        self._layout = (y.shape, y.stride())
        setattr(y, _NAME, self)

    @staticmethod
    def taken_from(y: Tensor) -> bool:
        """y was handed out with a promise, and somebody has taken it."""
        promise: Promise | None = y.__dict__.get(_NAME)
        return promise is not None and promise.taken

    def fill(self, x: Tensor) -> None:
        """x: what the taker was given, in the strides that it had."""
        self.value = x.as_strided(*self._layout)

    def redeem(self) -> Tensor | None:
        """The output, once; None if it was not told."""
        value, self.value = self.value, None
        return value


def take(x: Tensor) -> Promise | None:
    """The promise of the output that x is, or is a view of, all of it; the caller is to fill it. Else None."""
    y = x if x._base is None else x._base
    promise: Promise | None = y.__dict__.get(_NAME)
    if promise is None or x.numel() != y.numel() or x.storage_offset() != y.storage_offset() or not _dense(x):
        return None
    promise.taken = True
    return promise


def _dense(x: Tensor) -> bool:
    """The elements lie side by side, whatever the order of the dimensions."""
    step = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


class Watch:
    """Tells whether an output was written to after it was made: a tensor of no elements that shares its version."""

    def __init__(self, y: Tensor) -> None:
        self._counter = y.detach()
        self._counter.data = y.new_empty(0)
        self._version = self._counter._version

    @property
    def changed(self) -> bool:
        return self._counter._version != self._version


def unshared(y: Tensor) -> Tensor:
    """y, sharing memory but not the version: a write to either is not held against the other."""
    return torch.ops.aten._unsafe_view(y, y.shape)
