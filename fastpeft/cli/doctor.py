"""`fastpeft doctor`: what is installed, what every operator will run on and why, and what is wrong.

Healthy (exit code 0) means that everything fastpeft needs is there, in its range, and computes what it should.
A missing accelerator or extension is a note: fastpeft works without it, slower. What is broken is a problem (exit
code 1).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

NEEDED = {"torch": "2.10", "transformers": "5", "safetensors": "0.5", "huggingface_hub": "1.0"}
OPTIONAL = {
    "triton": "GPU kernels",
    "accelerate": "fastpeft finetune, Trainer",
    "datasets": "data sets as folders or from the Hub",
    "matplotlib": "loss curves and charts",
    "peft": "fastpeft bench --baseline peft",
    "bitsandbytes": "4-bit and 8-bit models",
    "trl": "SFTTrainer, DPOTrainer",
}
_ISA_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16")


class Findings:
    """Problems (something is broken) and notes (something could be faster), each a sentence that says what to do."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def guard(self, what: str, probe: Callable[[], Any], default: Any) -> Any:
        """What `probe` returns; whatever it raises becomes a problem."""
        try:
            return probe()
        except Exception as error:  # the point of this command is to survive any broken install
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self.problems.append(f"{what}: {first}")
            return default


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(found: Findings) -> dict[str, str | None]:
    from packaging.version import Version

    import fastpeft

    versions: dict[str, str | None] = {"fastpeft": fastpeft.__version__, "python": platform.python_version()}
    for name, least in NEEDED.items():
        versions[name] = version = _version(name)
        if version is None:
            found.problems.append(f"{name} is not installed: pip install '{name}>={least}'")
        elif Version(version) < Version(least):
            found.problems.append(f"{name} {version} is too old: pip install --upgrade '{name}>={least}'")
        else:
            found.guard(f"{name} cannot be imported", functools.partial(importlib.import_module, name), None)
    return versions


def _optional(found: Findings) -> dict[str, dict[str, Any]]:
    versions = {name: _version(name) for name in OPTIONAL}
    failures = _failures([name for name, version in versions.items() if version is not None])
    for name, why in failures.items():
        found.problems.append(f"{name} {versions[name]} is installed but cannot be imported: {why}")
    return {
        name: {"version": version, "works": version is not None and name not in failures, "for": OPTIONAL[name]}
        for name, version in versions.items()
    }


_TRY = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print(name, "", sep="\\t", flush=True)
    except Exception as error:
        print(name, f"{type(error).__name__}: {error}".splitlines()[0], sep="\\t", flush=True)
"""


def _failures(names: list[str]) -> dict[str, str]:
    """The packages that do not import and why, tried in another process: a broken one may end it, or spoil this one."""
    failures: dict[str, str] = {}
    while names:
        done = subprocess.run([sys.executable, "-c", _TRY, *names], capture_output=True, text=True, timeout=300)
        answers = dict(line.split("\t", 1) for line in done.stdout.splitlines() if line.partition("\t")[0] in names)
        failures |= {name: why for name, why in answers.items() if why}
        names = names[len(answers) :]
        if names:  # the process ended while it imported the first of these
            failures[names[0]] = f"the import ended the process with status {done.returncode}"
            names = names[1:]
    return failures


def _cpu(found: Findings) -> dict[str, Any]:
    import torch

    flags: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                present = set(value.split())
                flags = [flag for flag in _ISA_FLAGS if flag in present]
                break
    from fastpeft.ops.backend import backend_report, cpu_extension

    extension = cpu_extension()
    if extension is None:
        found.notes.append(f"C++ kernels {backend_report()['cpu']}")
    return {
        "name": name,
        "flags": flags,
        "threads": torch.get_num_threads(),
        "extension_built": importlib.util.find_spec("fastpeft._C") is not None,
        "extension_loaded": extension is not None,
        "isa": extension.isa() if extension is not None else None,
        "isa_forced": os.environ.get("FASTPEFT_CPU_ISA") or None,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    }


def _build() -> dict[str, Any]:
    """What the extensions of this install were built for, as they say themselves; {} for one that is not there."""
    from fastpeft.ops.backend import cpu_extension, cuda_extension

    cpu, cuda = cpu_extension(), cuda_extension()
    return {
        "cpu": {} if cpu is None else cpu.build_info(),
        "cuda": {} if cuda is None else cuda.build_info(),
    }


def _driver() -> str | None:
    """The NVIDIA driver's version, or None where none answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def _gpu(found: Findings) -> dict[str, Any]:
    import torch

    driver = _driver()
    usable = torch.cuda.is_available()
    if driver and not usable:
        if torch.version.cuda is None:
            found.problems.append(
                f"an NVIDIA driver ({driver}) answers but torch {torch.__version__} is a CPU build: install torch's "
                "CUDA build (`pip install --force-reinstall torch`, or the command from pytorch.org)"
            )
        else:
            found.problems.append(
                f"an NVIDIA driver ({driver}) answers but torch (CUDA {torch.version.cuda}) finds no usable GPU: the "
                "driver may be too old, or CUDA_VISIBLE_DEVICES hides the GPUs"
            )
    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count() if usable else 0)
    ]
    return {"driver": driver, "torch_cuda": torch.version.cuda, "usable": usable, "devices": devices}


def _operators() -> dict[str, dict[str, str]]:
    """For each operator what runs on a CPU tensor and on a CUDA tensor, and why."""
    import torch

    from fastpeft.ops import backend

    lines = backend.backend_report()
    forced = backend.route(torch.device("cpu"))
    result = {}
    for name in sorted(vars(backend.OPS["auto"])):
        if forced != "auto":
            result[name] = dict.fromkeys(("cpu", "cuda"), f"{forced} (forced by FASTPEFT_BACKEND)")
            continue
        has = {key: _has_kernel(f"fastpeft::{name}", key.upper()) for key in ("cpu", "cuda")}
        no_cpu = "C++ extension missing" if lines["cpu"].startswith("not available") else "no C++ kernel for it"
        no_gpu = "triton not installed" if "not installed" in lines["triton"] else "no Triton kernel for it"
        on_gpu = "Triton" if has["cuda"] else f"reference: {no_gpu}"
        if has["cuda"] and backend.in_cuda_extension(name):
            # What the kernel does not take, a GPU it was not built for included, goes to Triton or the reference.
            on_gpu = "CUDA C++" if not lines["cuda"].startswith("not available") else "Triton"
            if on_gpu == "Triton" and "not installed" in lines["triton"]:
                on_gpu = "reference: triton not installed"
        result[name] = {"cpu": lines["cpu"] if has["cpu"] else f"reference: {no_cpu}", "cuda": on_gpu}
    return result


def _decisions() -> str:
    """Which table says what path the 4-bit products take."""
    from fastpeft.ops import decisions

    return decisions.in_force()


def _has_kernel(operator: str, key: str) -> bool:
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def _self_test() -> str:
    """One forward and backward of lora_linear on every device here, against float64.

    Raises:
        ArithmeticError: a backend computes something else.
    """
    import torch

    from fastpeft.ops import lora_linear

    checked = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (33, 96), "w": (80, 96), "a": (8, 96), "b": (80, 8)}
        exact = {k: torch.randn(s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for k, s in shapes.items()}
        got = {k: v.to(device, torch.float32).requires_grad_(k != "w") for k, v in exact.items()}
        y = lora_linear(got["x"], got["w"], None, got["a"], got["b"], 2.0)
        y.sum().backward()
        wanted = {k: v.clone().requires_grad_(k != "w") for k, v in exact.items()}
        z = wanted["x"] @ wanted["w"].T + 2.0 * wanted["x"] @ wanted["a"].T @ wanted["b"].T
        z.sum().backward()
        pairs = [(y, z), *((got[k].grad, wanted[k].grad) for k in ("x", "a", "b"))]
        for index, (ours, theirs) in enumerate(pairs):
            error = ((ours.cpu().double() - theirs).norm() / theirs.norm()).item()  # type: ignore[union-attr]
            # TF32, where a user has switched it on, has 10 bits; a wrong kernel is off by far more.
            if not error < 5e-3:
                what = ("output", "dx", "dA", "dB")[index]
                raise ArithmeticError(f"lora_linear's {what} on {device} is off by {error:.1e} relative to float64")
        checked.append(device)
    return "lora_linear forward and backward right on " + " and ".join(checked)


def examine() -> dict[str, Any]:
    """Everything that `doctor --json` prints."""
    found = Findings()
    report: dict[str, Any] = {"versions": _versions(found)}
    report["optional"] = _optional(found)
    backends: dict[str, str] = {}
    if not found.problems or all("torch" not in problem for problem in found.problems):
        report["cpu"] = found.guard("the CPU backend", lambda: _cpu(found), {})
        report["gpu"] = found.guard("the GPU", lambda: _gpu(found), {})

        def names() -> dict[str, str]:
            from fastpeft.ops.backend import backend_report

            return backend_report()

        report["build"] = found.guard("the extensions", _build, {})
        backends = found.guard("the backends", names, {})
        report["backends"] = backends
        gpu = report["gpu"]
        if report["build"].get("cuda") and gpu.get("usable") and backends.get("cuda", "").startswith("not available"):
            found.notes.append(f"CUDA kernels {backends['cuda']}; Triton's are used instead")
        report["decisions"] = found.guard("the table of decisions", _decisions, None)
        report["operators"] = found.guard("the operators", _operators, {})
        report["self_test"] = found.guard("the self-test", _self_test, None)
    if report["optional"]["triton"]["version"] is None and report.get("gpu", {}).get("usable"):
        found.problems.append("a GPU is usable but triton is not installed: pip install triton")
    telling = ("FASTPEFT_", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    environment = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(telling)}
    return {
        "healthy": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "system": f"{platform.system()} {platform.machine()}",
        "environment": environment,
        **report,
    }


def doctor(as_json: bool) -> int:
    """Examine and print; 0 when healthy, 1 with problems."""
    if as_json:
        report = examine()
        print(json.dumps(report, indent=2))
    else:
        from fastpeft.cli.console import console

        with console.status("examining"):
            report = examine()
        _show(report)
    return 0 if report["healthy"] else 1


def _show(report: dict[str, Any]) -> None:
    from fastpeft.cli.console import console, facts, size

    rows = {name: version or "[bad]missing[/bad]" for name, version in report["versions"].items()}
    rows["system"] = report["system"]
    console.print(facts("Installed", rows))

    table = Table(box=box.ROUNDED, border_style="faint")
    for column in ("optional", "version", "for"):
        table.add_column(column)
    for name, state in report["optional"].items():
        version = state["version"] or "–"
        style = "faint" if state["version"] is None else "good" if state["works"] else "bad"
        table.add_row(name, Text(version, style), Text(state["for"], "faint"))
    console.print(table)

    if build := report.get("build"):
        console.print(facts("Built for", _built_for(build)))

    machine = {}
    if cpu := report.get("cpu"):
        machine["CPU"] = f"{cpu['name']}, {cpu['threads']} threads  [faint]{' '.join(cpu['flags'])}[/faint]"
        machine["C++ kernels"] = f"[good]{cpu['isa']}[/good]" if cpu["isa"] else "[warn]not available[/warn]"
        if cpu["isa_forced"]:
            machine["C++ kernels"] += "  [faint]forced by FASTPEFT_CPU_ISA[/faint]"
    if gpu := report.get("gpu"):
        for index, device in enumerate(gpu["devices"]):
            details = f"compute capability {device['capability']}, {size(device['memory_bytes'])}"
            machine[f"GPU {index}"] = f"{device['name']}  [faint]{details}[/faint]"
        if not gpu["devices"]:
            why = "torch is a CPU build" if gpu["torch_cuda"] is None else "CUDA finds none"
            machine["GPU"] = f"[faint]none ({why})[/faint]"
    for key, title in (("triton", "Triton"), ("cuda", "CUDA C++")):
        if line := report.get("backends", {}).get(key):
            machine[title] = f"[faint]{line}[/faint]" if line.startswith("not available") else line
    if line := report.get("decisions"):
        machine["decisions"] = line
    for name, value in report["environment"].items():
        machine[name] = f"[warn]{value}[/warn]"
    console.print(facts("Machine", machine))

    if operators := report.get("operators"):
        table = Table(box=box.ROUNDED, border_style="faint")
        table.add_column("operator", no_wrap=True)
        for column in ("on a CPU tensor", "on a CUDA tensor"):
            table.add_column(column)
        for name, where in operators.items():
            table.add_row(Text(name, "cyan"), *(_by_backend(where[key]) for key in ("cpu", "cuda")))
        console.print(table)
    if report.get("self_test"):
        console.print(Text.assemble(("✓ ", "good"), report["self_test"]))
    for note in report["notes"]:
        console.print(Text.assemble(("! ", "warn"), note))
    for problem in report["problems"]:
        console.print(Text.assemble(("✗ ", "bad"), problem))
    if report["healthy"]:
        console.print(Text("healthy", "good"))
    else:
        console.print(Text(f"{len(report['problems'])} problem{'s' * (len(report['problems']) > 1)}", "bad"))


def _built_for(build: dict[str, Any]) -> dict[str, str]:
    rows = {"C++": "[faint]not in this install[/faint]", "CUDA": "[faint]not in this install[/faint]"}
    if cpu := build.get("cpu"):
        rows["C++"] = f"{cpu['isas'].replace(' ', ', ')}  [faint]{cpu['compiler']}[/faint]"
        rows["torch"] = f"{cpu['torch_abi']} and newer (stable ABI)  [faint]built with {cpu['torch']}[/faint]"
    if cuda := build.get("cuda"):
        archs = cuda["archs"].replace(",", ", ")
        rows["CUDA"] = f"{cuda['cuda']}, compute capability {archs}  [faint]nvcc {cuda['nvcc']}[/faint]"
    return rows


def _by_backend(line: str) -> Text:
    return Text(line, "faint" if line.startswith("reference") else "good")
