"""Layer inputs outside the accelerator between the forward and the backward.

On a GPU they are copied to pinned host memory on a stream of their own while the next layer computes; two copies may be
under way, so at most two inputs are resident beside the one in use. The backward takes them back in the opposite order:
when one is asked for, the copy of the one before it is started. On a CPU, where host memory is all there is, they go to
a memory-mapped file in the temporary directory (TMPDIR), which the system writes out and drops from memory as it likes.

Buffers are used again in the next step.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

# Smaller tensors (positions, a rotation's angles shared by all layers) stay where they are.
SMALLEST = 1 << 12


class Store:
    """The offloaded inputs of one model. Thread-safe; what autograd drops is free for the next step."""

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[_Buffer]] = {}
        self._lock = threading.Lock()
        self._streams: dict[torch.device, Any] = {}
        self._order: list[weakref.ref[_Away]] = []  # as they left; the backward wants them from the end
        self.bytes = 0  # of all buffers

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copied model has a store of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def hooks(self) -> Any:
        """Hooks for `torch.autograd.graph`: what is saved within leaves the device."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, t: Tensor) -> Any:
        if t.nbytes < SMALLEST or not t.is_floating_point() or t.is_meta:
            return t
        self._wait_for_room(t.device)
        away = _Away(self, t)
        self._order = [ref for ref in self._order if ref() is not None]
        self._order.append(weakref.ref(away))
        return away

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Away):
            return packed
        alive = [away for away in (ref() for ref in self._order) if away is not None]
        place = next((i for i, away in enumerate(alive) if away is packed), 0)
        tensor = packed.back()
        if place:
            alive[place - 1].fetch()
        return tensor

    def _wait_for_room(self, device: torch.device) -> None:
        """Let the computing stream wait until at most one copy is under way."""
        under_way = [a for a in (ref() for ref in self._order) if a is not None and a.leaving is not None]
        for away in under_way[:-1]:
            torch.cuda.current_stream(device).wait_event(away.leaving)
            away.leaving = None

    def stream(self, device: torch.device) -> Any:
        """The side stream of a GPU."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def take(self, t: Tensor) -> _Buffer:
        """A buffer for t, from those that are free or a new one."""
        key = (tuple(t.shape), t.dtype, t.device)
        with self._lock:
            free = self._free.get(key)
            if free:
                return free.pop()
            self.bytes += t.nbytes
        return _Buffer(key)

    def give(self, buffer: _Buffer) -> None:
        """Return a buffer."""
        with self._lock:
            self._free.setdefault(buffer.key, []).append(buffer)


class _Buffer:
    """Memory for one tensor: pinned on the host for a GPU's, else a file of its own, gone when it is closed."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        shape, dtype, device = self.key = key
        self.map: mmap.mmap | None = None
        if device.type == "cuda":
            self.tensor = torch.empty(shape, dtype=dtype, pin_memory=True)
            return
        count = torch.empty(shape, dtype=dtype, device="meta").nbytes
        descriptor, path = tempfile.mkstemp(prefix="fastpeft-offload-")
        try:
            os.unlink(path)
            os.ftruncate(descriptor, count)
            self.map = mmap.mmap(descriptor, count)
        finally:
            os.close(descriptor)
        self.tensor = torch.frombuffer(self.map, dtype=dtype).view(shape)

    def drop_from_memory(self) -> None:
        """Let the system write the pages out and forget them."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)  # of a shared mapping of a file: the contents stay in the file

    def read_ahead(self) -> None:
        """Let the system read the pages in."""
        if self.map is not None and hasattr(mmap, "MADV_WILLNEED"):
            self.map.madvise(mmap.MADV_WILLNEED)


class _Away:
    """A tensor that has left; autograd holds it in the tensor's place."""

    def __init__(self, store: Store, t: Tensor) -> None:
        self._store = store
        self._device = t.device
        self._buffer = store.take(t)
        self._asks = t.requires_grad
        self._here: Tensor | None = None
        self._arrived: Any = None
        self.leaving: Any = None
        if t.is_cuda:
            stream = store.stream(t.device)
            stream.wait_stream(torch.cuda.current_stream(t.device))
            with torch.cuda.stream(stream):
                self._buffer.tensor.copy_(t, non_blocking=True)
            t.record_stream(stream)
            self.leaving = stream.record_event()
        else:
            self._buffer.tensor.copy_(t)
            self._buffer.drop_from_memory()

    def fetch(self) -> None:
        """Start to bring it back."""
        if self._here is not None:
            return
        if self._device.type != "cuda":
            self._buffer.read_ahead()
            return
        stream = self._store.stream(self._device)
        with torch.cuda.stream(stream):  # behind its own copy outwards, on the same stream
            self._here = self._buffer.tensor.to(self._device, non_blocking=True)
            self._arrived = stream.record_event()

    def back(self) -> Tensor:
        """The tensor, on its device."""
        self.fetch()
        here, self._here = self._here, None
        if here is None:
            here = self._buffer.tensor.clone()
            self._buffer.drop_from_memory()
            return here
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        here.record_stream(current)
        return here

    def __del__(self) -> None:
        self._store.give(self._buffer)
