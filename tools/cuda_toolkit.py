"""Finding a CUDA toolkit and compiling csrc/cuda with it; used by setup.py and tools/build_wheel.py.

Only the standard library, since setup.py imports it in a build environment that may hold nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = "8.0,9.0a,10.0,12.0"
OLDEST = (7, 5)  # mma.sync with 16-bit operands begins here, and so does CUDA 13
# Toolkits of PyPI begin with CUDA 13: nvcc there is an ordinary wheel beside those it cannot work without.
PYPI = (13, 0)
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")


class ToolkitError(RuntimeError):
    """An option that cannot be followed: what was wrong and what to do. `option`: "cuda", "arch", or "" for none."""

    def __init__(self, option: str, text: str) -> None:
        super().__init__(text)
        self.option = option


@dataclass(frozen=True)
class Arch:
    """One target: machine code for `number` ("9.0a"), and PTX besides for what comes after it."""

    number: str
    ptx: bool = False

    @property
    def digits(self) -> str:
        """As the compiler writes it: "90a"."""
        return self.number.replace(".", "")

    @property
    def text(self) -> str:
        """As it was asked for: "9.0a", "12.0+PTX"."""
        return self.number + ("+PTX" if self.ptx else "")

    def flags(self) -> list[str]:
        """nvcc's option for it."""
        real, virtual = f"sm_{self.digits}", f"compute_{self.digits}"
        return ["-gencode", f"arch={virtual},code=" + (f"[{real},{virtual}]" if self.ptx else real)]


def archs(text: str) -> list[Arch]:
    """The targets that "8.0,9.0a,12.0+PTX" names, in order.

    Raises:
        ToolkitError: nothing named, an entry of another form, one twice, or one older than 7.5.
    """
    found: dict[str, Arch] = {}
    for part in (p for p in re.split(r"[,; ]+", text.strip()) if p):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part, re.IGNORECASE)
        if match is None:
            raise ToolkitError(
                "arch",
                f"{part!r} is not a compute capability; write e.g. {DEFAULT_ARCHS}, with +PTX after one that "
                "later GPUs are to be compiled for by the driver",
            )
        if (int(match[1]), int(match[2])) < OLDEST:
            raise ToolkitError(
                "arch", f"{part} is older than 7.5, the first that the kernels are written for; leave it out"
            )
        number = f"{match[1]}.{match[2]}{match[3].lower()}"
        if number in found:
            raise ToolkitError("arch", f"{number} is given twice in {text!r}; give it once")
        found[number] = Arch(number, bool(match[4]))
    if not found:
        raise ToolkitError("arch", f"nothing in {text!r}; name compute capabilities, e.g. {DEFAULT_ARCHS}")
    return list(found.values())


def release(text: str) -> tuple[int, int]:
    """(13, 0) of "13.0". Raises ToolkitError on another form."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    if match is None:
        raise ToolkitError("cuda", f"{text!r} is not a CUDA release; write it as 13.0")
    return int(match[1]), int(match[2])


def label(cuda: str) -> str:
    """The local version label of a wheel for that release: "cu130"."""
    return "cu{}{}".format(*release(cuda))


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, what its nvcc says it is, and how it was found."""

    root: Path
    version: str  # 13.0.88
    where: str

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    def library(self, name: str) -> Path:
        """The path of a static library. Raises ToolkitError where the toolkit lacks it."""
        folders = ("lib64", "lib", "lib/x64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        for folder in folders:
            if (path := self.root / folder / name).exists():
                return path
        raise ToolkitError(
            "cuda",
            f"the toolkit in {self.root} has no {name}; install its runtime's development files (the package "
            "nvidia-cuda-runtime of PyPI, cuda-cudart-dev of NVIDIA's Debian repository)",
        )

    def supported(self) -> set[str]:
        """Targets its compiler has: {"75", "90", "90a", …}."""
        done = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True)
        codes = set(re.findall(r"sm_(\w+)", done.stdout))
        # --list-gpu-code leaves out the architecture-specific variants, which targets from 9.0 on have.
        numbers = {int(code) for code in codes if code.isdigit()}
        return codes | {f"{n}a" for n in numbers if n >= 90} | {f"{n}f" for n in numbers if n >= 100}


def inspect(root: Path, where: str) -> Toolkit | None:
    """The toolkit in `root`, or None if there is no nvcc that answers."""
    nvcc = root / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")
    if not nvcc.exists():
        return None
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return Toolkit(root, match[1], where) if match else None


def _root_of(nvcc: str) -> Path:
    """The toolkit's folder, asked of nvcc itself: what lies on PATH may be a link or a wrapper."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60)
    match = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else Path(nvcc).resolve().parents[1]


def candidates() -> list[Toolkit]:
    """The toolkits of this machine: CUDA_HOME, nvcc on PATH, the usual folders; each once, in that order."""
    found: list[Toolkit | None] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            found.append(inspect(Path(os.environ[variable]).resolve(), variable))
    if nvcc := shutil.which("nvcc"):
        found.append(inspect(_root_of(nvcc), "nvcc on PATH"))
    found += [inspect(root.resolve(), str(root)) for root in sorted(Path("/usr/local").glob("cuda*"), reverse=True)]
    return list({toolkit.root: toolkit for toolkit in reversed(found) if toolkit}.values())[::-1]


def find(cuda: str) -> Toolkit:
    """The toolkit of this machine whose release is `cuda`.

    Raises:
        ToolkitError: there is none; says which there are.
    """
    wanted, here = release(cuda), candidates()
    for toolkit in here:
        if toolkit.release == wanted:
            return toolkit
    others = ", ".join(f"{t.version} ({t.where})" for t in here) or "none"
    pypi = " tools/build_wheel.py fetches it from PyPI by itself." if wanted >= PYPI else ""
    raise ToolkitError(
        "cuda", f"no CUDA {cuda} toolkit here (found: {others}). Install it and set CUDA_HOME to its folder.{pypi}"
    )


def fetch(cuda: str, folder: Path, say: Callable[[str], None]) -> Toolkit:
    """CUDA `cuda` from PyPI (nvidia-cuda-nvcc and what it needs), installed into `folder` and kept there.

    Raises:
        ToolkitError: the release is not on PyPI, or pip fails.
    """
    major, _ = wanted = release(cuda)
    if wanted < PYPI:
        raise ToolkitError(
            "cuda",
            f"PyPI has no nvcc for CUDA {cuda} (they begin with {PYPI[0]}.{PYPI[1]}); install the toolkit from "
            "https://developer.nvidia.com/cuda-toolkit-archive and set CUDA_HOME to its folder",
        )
    root = folder / "nvidia" / f"cu{major}"
    ready = inspect(root, "PyPI")
    if ready is not None and ready.release == wanted:
        return ready
    # cuda_fp16.h includes nv/target, which comes with CCCL; CCCL's own releases do not follow the toolkit's.
    names = [*(f"{name}=={cuda}.*" for name in PACKAGES), f"nvidia-cuda-cccl>={major},<={cuda}.9999"]
    say(f"CUDA {cuda} is not on this machine: fetching {', '.join(names)} from PyPI")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--target", str(folder), *names], capture_output=True, text=True)
    if done.returncode:
        reason = "\n".join(line for line in done.stderr.splitlines() if line.startswith("ERROR")) or done.stderr[-800:]
        raise ToolkitError("cuda", f"CUDA {cuda} cannot be fetched from PyPI. pip said:\n{reason}")
    for tool in (root / "bin").rglob("*"):  # pip keeps no mode of files below a package
        if tool.is_file():
            tool.chmod(0o755)
    if (cicc := root / "nvvm" / "bin" / "cicc").exists():
        cicc.chmod(0o755)
    toolkit = inspect(root, "PyPI")
    if toolkit is None:
        raise ToolkitError("cuda", f"what PyPI has of CUDA {cuda} holds no nvcc in {root}; install the toolkit instead")
    return toolkit


def check(toolkit: Toolkit, targets: Sequence[Arch]) -> None:
    """ToolkitError if the toolkit cannot compile for one of `targets`."""
    has = toolkit.supported()
    for arch in targets:
        if arch.digits not in has:
            known = ", ".join(f"{int(c) // 10}.{int(c) % 10}" for c in sorted(filter(str.isdigit, has), key=int))
            raise ToolkitError("arch", f"nvcc {toolkit.version} does not know {arch.number}; it has {known}")


def compile_command(
    toolkit: Toolkit, source: str, target: str, arch_list: Sequence[Arch], includes: Sequence[str], threads: int
) -> list[str]:
    """nvcc's command line for one source of csrc/cuda."""
    return [
        str(toolkit.nvcc), "-c", source, "-o", target, "-std=c++17", "-O3", "--threads", str(threads),
        "-Xcompiler", "-fPIC,-fvisibility=hidden", *(flag for arch in arch_list for flag in arch.flags()),
        *(f"-I{folder}" for folder in includes),
    ]  # fmt: skip


def cuobjdump(toolkit: Toolkit | None = None) -> Path | None:
    """The program that lists what a binary holds: the toolkit's, else the one Triton ships, else none."""
    if toolkit and (tool := toolkit.root / "bin" / "cuobjdump").exists():
        return tool
    if tool := shutil.which("cuobjdump"):
        return Path(tool)
    for folder in sys.path:
        if (tool := Path(folder, "triton/backends/nvidia/bin/cuobjdump")).exists():
            return tool
    return None


def machine_code(library: Path, tool: Path) -> set[str]:
    """The targets that `library` holds machine code for: {"80", "90a"}."""
    said = subprocess.run([tool, "--list-elf", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\.sm_(\w+)\.cubin", said))
