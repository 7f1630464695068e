"""Which operators a call comes down to."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """The operators that were called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})
