"""Lend a module other tensors in place of its parameters, for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


@contextmanager
def swapped(*loans: tuple[nn.Module, str, Tensor | None]) -> Iterator[None]:
    """Inside, `module.name` is the tensor given; behind, the very parameter it was, whatever happens inside.

    The base weights are never written, so they keep their bits, and autograd sees the tensors' history. FSDP lends
    a module its gathered weights as plain attributes, which stand before its parameters: then those are replaced. Of
    a parameter with a parametrization (`torch.nn.utils.parametrize`) the tensor is what the parametrization yields.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    parametrized: list[Any] = []
    try:
        for module, name, tensor in loans:
            if is_parametrized(module, name):
                chain: Any = module.parametrizations[name]  # type: ignore[index]
                chain.append(_Yield(tensor))
                parametrized.append(chain)
                continue
            holder: dict[str, Any] = module.__dict__ if name in module.__dict__ else module._parameters
            kept.append((holder, name, holder[name]))
            holder[name] = tensor
        yield
    finally:
        for holder, name, original in reversed(kept):
            holder[name] = original
        for chain in parametrized:
            del chain[-1]


class _Yield(nn.Module):
    """The last link of a parametrization: what it is given, it drops."""

    def __init__(self, tensor: Tensor | None) -> None:
        super().__init__()
        self.__dict__["tensor"] = tensor  # not a parameter of this module

    def forward(self, dropped: Tensor) -> Tensor | None:
        return self.__dict__["tensor"]
