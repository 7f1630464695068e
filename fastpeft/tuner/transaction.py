"""Changing a model all or nothing.

Adding an adapter replaces hundreds of modules, and anything may fail half-way: an unsupported layer type, a tensor of
the wrong shape. Whoever changes the model writes down how to undo it; if an exception leaves the outermost
`transaction()`, the model is as it was. Transactions nest: an inner one undoes its own part, so that loading (outer)
takes back what injecting (inner) has completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_MISSING = object()


class Undo:
    """What has been done so far, as the list of its inverses."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def push(self, step: Callable[[], Any]) -> None:
        """Remember a function that takes back the change which was just made."""
        self._steps.append(step)

    def attributes(self, obj: Any) -> None:
        """Remember all attributes of a plain object (a config), to be called before it is changed."""
        self.mapping(obj.__dict__)

    def attribute(self, obj: Any, name: str) -> None:
        """Remember one attribute, or its absence, to be called before it is changed."""
        attributes = obj.__dict__
        before = attributes.get(name, _MISSING)
        self.push(lambda: attributes.pop(name, None) if before is _MISSING else attributes.update({name: before}))

    def mapping(self, mapping: dict[Any, Any]) -> None:
        """Remember the entries of a dictionary, to be called before it is changed."""
        before = dict(mapping)
        self.push(lambda: mapping.update(before))
        self.push(mapping.clear)

    def replace_module(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put `new` in the place of `parent.name`."""
        old = parent._modules[name] if name in parent._modules else getattr(parent, name)
        setattr(parent, name, new)
        self.push(lambda: setattr(parent, name, old))

    def requires_grad(self, parameters: list[tuple[nn.Parameter, bool]]) -> None:
        """Remember which parameters were trainable."""

        def restore() -> None:
            for parameter, flag in parameters:
                parameter.requires_grad = flag

        self.push(restore)

    def savepoint(self) -> int:
        return len(self._steps)

    def rollback(self, savepoint: int) -> None:
        while len(self._steps) > savepoint:
            self._steps.pop()()


_current: ContextVar[Undo | None] = ContextVar("fastpeft_transaction", default=None)


@contextmanager
def transaction() -> Iterator[Undo]:
    """A block whose changes to a model are undone if an exception leaves it, or leaves a transaction around it."""
    outer = _current.get()
    undo = outer or Undo()
    savepoint = undo.savepoint()
    token = None if outer else _current.set(undo)
    try:
        yield undo
    except BaseException:
        undo.rollback(savepoint)
        raise
    finally:
        if token is not None:
            _current.reset(token)
