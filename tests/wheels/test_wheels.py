"""tools/build_wheel.py: what it refuses; the wheel it makes: its name, its machine code, that it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTPEFT_")} | {"COLUMNS": "200"} | environment
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env)


def test_archs_are_read_as_they_are_written():
    assert [a.digits for a in cuda_toolkit.archs("8.0, 9.0a;10.0 12.0+PTX")] == ["80", "90a", "100", "120"]
    assert cuda_toolkit.archs("12.0+PTX")[0].flags() == ["-gencode", "arch=compute_120,code=[sm_120,compute_120]"]
    assert cuda_toolkit.label("13.0") == "cu130"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--cuda", "13"], "--cuda: '13' is not a CUDA release; write it as 13.0"),
        (["--cuda", "11.3", "--arch", "8.0"], "--cuda: no CUDA 11.3 toolkit here"),
        (["--cuda", "13.0", "--arch", "80"], "--arch: '80' is not a compute capability"),
        (["--cuda", "13.0", "--arch", "7.0"], "--arch: 7.0 is older than 7.5"),
        (["--cuda", "13.0", "--arch", "8.0,8.0"], "--arch: 8.0 is given twice"),
    ],
)
def test_what_cannot_be_followed_is_explained(options, said, tmp_path):
    done = run(sys.executable, ROOT / "tools/build_wheel.py", *options, "--out", tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_setup_names_the_variable_that_is_wrong():
    done = run(sys.executable, "setup.py", "--version", FASTPEFT_CUDA="banana", PYTHONPATH=str(ROOT))
    assert done.returncode and "FASTPEFT_CUDA" in done.stderr


@pytest.fixture(scope="module")
def toolkit() -> cuda_toolkit.Toolkit:
    here = cuda_toolkit.candidates()
    if not here:
        pytest.skip("no CUDA toolkit here (nvcc on PATH or CUDA_HOME)")
    return here[0]


@pytest.fixture(scope="module")
def wheel(toolkit: cuda_toolkit.Toolkit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CUDA wheel for the oldest GPU, where the kernels differ from those that tests/cuda executes."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    release = "{}.{}".format(*toolkit.release)
    done = run(sys.executable, ROOT / "tools/build_wheel.py", "--cuda", release, "--arch", "7.5", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


@pytest.mark.slow
def test_the_wheel_is_labelled_with_its_cuda_release(wheel, toolkit):
    assert re.fullmatch(rf"fastpeft-[\d.]+\+cu{toolkit.release[0]}{toolkit.release[1]}-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastpeft/_C.abi3.so", "fastpeft/_cuda.abi3.so", "fastpeft/kernels/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith(("csrc", "tools", "tests"))]


@pytest.mark.slow
def test_the_wheel_holds_the_machine_code_asked_for(wheel, toolkit, tmp_path):
    tool = cuda_toolkit.cuobjdump(toolkit)
    if tool is None:
        pytest.skip("no cuobjdump here")
    library = Path(zipfile.ZipFile(wheel).extract("fastpeft/_cuda.abi3.so", tmp_path))
    assert cuda_toolkit.machine_code(library, tool) == {"75"}
    usage = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert len(kernels) > 20 and all(counts == ("0", "0") for counts in kernels), "no spill on sm_75"


PROBE = """
import importlib.metadata, json, torch, fastpeft, fastpeft.ops
from fastpeft.cli.doctor import _build
from fastpeft.ops import backend
x, w, a, b = (torch.randn(*s) for s in ((64, 96), (32, 96), (4, 96), (32, 4)))
y = fastpeft.ops.lora_linear(x, w, None, a, b, 2.0)
error = (y - (x @ w.T + 2 * x @ a.T @ b.T)).abs().max().item()
version = importlib.metadata.version("fastpeft")
print(json.dumps({"file": fastpeft.__file__, "version": version, "error": error, "build": _build(),
    "backends": backend.backend_report(), "registered": backend.in_cuda_extension("linear_4bit")}))
"""


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel, toolkit, tmp_path):
    """Beside a torch without CUDA, on a machine without a driver: it loads, says why it stands back, and computes."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    # torch and the like from this environment; the .pth files in it, an editable fastpeft's too, are not read again.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    import torch

    folders.add(str(Path(torch.__file__).parents[1]))
    (site / "others.pth").write_text("\n".join(sorted(folders)))
    done = run(python, "-I", "-c", PROBE)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    said = json.loads(done.stdout)
    assert said["file"].startswith(str(site)) and said["version"].endswith(f"+cu{''.join(map(str, toolkit.release))}")
    assert said["build"]["cuda"]["archs"] == "7.5" and said["build"]["cuda"]["nvcc"] == toolkit.version
    assert said["build"]["cpu"]["torch_abi"] == "2.10" and "scalar" in said["build"]["cpu"]["isas"]
    assert said["registered"] and said["error"] < 1e-4
    if torch.version.cuda is None:
        assert said["backends"]["cuda"].startswith("not available: torch")


@pytest.mark.slow
def test_without_extensions_the_wheel_is_plain(tmp_path):
    """No label, no platform: what pip makes of the source distribution on a machine without a compiler."""
    copy = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, FASTPEFT_BUILD="0")
    assert copy.returncode == 0, copy.stdout[-2000:]
    (sdist,), (made,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert "+" not in sdist.name and "+" not in made.name
