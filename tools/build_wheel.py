"""A wheel of fastpeft with its CUDA kernels compiled in, for one CUDA release; or the CPU wheel.

    python tools/build_wheel.py --cuda 13.0 --arch 8.0,9.0a,10.0,12.0     # fastpeft-<v>+cu130-cp310-abi3-….whl
    python tools/build_wheel.py --cuda none                               # fastpeft-<v>-cp310-abi3-….whl

nvcc of that release is looked for in CUDA_HOME, on PATH and in /usr/local/cuda*; from CUDA 13.0 on it is fetched from
PyPI (nvidia-cuda-nvcc) where it is in none of these. The wheel is built from a source distribution, against the torch
of this environment (any build of it: nothing of torch's CUDA part is linked), and what it holds is read back from it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated

import cuda_toolkit
import typer
from cuda_toolkit import ToolkitError
from rich.console import Console
from rich.text import Text
from typer import Option

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastpeft"
console = Console()
errors = Console(stderr=True)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def toolkit_for(cuda: str, toolkits: Path) -> cuda_toolkit.Toolkit:
    """The toolkit of this machine, else of PyPI (kept in `toolkits`)."""
    try:
        return cuda_toolkit.find(cuda)
    except ToolkitError:
        if cuda_toolkit.release(cuda) < cuda_toolkit.PYPI:
            raise
        return cuda_toolkit.fetch(cuda, toolkits / cuda, lambda text: console.print(Text(text, "dim")))


def build(folder: Path, kind: str, out: Path, environment: dict[str, str]) -> Path:
    """`python -m build` of a source tree, in this environment; the file it made. `kind`: sdist or wheel.

    Raises:
        ToolkitError: it fails; with the end of what it said.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(folder)]
    before = set(out.glob("*"))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if "No module named build" in done.stdout:
        raise ToolkitError("", "the package `build` is missing: pip install build")
    if done.returncode:
        raise ToolkitError("", f"the {kind} could not be built:\n{done.stdout[-4000:]}")
    made = set(out.glob("*")) - before
    return made.pop() if made else max(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"), key=os.path.getmtime)


def holds(wheel: Path, toolkit: cuda_toolkit.Toolkit) -> set[str] | None:
    """The targets that the wheel's CUDA extension has machine code for; None where no cuobjdump is at hand."""
    tool = cuda_toolkit.cuobjdump(toolkit)
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/_cuda." in name]
        if not names:
            return set()
        return cuda_toolkit.machine_code(Path(archive.extract(names[0], folder)), tool)


def make(cuda: str, arch: str, out: Path, toolkits: Path) -> Path:
    """Build the wheel into `out` and check it.

    Raises:
        ToolkitError: an option cannot be followed, or the wheel does not hold what was asked for.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTPEFT_CUDA")}
    environment["FASTPEFT_BUILD"] = "1"
    toolkit, targets = None, []
    if cuda != "none":
        cuda_toolkit.release(cuda)
        targets = cuda_toolkit.archs(arch)
        toolkit = toolkit_for(cuda, toolkits)
        cuda_toolkit.check(toolkit, targets)
        console.print(Text.assemble(("nvcc ", "dim"), toolkit.version, (f"  {toolkit.root} ({toolkit.where})", "dim")))
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, console.status("source distribution") as status:
        source = build(ROOT, "sdist", Path(scratch), environment)
        with tarfile.open(source) as archive:
            archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        tree = Path(scratch, source.name.removesuffix(".tar.gz"))
        status.update("compiling" + (f" for {', '.join(t.text for t in targets)}" if targets else ""))
        if toolkit is not None:
            environment |= {"CUDA_HOME": str(toolkit.root), "FASTPEFT_CUDA": cuda, "FASTPEFT_CUDA_ARCH": arch}
        wheel = build(tree, "wheel", out.resolve(), environment)
    if toolkit is not None:
        found, wanted = holds(wheel, toolkit), {target.digits for target in targets}
        if found is None:
            console.print(Text("! no cuobjdump here: what the wheel holds was not read back", "yellow"))
        elif found != wanted:
            raise ToolkitError("arch", f"{wheel.name} holds machine code for {sorted(found)}, not for {sorted(wanted)}")
        else:
            console.print(Text.assemble(("machine code  ", "dim"), ", ".join(f"sm_{t.digits}" for t in targets)))
    size = wheel.stat().st_size / 2**20
    seconds = time.perf_counter() - start
    console.print(Text.assemble(("✓ ", "green"), str(wheel), (f"  {size:.1f} MiB in {seconds:.0f} s", "dim")))
    return wheel


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    cuda: Annotated[str, Option(help="CUDA release, e.g. 13.0; none for the CPU wheel.", show_default=False)],
    arch: Annotated[
        str, Option(help="Compute capabilities, with commas; +PTX after one for GPUs that come after it.")
    ] = cuda_toolkit.DEFAULT_ARCHS,
    out: Annotated[Path, Option(help="Folder the wheel is written to.")] = Path("dist"),
    toolkits: Annotated[Path, Option(help="Folder that toolkits of PyPI are kept in.")] = CACHE / "cuda",
) -> None:
    """Build a wheel of fastpeft for one CUDA release (or for CPUs only) and read back what it holds."""
    try:
        make(cuda, arch, out, toolkits)
    except ToolkitError as error:
        option = f"--{error.option}: " if error.option else ""
        errors.print(Text.assemble(("error: ", "bold red"), option, str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
