"""The table of decisions: which path an operator takes, as data that was measured and can be measured again.

`decisions.json` in this package is the default. `fastpeft bench --calibrate` measures on this machine and writes a file
of the same form to the user's cache (`FASTPEFT_CACHE`, else `$XDG_CACHE_HOME/fastpeft`, else `~/.cache/fastpeft`),
which then takes its place. A section that is not in it, because the version that wrote it had none, is the default's.

    gemm.cpu.float32                    rows: from so many rows of its left operand on a product is ours, null: never
                                        processors: of which makers; null: of all
    attention.cpu.float32               tokens: from so many queries on attention is ours, null: never
                                        processors: of which makers; null: of all
    linear_rows.cpu.<dtype>             rows: up to so many rows of the input a linear layer's product is `linear_rows`
                                        processors: of which makers; null: of all
    linear_4bit.<device type>.<dtype>   forward, backward: up to so many rows of the input the 4-bit weight is decoded
                                        where it is used; above, by panels for the vendor's product
                                        panel_bytes: of the scratch that a panel is decoded into, at most 4 MiB
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backend import cpu_extension

MAX_PANEL_BYTES = 4 << 20
_SECTIONS = ("gemm", "attention", "linear_rows", "linear_4bit")


class Rows(NamedTuple):
    """One entry of `linear_4bit`."""

    forward: int
    backward: int
    panel_bytes: int


_OTHERS = Rows(0, 0, MAX_PANEL_BYTES)
_rows: dict[tuple[str, torch.dtype], Rows] = {}
_forced: list[Rows] = []


def path_of_user() -> Path:
    """Where `fastpeft bench --calibrate` writes."""
    cache = os.environ.get("FASTPEFT_CACHE")
    if cache is None:
        root = os.environ.get("XDG_CACHE_HOME")
        cache = str((Path(root) if root else Path.home() / ".cache") / "fastpeft")
    return Path(cache) / "decisions.json"


@functools.cache
def load() -> tuple[dict[str, Any], str]:
    """The table in force and the file it is from. Raises ValueError, with the file's name, if that cannot be read."""
    path, shipped = path_of_user(), Path(__file__).with_name("decisions.json")
    if not path.is_file():
        return _read(shipped, {}), str(shipped)
    default = _read(shipped, {})
    return _read(path, {name: default[name] for name in _SECTIONS}), str(path)


def _read(path: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """The table in a file. sections: what stands for those that it lacks."""
    try:
        table = {**sections, **json.loads(path.read_text(encoding="utf-8"))}
        _check_table(table)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the table of decisions {path} cannot be used ({type(error).__name__}: {error}); delete it, or write it "
            "anew with `fastpeft bench --calibrate`"
        ) from error
    return table


def save(table: dict[str, Any]) -> Path:
    """Write a table to the user's cache and use it from now on. Returns the file."""
    _check_table(table)
    path = path_of_user()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    forget()
    return path


@functools.cache
def gemm_rows() -> float:
    """From how many rows of its left operand on a product of fp32 matrices on the CPU is ours; infinity: never."""
    return _least("gemm", "rows")


@functools.cache
def attention_tokens() -> float:
    """From how many queries on attention in fp32 on the CPU is ours; infinity: never."""
    return _least("attention", "tokens")


def _least(section: str, limit: str) -> float:
    entry = load()[0][section]["cpu"]["float32"]
    return math.inf if entry[limit] is None or not _for_this_processor(entry) else entry[limit]


@functools.cache
def linear_rows(dtype: torch.dtype) -> int:
    """Up to how many rows of its input a linear layer's product on the CPU is `linear_rows`; 0: never."""
    entry = load()[0]["linear_rows"]["cpu"].get(str(dtype).removeprefix("torch."))
    return entry["rows"] if entry is not None and _for_this_processor(entry) else 0


def _for_this_processor(entry: dict[str, Any]) -> bool:
    """Vector kernels run here, and the entry is of this processor's maker."""
    extension = cpu_extension()
    if extension is None or extension.isa() == "scalar":
        return False
    return entry["processors"] is None or extension.maker() in entry["processors"]


def forget() -> None:
    """Read the table anew at the next question."""
    load.cache_clear()
    gemm_rows.cache_clear()
    attention_tokens.cache_clear()
    linear_rows.cache_clear()
    _rows.clear()


def linear_4bit(device_type: str, dtype: torch.dtype) -> Rows:
    """The entry for a device type and dtype; one that the table does not have decodes by panels only."""
    if _forced:
        return _forced[-1]
    if not _rows:
        ready()
    return _rows.get((device_type, dtype), _OTHERS)


@contextlib.contextmanager
def forced(rows: Rows) -> Iterator[None]:
    """Within it every question has this answer: for measuring."""
    _forced.append(rows)
    try:
        yield
    finally:
        _forced.pop()


def in_force() -> str:
    """Which table is used and what it was measured on, in a line. Raises ValueError as `load`."""
    table, source = load()
    which = "calibrated" if Path(source) == path_of_user() else "shipped"
    return f"{which}: {table.get('measured', 'measured nobody says where')}"


def ready() -> None:
    """Read the table, so that torch.compile finds a dictionary and not a file."""
    if not _rows:
        for device_type, of_device in load()[0]["linear_4bit"].items():
            for name, entry in of_device.items():
                _rows[device_type, getattr(torch, name)] = _checked(entry)


def _check_table(table: dict[str, Any]) -> None:
    for of_device in table["linear_4bit"].values():
        for entry in of_device.values():
            _checked(entry)
    for name, limit in (("gemm", "rows"), ("attention", "tokens")):
        entry = table[name]["cpu"]["float32"]
        if entry[limit] is not None:
            _check_number(entry, limit)
        _check_makers(entry)
    for entry in table["linear_rows"]["cpu"].values():
        _check_number(entry, "rows")
        _check_makers(entry)


def _check_number(entry: dict[str, Any], name: str) -> None:
    if not isinstance(entry[name], int):
        raise ValueError(f"{name} of {entry} is not a number")


def _check_makers(entry: dict[str, Any]) -> None:
    if not (entry["processors"] is None or isinstance(entry["processors"], list)):
        raise ValueError(f"processors of {entry} is neither a list of makers nor null")


def _checked(entry: dict[str, Any]) -> Rows:
    rows = Rows(*(int(entry[name]) for name in Rows._fields))
    if rows.forward < 0 or rows.backward < 0 or not 0 < rows.panel_bytes <= MAX_PANEL_BYTES:
        raise ValueError(f"{entry} is out of range: rows from 0, panel_bytes from 1 to {MAX_PANEL_BYTES}")
    return rows
