"""Lend a module other tensors in place of its parameters, for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swapped(*loans: tuple[nn.Module, str, Tensor | None]) -> Iterator[None]:
    """Inside, `module.name` is the tensor given; behind, the very parameter it was, whatever happens inside.

    The base weights are never written, so they keep their bits, and autograd sees the tensors' history.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, tensor in loans:
            parameters: dict[str, Any] = module._parameters
            kept.append((parameters, name, parameters[name]))
            parameters[name] = tensor
        yield
    finally:
        for parameters, name, original in reversed(kept):
            parameters[name] = original
