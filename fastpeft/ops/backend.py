"""Which implementation an operator runs on, and how an operator is declared.

Backends:

    reference  plain PyTorch, any device
    cpu        C++ kernels (csrc/), AVX-512, AVX2 or scalar, when the extension `fastpeft._C` was built
    triton     Triton kernels (fastpeft.kernels): GPUs, or CPU tensors under Triton's interpreter
    cuda       CUDA C++ kernels (csrc/cuda/), in wheels built for a CUDA release: the extension `fastpeft._cuda`

`auto` (no backend forced) goes by the tensors' device: C++ for CPU tensors; for CUDA tensors CUDA C++ where the
operator has such a kernel that takes these operands, else Triton; reference for everything else and wherever the faster
one is missing. `FASTPEFT_BACKEND=reference` or `with backend("reference"):` forces one for the whole process; a forced
backend that cannot run raises `BackendError`.

Each operator exists three times with one schema, so that a forced backend is an operator like any other (to
torch.compile, to the profiler): `torch.ops.fastpeft.<name>` dispatches by device, `torch.ops.fastpeft_reference.<name>`
and `torch.ops.fastpeft_triton.<name>` are the forced ones. A backward runs on the backend of its forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ..errors import BackendError

NAMES = ("reference", "cpu", "triton", "cuda")
_NAMESPACES = {"auto": "fastpeft", "reference": "fastpeft_reference", "triton": "fastpeft_triton"}
_LIBRARIES = {name: torch.library.Library(namespace, "DEF") for name, namespace in _NAMESPACES.items()}

# OPS["auto"].lora_shrink is torch.ops.fastpeft.lora_shrink.default, and so on.
OPS: dict[str, Any] = {name: SimpleNamespace() for name in _NAMESPACES}

_forced: str | None = None
_extension: ModuleType | None = None
_reason = ""
_cuda: ModuleType | None = None
_cuda_reason = ""
_triton_for_cuda: dict[str, Callable[..., Any]] = {}  # what CUDA tensors take where no CUDA kernel is registered
_in_cuda_extension: set[str] = set()
_initialised = False


def route(device: torch.device) -> str:
    """The key of `OPS` that operators on tensors of `device` use now: "auto", "reference" or "triton"."""
    if _forced is None:
        return "auto"
    if _forced == "cpu":
        if device.type != "cpu":
            raise BackendError(f"backend 'cpu' is forced but the input is on {device}; use backend 'auto' there")
        return "auto"
    if _forced == "cuda":
        if device.type != "cuda":
            raise BackendError(f"backend 'cuda' is forced but the input is on {device}; use backend 'auto' there")
        return "auto"
    return _forced


def native_calls() -> bool:
    """Whether operators on CPU tensors run on the C++ kernels now."""
    return _extension is not None and (_forced is None or _forced == "cpu")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend within a `with` block, for the whole process: one of `NAMES`; "auto" forces none.

    Raises BackendError if the name is unknown or the backend cannot run here.
    """
    global _forced
    before = _forced
    _forced = _checked(name)
    try:
        yield
    finally:
        _forced = before


def available_backends() -> list[str]:
    """The backends that can run here, e.g. ["reference", "cpu"]."""
    return [name for name, reason in backend_report().items() if not reason.startswith("not available")]


def backend_report() -> dict[str, str]:
    """One line for each backend: what it would run, or "not available: " and why and what to do."""
    return {
        "reference": f"plain PyTorch {torch.__version__}",
        "cpu": _cpu_line(),
        "triton": _triton_line(),
        "cuda": _cuda_line(),
    }


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: str | None = None,
) -> None:
    """Declare the operator `name` in every backend's namespace.

    schema: arguments and returns, e.g. "(Tensor x) -> Tensor". reference: runs on any device. fake: shapes and dtypes.
    kernels: the module below fastpeft.kernels that has the Triton launcher, a function of the same name and arguments.
    """
    plain = _without_autocast(reference)
    triton = functools.partial(_launch, kernels, name) if kernels else plain
    for key, library in _LIBRARIES.items():
        library.define(name + schema)
        library.impl(name, triton if key == "triton" else plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACES[key]}::{name}", fake, lib=library)
        setattr(OPS[key], name, getattr(getattr(torch.ops, _NAMESPACES[key]), name).default)
    if kernels and _triton_spec() is not None:
        _triton_for_cuda[name] = triton
        if _initialised:
            _fill_in_for_cuda()


def cpu_extension() -> ModuleType | None:
    """The compiled module `fastpeft._C`, or None where the package was installed without it."""
    return _extension


def cuda_extension() -> ModuleType | None:
    """The compiled module `fastpeft._cuda`, or None where the wheel has none or it does not load."""
    return _cuda


def in_cuda_extension(name: str) -> bool:
    """Whether the operator's implementation for CUDA tensors is the extension's."""
    return name in _in_cuda_extension


def autocast_enabled(device: torch.device) -> bool:
    """torch.is_autocast_enabled, for devices too that autocast does not know."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def exact(device: torch.device) -> Any:
    """Autocast off: what is to be cast has been. It would turn fp32 accumulation into bf16."""
    if autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that chooses its own precision."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with exact(next(a for a in args if isinstance(a, torch.Tensor)).device):
            return function(*args)

    return wrapped


def _launch(module: str, name: str, *args: Any) -> Any:
    launcher = getattr(importlib.import_module(f"fastpeft.kernels.{module}"), name)
    try:
        return launcher(*args)
    except RuntimeError as error:
        if "active driver" not in str(error):
            raise
        raise BackendError(
            f"backend 'triton' cannot run {name}: no GPU driver is active ({error}). Set TRITON_INTERPRET=1 before the "
            "first import of triton to run it in the interpreter, or use backend 'auto'."
        ) from error


def _checked(name: str) -> str | None:
    if name == "auto":
        return None
    if name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(NAMES)}")
    if name == "cpu" and cpu_extension() is None:
        raise BackendError(f"backend 'cpu': {_cpu_line()}")
    if name == "triton" and _triton_spec() is None:
        raise BackendError(f"backend 'triton': {_triton_line()}")
    if name == "cuda" and (line := _cuda_line()).startswith("not available"):
        raise BackendError(f"backend 'cuda': {line}")
    return name


@functools.cache
def _triton_spec() -> Any:
    return importlib.util.find_spec("triton")


def _triton_line() -> str:
    if _triton_spec() is None:
        return "not available: triton is not installed (pip install triton)"
    if torch.cuda.is_available():
        return f"Triton on {torch.cuda.get_device_name()}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter (TRITON_INTERPRET=1)"
    return "not available: no GPU; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"


def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension and a reason for its absence. Loading it registers its kernels for the CPU dispatch key."""
    if importlib.util.find_spec("fastpeft._C") is None:
        return None, (
            "not available: fastpeft was installed without its C++ extension; install torch and a C++17 compiler, then "
            "reinstall with `FASTPEFT_BUILD=1 pip install --no-build-isolation --force-reinstall --no-deps fastpeft`"
        )
    try:
        extension = importlib.import_module("fastpeft._C")
    except ImportError as error:
        reason = f"not available: the extension does not load into torch {torch.__version__}: {error}"
        warnings.warn(f"fastpeft backend 'cpu' is {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    wanted = os.environ.get("FASTPEFT_CPU_ISA")
    if wanted:
        try:
            extension.select_isa(wanted)
        except ValueError as error:
            raise BackendError(f"FASTPEFT_CPU_ISA: {error}") from None
    return extension, ""


def _cpu_line() -> str:
    return _reason if _extension is None else f"C++ kernels, {_extension.isa()}"


def _load_cuda_extension() -> tuple[ModuleType | None, str]:
    """The extension and a reason for its absence. Loading it, driver or not, registers its kernels for CUDA tensors."""
    if importlib.util.find_spec("fastpeft._cuda") is None:
        return None, (
            "not available: this build of fastpeft has no CUDA kernels (Triton's are used instead); "
            "tools/build_wheel.py makes a wheel with them for a CUDA release"
        )
    if torch.version.hip is not None:
        return None, "not available: this PyTorch is for ROCm"
    try:
        extension = importlib.import_module("fastpeft._cuda")
    except ImportError as error:
        reason = f"not available: the extension does not load into torch {torch.__version__}: {error}"
        warnings.warn(f"fastpeft backend 'cuda' is {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    if _triton_spec() is not None:
        extension.fall_back_to(_NAMESPACES["triton"])
    return extension, ""


def _cuda_line() -> str:
    if _cuda is None:
        return _cuda_reason
    built = "CUDA {cuda} kernels for {archs}".format(**_cuda.build_info())
    if torch.version.cuda is None:
        return f"not available: torch {torch.__version__} is a CPU build ({built} are installed)"
    reason = _cuda.why_no_driver()
    if reason is None:
        reasons = [_cuda.why_not(i) for i in range(torch.cuda.device_count())]
        if None in reasons:
            return f"{built}, on {torch.cuda.get_device_name(reasons.index(None))}"
        reason = reasons[0] if reasons else "torch finds no GPU"
    return f"not available: {reason} ({built} are installed)"


def _fill_in_for_cuda() -> None:
    """Triton's launchers for CUDA tensors, except where the extension has registered a kernel."""
    while _triton_for_cuda:
        name, triton = _triton_for_cuda.popitem()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpeft::{name}", "CUDA"):
            _in_cuda_extension.add(name)
        else:
            _LIBRARIES["auto"].impl(name, triton, "CUDA")


def initialise() -> None:
    """Load the extensions and honour FASTPEFT_BACKEND. Called once, when the package's operators are defined."""
    global _extension, _forced, _reason, _cuda, _cuda_reason, _initialised
    _extension, _reason = _load_extension()
    _cuda, _cuda_reason = _load_cuda_extension()
    _initialised = True
    _fill_in_for_cuda()
    _forced = _checked(os.environ.get("FASTPEFT_BACKEND") or "auto")
