"""Buffers by adapter name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class BufferDict(nn.Module):
    """A dict of buffers; saved with the model if `persistent`."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.persistent = persistent

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._buffers[name] = value
        if not self.persistent:
            self._non_persistent_buffers_set.add(name)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Any:
        """The adapters' names."""
        return self._buffers.keys()

    def items(self) -> Any:
        """(adapter name, buffer)."""
        return self._buffers.items()
