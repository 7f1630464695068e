"""Lend a module other tensors in place of its parameters, for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swapped(*loans: tuple[nn.Module, str, Tensor | None]) -> Iterator[None]:
    """Inside, `module.name` is the tensor given; behind, the very parameter it was, whatever happens inside.

    The base weights are never written, so they keep their bits, and autograd sees the tensors' history. FSDP lends
    a module its gathered weights as plain attributes, which stand before its parameters: then those are replaced.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, tensor in loans:
            holder: dict[str, Any] = module.__dict__ if name in module.__dict__ else module._parameters
            kept.append((holder, name, holder[name]))
            holder[name] = tensor
        yield
    finally:
        for holder, name, original in reversed(kept):
            holder[name] = original
