"""`fastpeft bench`: training steps timed against another implementation of the same adapter."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fastpeft
from fastpeft.cli.console import console, number, quiet_libraries, size, warn
from fastpeft.cli.contenders import BenchOptions, Runner, real_peft
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import write_json
from fastpeft.cli.models import shape_config
from fastpeft.cli.products import Products
from fastpeft.cli.record import patch_summary
from fastpeft.measure import Contender, interleave


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure, show, and write bench.json and bench.png into `options.out`; returns what bench.json holds.

    Raises:
        CommandError: a model, a device or the baseline is not there.
    """
    if options.report is not None:
        from fastpeft.cli.sweep import sweep

        return sweep(options)
    given = [name for name in ("lengths", "checkpoints", "methods") if getattr(options, name) is not None]
    if given:
        raise CommandError(f"--{given[0]} is for the sweep that --report makes")
    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ["fastpeft", *options.baselines()]
    if "peft" in names or "compile" in names:
        real_peft()
    shape_config(options.model, options.config, options.layers)  # a mistake is told before anything is started
    memory = {}
    for name in names:
        with console.status(f"peak memory of {name}, in a process of its own"):
            memory[name] = _memory_elsewhere(name, options)
    with console.status("building the models"):
        runners = [Runner(name, options) for name in names]
    saved = {runner.name: runner.saved_bytes() for runner in runners}
    timed_ones = [Contender(runner.name, runner.step) for runner in runners]
    if options.products:
        timed_ones.append(Contender("products", Products(options).step))
    with Progress(
        TextColumn("[bold]bench[/bold]"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=options.warmup + options.steps)
        times = interleave(
            timed_ones,
            steps=options.steps,
            warmup=options.warmup,
            device=runners[0].device,
            on_round=lambda done: bar.update(task, completed=done),
        )

    tokens = options.batch * options.seq
    results = []
    for name in names:
        timed = times[name]
        results.append(
            {
                "name": name,
                "step_seconds_median": timed.median,
                "step_seconds_iqr": timed.spread,
                "step_seconds": timed.seconds,
                "tokens_per_second": tokens / timed.median,
                "saved_activation_bytes": saved[name],
                "saved_activation_bytes_per_token": saved[name] / tokens,
                "memory_before_bytes": memory[name]["start"],
                "peak_memory_bytes": memory[name]["peak"],
                "peak_memory_growth_bytes": memory[name]["growth"],
                "peak_memory_method": memory[name]["method"],
                "losses": [float(loss) for loss in timed.returned],
            }
        )
    report = _report(options, runners[0], results, times)
    _show(report)
    write_json(options.out / "bench.json", report)
    _draw(options, report)
    return report


def _memory_elsewhere(name: str, options: BenchOptions) -> dict[str, Any]:
    command = [sys.executable, "-m", "fastpeft.cli.contenders", json.dumps(options.as_json()), name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise CommandError(f"{name} cannot run this benchmark: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _report(options: BenchOptions, runner: Runner, results: list[dict[str, Any]], times: Any) -> dict[str, Any]:
    import transformers

    config = runner.model.config.get_text_config()
    cuda = runner.device.type == "cuda"
    report: dict[str, Any] = {
        "model": options.model or str(options.config),
        "parameters": sum(p.numel() for p in runner.model.parameters() if not p.requires_grad),
        "trainable": sum(p.numel() for p in runner.model.parameters() if p.requires_grad),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "device": torch.cuda.get_device_name(runner.device) if cuda else str(runner.device),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "threads": None if cuda else torch.get_num_threads(),
        "versions": {
            "fastpeft": fastpeft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "options": options.as_json(),
        "patched": patch_summary(runner.model),
        "contenders": results,
    }
    if len(results) > 1:
        report["comparisons"] = [_comparison(results[0], theirs, times) for theirs in results[1:]]
        report["comparison"] = report["comparisons"][0]
    if "products" in times:
        floor = times["products"]
        report["products"] = {
            "step_seconds_median": floor.median,
            "step_seconds": floor.seconds,
            "ratios": {result["name"]: floor.speedup_over(times[result["name"]]) for result in results},
        }
    if theirs_version := _peft_version(results):
        report["versions"]["peft"] = theirs_version
    return report


def _comparison(ours: dict[str, Any], theirs: dict[str, Any], times: Any) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"])]
    return {
        "baseline": theirs["name"],
        "speedup": times[ours["name"]].speedup_over(times[theirs["name"]]),
        "saved_activation_ratio": _ratio(ours["saved_activation_bytes"], theirs["saved_activation_bytes"]),
        "peak_memory_growth_ratio": _ratio(ours["peak_memory_growth_bytes"], theirs["peak_memory_growth_bytes"]),
        "loss_differences": differences,
        "max_loss_difference": max(differences),
    }


def _peft_version(results: list[dict[str, Any]]) -> str | None:
    return real_peft().__version__ if any(result["name"] in ("peft", "compile") for result in results) else None


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


_METHODS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA"}


def _show(report: dict[str, Any]) -> None:
    options, results = report["options"], report["contenders"]
    dropout = f", dropout {options['dropout']:g}" if options["dropout"] else ""
    weights = number(report["parameters"])
    threads = f" × {report['threads']} threads" if report["threads"] else ""
    table = Table(
        box=box.ROUNDED,
        border_style="faint",
        title=f"[bold]{escape(report['model'])}[/bold]  [faint]{report['layers']} layers, {weights} parameters",
        caption=f"{_METHODS[options['method']]} r={options['r']} on {escape(options['target_modules'])}{dropout}, "
        f"{options['batch']} × {options['seq']} tokens, {report['dtype']}, "
        f"{report['device']}{threads}; medians of {options['steps']} interleaved steps",
    )
    table.add_column()
    for index, result in enumerate(results):
        table.add_column(result["name"], justify="right", style="bold" if index == 0 else "")
    both = report.get("comparison")
    several = len(results) > 2
    if both:
        table.add_column(f"against {both['baseline']}" if several else "", justify="right")

    def row(label: str, cells: list[Any], verdict: Text | str = "") -> None:
        table.add_row(label, *cells, *([verdict] if both else []))

    row(
        "step",
        [_time(r["step_seconds_median"]) for r in results],
        _verdict(both["speedup"]) if both else "",
    )
    if several:
        row("  fastpeft is", ["", *(_verdict(other["speedup"]) for other in report["comparisons"])])
    floor = report.get("products")
    if floor:
        ratios = [f"{floor['ratios'][r['name']]:.2f}×" for r in results]
        row(f"  over the base's products, {_time(floor['step_seconds_median'])}", ratios)
    row("  half the quartile range", [f"± {_time(r['step_seconds_iqr'] / 2)}" for r in results])
    row("tokens per second", [f"{r['tokens_per_second']:,.0f}" for r in results])
    row(
        "saved activations",
        [size(r["saved_activation_bytes"]) for r in results],
        _less(both["saved_activation_ratio"]) if both else "",
    )
    row("  a token", [size(r["saved_activation_bytes_per_token"]) for r in results])
    row(
        "peak memory, growth",
        [size(r["peak_memory_growth_bytes"]) for r in results],
        _less(both["peak_memory_growth_ratio"]) if both else "",
    )
    row("peak memory, all", [size(r["peak_memory_bytes"]) for r in results])
    row("loss, first step", [f"{r['losses'][0]:.4f}" for r in results])
    row(
        "loss, last step",
        [f"{r['losses'][-1]:.4f}" for r in results],
        f"|Δ| ≤ {both['max_loss_difference']:.1e}" if both else "",
    )
    console.print(table)
    if both and options["dropout"]:
        console.print("Each draws dropout masks of its own, so the losses differ.", style="faint")


def _verdict(factor: float) -> Text:
    return Text(f"{factor:.2f}× faster", "good") if factor >= 1 else Text(f"{1 / factor:.2f}× slower", "bad")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _less(ratio: float | None) -> Text | str:
    if ratio is None:
        return ""
    if abs(1 - ratio) < 0.005:
        return "the same"
    change = f"{100 * abs(1 - ratio):.0f}% {'less' if ratio <= 1 else 'more'}"
    return Text(change, "good" if ratio <= 1 else "bad")


def _draw(options: BenchOptions, report: dict[str, Any]) -> None:
    from fastpeft.cli.plots import comparison

    title = (
        f"{report['model']}, {report['layers']} layers, batch {options.batch} × {options.seq}, {report['dtype']}, "
        f"{_METHODS[options.method]} r={options.r}, dropout {options.dropout:g}, {report['device']}"
    )
    written = str(options.out / "bench.json")
    if comparison(options.out / "bench.png", report["contenders"], title):
        written += f", {options.out / 'bench.png'}"
    else:
        warn("no chart drawn: matplotlib is not installed (pip install matplotlib)")
    console.print(f"[faint]written to[/faint] {escape(written)}")
