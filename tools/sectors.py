"""What each instruction of an emulated kernel asks of global memory, and the 32-byte sectors that are moved for it.

Imported by coalescing_report.py, which says what the figures mean, and by tests/cuda. Reads the requests of warps from
inside the PTX emulator `ptxsim`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptxsim import loadstore, memory
from ptxsim.machine import Machine

SECTOR = 32
Row = dict[str, Any]
Key = tuple[str, str, int]  # load or store, the argument whose memory it is, line of the PTX


@dataclass
class Access:
    """What the requests of one instruction to the memory of one argument add up to."""

    asked: int = 0
    sectors: int = 0
    least: int = 0  # sectors of runs
    requests: int = 0
    words: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))  # by width: (program, word) of each

    def request(self, program: Any, warp: Any, offset: Any, width: int) -> None:
        """A request of each warp: `width` bytes at `offset`, a lane each."""
        word = offset // width
        each = np.unique((warp << 44) | word)
        _, first, count = np.unique(each >> 44, return_index=True, return_counts=True)
        self.asked += each.size * width
        self.sectors += np.unique((warp << 44) | offset // SECTOR).size
        self.least += int(-(-((each[first] * width) % SECTOR + count * width) // SECTOR).sum())
        self.requests += first.size
        self.words[width].append(np.unique((program << 44) | word))


def row_of(accesses: list[Access]) -> Row:
    """Sums over some instructions of one launch."""
    each = defaultdict(list)
    for access in accesses:
        for width, words in access.words.items():
            each[width] += words
    distinct = []
    for width, words in each.items():
        some = np.unique(np.concatenate(words))[:, None]
        distinct.append((some >> 44 << 48 | (some & (1 << 44) - 1) * width + np.arange(width)).ravel())
    footprint = np.unique(np.concatenate(distinct))
    full = footprint.size / (np.unique(footprint // SECTOR).size * SECTOR)
    asked, moved = sum(a.asked for a in accesses), sum(a.sectors for a in accesses) * SECTOR
    return {
        "requests": sum(a.requests for a in accesses),
        "asked": asked,
        "moved": moved,
        "used": asked / moved,
        "run": sum(a.least for a in accesses) * SECTOR / moved,
        "once": asked / moved / full,
    }


@contextmanager
def watching() -> Iterator[dict[Key, Access]]:
    """Within, the emulator's accesses to global memory are added to the dictionary yielded."""
    log: dict[Key, Access] = defaultdict(Access)
    originals = loadstore.reader, loadstore.writer, Machine.run
    batch = 0

    def run(self: Machine, programs: list[Any]) -> None:
        nonlocal batch
        batch += 1
        originals[2](self, programs)

    def noting(kind: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(m: Machine, inst: Any, space: str, width: int) -> Callable[..., Any]:
            access = make(m, inst, space, width)

            def noted(lanes: Any, address: Any, *raw: Any) -> Any:
                warp, program = (t if lanes is None else t[lanes] for t in (m.warp_of, m.cta_of))
                offset = address - memory.GLOBAL_BASE
                owner = np.searchsorted(m.gmem.starts, offset, side="right") - 1
                for i in np.unique(owner):
                    here = owner == i
                    log[kind, m.gmem.allocs[i].name, inst.line].request(
                        program[here].astype(np.int64) + (batch << 8), warp[here].astype(np.int64), offset[here], width
                    )
                return access(lanes, address, *raw)

            return noted if space == "global" else access

        return made

    loadstore.reader, loadstore.writer = noting("load", originals[0]), noting("store", originals[1])
    Machine.run = run
    try:
        yield log
    finally:
        loadstore.reader, loadstore.writer, Machine.run = originals
