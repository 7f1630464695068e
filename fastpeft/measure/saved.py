"""Bytes that autograd keeps between the forward and the backward.

A saved tensor is counted by its storage, and a storage once, however many views of it are saved: a saved slice of a
large buffer keeps the whole buffer alive. Parameters and buffers are excluded, they exist without a backward.

Only tensors saved through autograd's own mechanism are seen (`save_for_backward` and PyTorch's built-in nodes). A
tensor that an `autograd.Function` hangs on its `ctx` as a plain attribute is invisible here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch
from torch import Tensor, nn


class _Kept:
    """What autograd holds in place of a saved tensor; dies with the graph node that holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address of each storage behind `tensors` to its size in bytes (tensor subclasses by what they wrap).

    On the meta device, where there are no addresses, that of the storage's own record stands for it.
    """
    found: dict[int, int] = {}
    for tensor in _plain(tensors):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr() or storage._cdata] = storage.nbytes()
    return found


def _plain(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors with storage of their own; a wrapper subclass gives up its inner tensors."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain(getattr(tensor, name) for name in names)
        else:
            yield tensor


class SavedActivations:
    """Context manager around a forward; `bytes` is what the graph alive at that moment holds.

        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        print(saved.bytes)
        loss.backward()

    Read `bytes` before the backward: it frees what it has used. Tensors whose node was dropped during the forward
    (an unused branch) are not counted.

    Args:
        model: its parameters and buffers are left out of the count; None leaves nothing out.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    @staticmethod
    def _unpack(kept: _Kept) -> Tensor:
        return kept.tensor

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    @property
    def storages(self) -> dict[int, int]:
        """Address to bytes of every storage kept now, parameters and buffers excluded."""
        found = _storages(kept.tensor for kept in self._kept)
        if self._model is not None:
            for address in _storages([*self._model.parameters(), *self._model.buffers()]):
                found.pop(address, None)
        return found

    @property
    def bytes(self) -> int:
        """Bytes kept now, parameters and buffers excluded."""
        return sum(self.storages.values())
