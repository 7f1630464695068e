"""Calls functions in a process of its own: Triton decides at import whether kernels are compiled or interpreted."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def _start(folders: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path[:0] = folders


def _call(module: str, function: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(importlib.import_module(module), function)(*arguments)


@contextmanager
def compiling_process(*folders: str | Path) -> Iterator[Callable[..., Any]]:
    """Yields call(module, function, *arguments), run where kernels are compiled and modules of `folders` are found."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start, ([str(f) for f in folders if f],)) as process:
        yield lambda module, function, *arguments: process.submit(_call, module, function, arguments).result()
