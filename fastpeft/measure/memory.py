"""Peak memory of a stretch of code, on the device where it runs.

CUDA: `torch.cuda.max_memory_allocated` after a reset, so the caching allocator's slack does not count.

CPU: the resident set. Linux keeps its high-water mark per process (`VmHWM`) and lets a process reset its own mark by
writing 5 to /proc/self/clear_refs; where that is refused a thread samples the resident set every 2 ms instead.
Elsewhere `ru_maxrss` is read, which cannot be reset. A resident set also holds whatever the C allocator has not given
back, so the heap is trimmed on entry where glibc can, and each contender belongs in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _max_rss() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: torch.device | str = "cpu") -> int:
    """Memory held now: the resident set on a CPU (0 where the system does not tell), allocated bytes on CUDA."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    return _max_rss()


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    # Some containers accept the write and ignore it.
    return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + (8 << 20)


def _trim_heap() -> None:
    """Give freed memory back to the system, so that reusing it later counts as growth; glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class PeakMemory:
    """Context manager; afterwards `bytes` is the peak, `start` what was held on entry, `growth` their difference.

    `method` names how it was measured: "cuda allocator", "VmHWM", "sampled RSS" or "ru_maxrss".
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self.start = 0
        self.method = ""
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    @property
    def growth(self) -> int:
        """Peak less what was held on entry; never negative."""
        return max(0, self.bytes - self.start)

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm") as statm:
            while not self._stop.wait(0.002):
                statm.seek(0)
                self.bytes = max(self.bytes, int(statm.read().split()[1]) * page)

    def __enter__(self) -> PeakMemory:
        _trim_heap()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.method = "cuda allocator"
        elif not _STATUS.exists():
            self.method = "ru_maxrss"
        elif _reset_high_water_mark():
            self.method = "VmHWM"
        else:
            self.method = "sampled RSS"
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        self.start = self.bytes = resident_bytes(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.method == "cuda allocator":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.method == "VmHWM":
            self.bytes = _status_bytes("VmHWM")
        elif self.method == "ru_maxrss":
            self.bytes = _max_rss()
        elif self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self.bytes = max(self.bytes, resident_bytes(self.device))
