"""The launchers of csrc/cuda on CPU tensors: compiled by nvcc, their kernels executed by the PTX emulator.

nvcc makes host code and PTX (sm_80) of each source; the host code is linked with launches.cpp, which stands in for the
CUDA runtime and hands every launch, with its grid and arguments, to `ptxsim`. So what runs is the code of the wheel,
grids included, except for its assembler and its binding to PyTorch.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

SOURCES = ("dequantize_4bit", "linear_4bit_gemv", "linear_4bit_gemm", "linear_4bit_backward")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]  # fmt: skip


class Weight(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("packed", "small", "absmax", "code")),
        *((n, ctypes.c_void_p) for n in ("nested_code", "nested_absmax", "offset")),
        ("block_shift", ctypes.c_int), ("nested_shift", ctypes.c_int),
        ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
    ]  # fmt: skip


class Rim(ctypes.Structure):
    _fields_ = [
        ("left", ctypes.c_void_p), ("right", ctypes.c_void_p), ("left_dtype", ctypes.c_int32),
        ("right_dtype", ctypes.c_int32), ("left_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64),
        ("rank_stride", ctypes.c_int64), ("r", ctypes.c_int),
    ]  # fmt: skip


def compile_library(folder: Path, toolkit: cuda_toolkit.Toolkit) -> tuple[Path, dict[str, str]]:
    """(the library, PTX by source), unless `folder` has them. nvcc keeps the PTX that it embeds."""
    library = folder / "launches.so"
    if not library.exists():
        _compile(folder, library, toolkit)
    return library, {name: next((folder / name).glob("*.ptx")).read_text() for name in SOURCES}


def _compile(folder: Path, library: Path, toolkit: cuda_toolkit.Toolkit) -> None:
    jobs = {}
    for name in SOURCES:
        keep = folder / name
        keep.mkdir()
        command = [
            str(toolkit.nvcc), "-c", str(ROOT / "csrc/cuda" / f"{name}.cu"), "-o", str(folder / f"{name}.o"),
            "-std=c++17", "-O3", "-gencode", "arch=compute_80,code=compute_80", f"-I{ROOT / 'csrc'}",
            "-Xcompiler", "-fPIC", "--keep", "--keep-dir", str(keep),
        ]  # fmt: skip
        jobs[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for name, job in jobs.items():
        said, _ = job.communicate()
        assert job.returncode == 0, f"{name}.cu: {said[-3000:]}"
        assert "warning" not in said, said
    objects = [str(folder / f"{name}.o") for name in SOURCES]
    stand_in = str(Path(__file__).with_name("launches.cpp"))
    command = ["c++", "-shared", "-fPIC", "-std=c++17", "-o", str(library), stand_in, *objects]
    command += [f"-I{ROOT / 'csrc'}", f"-I{toolkit.root / 'include'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class Emulator:
    """Calls launchers; `log` has a ptxsim report for each launch of the last call, `accesses` its loads and stores."""

    def __init__(self, library: Path, ptx: dict[str, str], ptxsim: Any) -> None:
        self.library = ctypes.CDLL(str(library))
        self.ptxsim = ptxsim
        self.modules = {name: ptxsim.parser.parse(text) for name, text in ptx.items()}
        self.ptx, self.log, self.tensors, self.failure = ptx, [], [], None
        self.sectors = importlib.import_module("sectors")  # of tools/; imports the emulator
        self.accesses: list[list[dict[str, Any]]] = []
        launch = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t,
        )  # fmt: skip
        self.callback = launch(self._launch)
        self.library.on_launch(self.callback)

    def _launch(self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int) -> int:
        try:
            entry = name.decode()
            source = next(s for s, module in self.modules.items() if entry in module.kernels)
            values = []
            for parameter, address in zip(self.modules[source].kernels[entry].params, arguments):
                raw = ctypes.string_at(address, parameter.size)
                values.append(self._pointer(int.from_bytes(raw, "little")) if parameter.size == 8 else raw)
            with self.sectors.watching() as seen:
                report = self.ptxsim.launch(
                    self.ptx[source], tuple(grid[:3]), values, block=tuple(block[:3]), name=entry, shared=shared,
                    racecheck=True,
                )  # fmt: skip
            self.log.append(report)
            self.accesses.append(self._rows(seen))
        except BaseException as error:  # an exception cannot pass through C++
            self.failure = error
            return 1
        return 0

    def _rows(self, seen: dict[tuple[str, str, int], Any]) -> list[dict[str, Any]]:
        """A row of tools/sectors.py for the loads and one for the stores of each argument."""
        kinds = {(kind, argument) for kind, argument, _ in seen}
        return [
            {"kind": kind, "argument": argument}
            | self.sectors.row_of([access for key, access in seen.items() if key[:2] == (kind, argument)])
            for kind, argument in sorted(kinds)
        ]

    def _pointer(self, value: int) -> Any:
        """The tensor's memory from that address on; a number that is no address (a 64-bit size) stays one."""
        for t in self.tensors:
            storage = t.untyped_storage()
            if storage.nbytes() and storage.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
                offset = value - storage.data_ptr()
                return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (1,))
        return value

    def call(self, name: str, *arguments: Any, tensors: list[torch.Tensor | None]) -> int:
        """The launcher's answer. `tensors`: all memory that its kernels may touch."""
        self.log, self.accesses, self.failure = [], [], None
        self.tensors = [t for t in tensors if t is not None]
        passed = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
        result = getattr(self.library, name)(*passed)
        if self.failure is not None:
            raise self.failure
        return result

    # The launchers, argument for argument as ops/nf4.py has the operators; w: a Weight4bit.

    def dequantize(self, w: Any, out: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
        error = self.call(
            "dequantize_4bit", weight(w), matrix(out), ctypes.c_int64(row), ctypes.c_int64(column),
            tensors=[out, *w[:6]],
        )  # fmt: skip
        assert error == 0
        return out

    def gemv(
        self, x: torch.Tensor, w: Any, bias: Any = None, s: Any = None, B: Any = None, sms: int = 4
    ) -> torch.Tensor:
        y = torch.empty(x.shape[0], w.rows, dtype=x.dtype)
        pointer = ctypes.c_void_p(bias.data_ptr() if bias is not None else None)
        error = self.call(
            "linear_4bit_gemv", matrix(x), weight(w), pointer, rim(s, B), matrix(y), sms,
            tensors=[x, y, bias, s, B, *w[:6]],
        )  # fmt: skip
        assert error == 0
        return y

    def gemm(
        self, x: torch.Tensor, w: Any, bias: Any = None, s: Any = None, B: Any = None, sms: int = 4
    ) -> torch.Tensor:
        y = torch.empty(x.shape[0], w.rows, dtype=x.dtype)
        parts = self.library.linear_4bit_parts(ctypes.byref(weight(w)), ctypes.c_int64(x.shape[0]), 0, sms)
        work = torch.full((parts, *y.shape), torch.nan)
        pointer = ctypes.c_void_p(bias.data_ptr() if bias is not None else None)
        error = self.call(
            "linear_4bit_gemm", matrix(x), weight(w), pointer, rim(s, B), matrix(y), ctypes.c_void_p(work.data_ptr()),
            parts, tensors=[x, y, bias, s, B, work, *w[:6]],
        )  # fmt: skip
        assert error == 0
        return y

    def backward(
        self, dy: torch.Tensor, w: Any, ds: Any = None, A: Any = None, sms: int = 4, cores: bool = True
    ) -> torch.Tensor:
        """cores: on tensor cores, else without."""
        dx = torch.empty(dy.shape[0], w.columns, dtype=dy.dtype)
        if cores:
            parts = self.library.linear_4bit_parts(ctypes.byref(weight(w)), ctypes.c_int64(dy.shape[0]), 1, sms)
        else:
            parts = self.library.linear_4bit_backward_parts(ctypes.byref(weight(w)), ctypes.c_int64(dy.shape[0]), sms)
        work = torch.full((parts, *dx.shape), torch.nan)
        error = self.call(
            "linear_4bit_backward_gemm" if cores else "linear_4bit_backward_plain", matrix(dy), weight(w),
            rim(ds, None if A is None else A.t()), matrix(dx), ctypes.c_void_p(work.data_ptr()), parts,
            tensors=[dy, dx, ds, A, work, *w[:6]],
        )  # fmt: skip
        assert error == 0
        return dx


def matrix(t: torch.Tensor) -> Matrix:
    return Matrix(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), DTYPES[t.dtype])


def weight(w: Any) -> Weight:
    nested = w.nested_code is not None
    address = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    return Weight(
        w.packed.data_ptr(), address(w.absmax if nested else None), address(None if nested else w.absmax),
        address(w.code), address(w.nested_code), address(w.nested_absmax), address(w.offset),
        w.blocksize.bit_length() - 1, max(w.nested_blocksize.bit_length() - 1, 0), w.rows, w.columns,
    )  # fmt: skip


def rim(left: torch.Tensor | None, right: torch.Tensor | None) -> Rim:
    if left is None or right is None:
        return Rim(None, None, 0, 0, 0, 0, 0, 0)
    return Rim(
        left.data_ptr(), right.data_ptr(), DTYPES[left.dtype], DTYPES[right.dtype], left.stride(0), right.stride(0),
        right.stride(1), left.shape[1],
    )  # fmt: skip
