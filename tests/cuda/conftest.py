"""The toolkit and the emulator, each once a session; tests are skipped where either is missing."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import emulated_cuda
import pytest
from emulated_cuda import cuda_toolkit

FOLDER = os.environ.get("FASTPEFT_PTXSIM", "")


@pytest.fixture(scope="session")
def toolkit() -> Any:
    """A CUDA toolkit of this machine, 12.4 or newer."""
    here = [t for t in cuda_toolkit.candidates() if t.release >= (12, 4)]
    if not here:
        pytest.skip("no CUDA toolkit here (nvcc on PATH or CUDA_HOME)")
    return here[0]


@pytest.fixture(scope="session")
def compiled(toolkit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """(library of the launchers, PTX by source): each source of csrc/cuda compiled once, by one of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return emulated_cuda.compile_library(folder, toolkit)


@pytest.fixture(scope="session")
def ptxsim() -> Any:
    """The PTX emulator."""
    if FOLDER and FOLDER not in sys.path:
        sys.path.append(FOLDER)
    spec = importlib.util.find_spec("ptxsim")
    if spec is None or spec.origin is None:  # a folder of that name without a module in it has no origin
        pytest.skip("the PTX emulator ptxsim is not here (FASTPEFT_PTXSIM=folder)")
    importlib.import_module("ptxsim.parser")
    return importlib.import_module("ptxsim")


@pytest.fixture(scope="session")
def emulator(ptxsim: Any, compiled: tuple[Path, dict[str, str]]) -> emulated_cuda.Emulator:
    """The launchers on CPU tensors."""
    return emulated_cuda.Emulator(*compiled, ptxsim)
