"""`fastpeft bench --report`: method × length × checkpoint mode × implementation, measured, in one page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import torch

from fastpeft.cli.console import console, quiet_libraries, size
from fastpeft.cli.contenders import BenchOptions, Runner, real_peft
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import write_json
from fastpeft.cli.models import shape_config, target_modules
from fastpeft.measure import Contender, interleave
from fastpeft.memory import MODES
from fastpeft.memory.estimate import Estimator
from fastpeft.memory.standin import Method

_METHODS = ("lora", "dora", "qlora")


def sweep(options: BenchOptions) -> dict[str, Any]:
    """Measure every cell, and write the page, its PNGs and its JSON beside it; returns the JSON's data.

    Step times of one method and length are interleaved over all implementations and modes in this process; peak memory
    is measured in a process a line, shortest rows first. PEFT runs unchecked and with Transformers' own block
    checkpointing, which are the modes it has.

    Raises:
        CommandError: a model, a mode or the baseline is not there.
    """
    assert options.report is not None
    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.gradient_checkpointing:
        raise CommandError("--gradient-checkpointing is not for a sweep: it goes over --checkpoints")
    lengths = sorted(_numbers("--lengths", options.lengths or "64,128,256"))
    modes = _names("--checkpoints", options.checkpoints or ",".join(MODES), MODES)
    methods = _names("--methods", options.methods or options.method, _METHODS)
    names = ["fastpeft", *options.baselines()]
    if "peft" in names:
        real_peft()
    config, _ = shape_config(options.model, options.config, options.layers)
    rows: list[dict[str, Any]] = []
    for method in methods:
        lines = [(n, m) for n in names for m in modes if n in ("fastpeft", "eager") or m in ("none", "block")]
        memory = {}
        for name, mode in lines:
            with console.status(f"peak memory: {method}, {name}, {mode}"):
                memory[name, mode] = _memory(name, _line(options, method, mode, lengths))
        with console.status(f"building the models of {method}"):
            runners = {(n, m): Runner(n, _line(options, method, m, None)) for n, m in lines}
        counted = [n for n in names if (n, modes[0]) in runners and n != "compile"]
        estimators = {n: _estimator(config, options, method, n, runners[n, modes[0]]) for n in counted}
        for index, length in enumerate(lengths):
            for runner in runners.values():
                runner.options.seq = length
            with console.status(f"step times: {method}, {length} tokens a row"):
                times = interleave(
                    [Contender(f"{n} {m}", runner.step) for (n, m), runner in runners.items()],
                    steps=options.steps,
                    warmup=options.warmup,
                    device=next(iter(runners.values())).device,
                )
            for (name, mode), runner in runners.items():
                timed, peak = times[f"{name} {mode}"], memory[name, mode][index]
                guess = estimators[name].estimate(options.batch, length, mode).growth if name in estimators else None
                rows.append(
                    {
                        "method": method,
                        "implementation": name,
                        "checkpoint": mode,
                        "length": length,
                        "step_seconds": timed.median,
                        "step_seconds_iqr": timed.spread,
                        "tokens_per_second": options.batch * length / timed.median,
                        "saved_bytes": runner.saved_bytes(),
                        "peak_growth_bytes": peak["growth"],
                        "peak_method": peak["method"],
                        "estimated_growth_bytes": guess,
                    }
                )
        del runners
    report = _report(options, config, rows)
    from fastpeft.cli.report_page import write_page

    page = options.report / "report.html"
    pictures = write_page(page, report)
    write_json(page.with_suffix(".json"), report)
    _show(rows)
    console.print(f"[faint]written to[/faint] {page} [faint]and {', '.join(p.name for p in pictures)}")
    return report


def _line(options: BenchOptions, method: str, mode: str, lengths: list[int] | None) -> BenchOptions:
    text = ",".join(map(str, lengths)) if lengths else None
    return dataclasses.replace(options, method=method, checkpoint=mode, lengths=text, report=None)


def _memory(name: str, options: BenchOptions) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "fastpeft.cli.contenders", json.dumps(options.as_json()), name]
    # glibc gives every block from 64 KiB on back when it is freed, so that the resident set is what is alive.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given_back})
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise CommandError(f"{name} cannot run this benchmark: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _estimator(config: Any, options: BenchOptions, method: str, name: str, runner: Runner) -> Estimator:
    targets = target_modules(options.target_modules)
    return Estimator(config, Method(method, options.r, options.dropout, targets, runner.dtype, name))


def _report(options: BenchOptions, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    import platform

    import transformers

    import fastpeft
    from fastpeft.cli.models import pick_device, pick_dtype

    device = pick_device(options.device)
    text = config.get_text_config()
    return {
        "model": options.model or str(options.config),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(pick_dtype(options.dtype, device)).removeprefix("torch."),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "versions": {
            "fastpeft": fastpeft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "options": options.as_json(),
        "rows": rows,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED, border_style="faint")
    for heading in ("", "tokens", "tokens/s", "saved", "peak growth", "estimated"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        guess = row["estimated_growth_bytes"]
        table.add_row(
            f"{row['method']} {row['implementation']} {row['checkpoint']}",
            f"{row['length']:,}",
            f"{row['tokens_per_second']:,.0f}",
            size(row["saved_bytes"]),
            size(row["peak_growth_bytes"]),
            size(guess) if guess is not None else "",
        )
    console.print(table)


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise CommandError(f"{option} {text}: needs numbers from 2, separated by commas")
    return found


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [name for name in found if name not in known]
    if wrong or not found:
        raise CommandError(f"{option} {text}: choose from {', '.join(known)}, separated by commas")
    return found
