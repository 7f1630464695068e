"""`fastpeft estimate`: what a training step will need, before there is a GPU to try it on."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from fastpeft.cli.console import console, number, quiet_libraries, size, warn
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import write_json
from fastpeft.cli.models import DTYPES, shape_config, target_modules
from fastpeft.memory import MODES, parse_size
from fastpeft.memory.estimate import PARTS, Estimate, Estimator
from fastpeft.memory.standin import Method

LIMIT = 1 << 20  # tokens that --fit looks up to, where the model does not say how many it can take
_BATCHES = (1, 2, 4, 8, 16)


@dataclass
class EstimateOptions:
    """The options of `fastpeft estimate`, by the names they have there."""

    model: str | None = None
    config: Path | None = None
    method: str = "lora"
    r: int = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"
    batch: int = 1
    seq: int = 4096
    optim: str = "adamw_torch_fused"
    checkpoint: str = "all"
    gpus: int = 1
    parallel: str = "ddp"
    dtype: str = "bfloat16"
    implementation: str = "fastpeft"
    fit: str | None = None
    json: bool = False
    out: Path | None = None


def estimate(options: EstimateOptions) -> dict[str, Any]:
    """Print the table (or JSON), write estimate.json and estimate.png into `options.out`; returns the JSON's data.

    Raises:
        CommandError: the model cannot be read, or options do not fit it or each other.
    """
    quiet_libraries()
    if options.checkpoint == "auto" and options.fit is None:
        raise CommandError("--checkpoint auto plans for a budget: give it with --fit")
    try:
        budget = parse_size(options.fit) if options.fit is not None else None
    except ValueError as error:
        raise CommandError(f"--fit: {error}") from None
    config, _ = shape_config(options.model, options.config, None)
    method = Method(
        options.method,
        options.r,
        options.dropout,
        target_modules(options.target_modules),
        DTYPES[options.dtype],
        options.implementation,
    )
    try:
        with contextlib.nullcontext() if options.json else console.status("counting"):
            estimator = Estimator(config, method, options.optim, options.gpus, options.parallel)
            modes = list(MODES) if options.checkpoint == "all" else [options.checkpoint]
            if budget is None:
                found = [estimator.estimate(options.batch, options.seq, mode) for mode in modes]
            else:
                found = _fits(estimator, modes, budget, _limit(config))
    except (ValueError, ImportError, NotImplementedError) as error:
        raise CommandError(f"this model cannot be counted: {error}") from None
    if budget is not None and not found:
        raise CommandError(
            f"--fit {options.fit}: not even one row of 64 tokens fits; the weights alone may be too much"
        )
    report = _report(options, estimator, found, budget)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _show(options, report, found, budget)
    if options.out is not None:
        write_json(options.out / "estimate.json", report)
        _draw(options, found, budget)
    return report


def _limit(config: Any) -> int:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else LIMIT


def _fits(estimator: Estimator, modes: list[str], budget: int, limit: int) -> list[Estimate]:
    """For each mode and number of rows the longest rows that fit."""
    found = []
    for mode in modes:
        for batch in _BATCHES:
            longest = estimator.longest(batch, mode, budget, limit)
            if longest is None:
                break
            found.append(longest)
    return found


def _report(
    options: EstimateOptions, estimator: Estimator, found: list[Estimate], budget: int | None
) -> dict[str, Any]:
    everything = [p for layer in estimator.stand_in.sizes.layers for p in layer] + estimator.stand_in.sizes.rest
    fields = asdict(options)
    return {
        "estimate": True,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()},
        "budget": budget,
        "parameters": sum(p[0] for p in everything),
        "trained": sum(p[0] for p in everything if p[2]),
        "layers": len(estimator.stand_in.sizes.layers),
        "not_counted": "CUDA context and libraries (0.5 to 1 GiB), workspaces inside operators, fragmentation",
        "estimates": [e.to_dict() for e in found],
    }


def _show(options: EstimateOptions, report: dict[str, Any], found: list[Estimate], budget: int | None) -> None:
    where = f", {options.gpus} GPUs by {options.parallel.upper()}, each" if options.gpus > 1 else ""
    lora = "" if options.method == "full" else f" r={options.r} on {escape(options.target_modules)}"
    what = f"largest that fit into {size(budget)}" if budget else f"{options.batch} × {options.seq:,} tokens"
    table = Table(
        box=box.ROUNDED,
        border_style="faint",
        title=f"[bold]{escape(options.model or str(options.config))}[/bold]  [faint]{report['layers']} layers, "
        f"{number(report['parameters'])} parameters, {number(report['trained'])} trained",
        caption=f"an estimate: {options.method}{lora}, {options.optim}, {options.dtype}, {options.implementation}, "
        f"{what}{where}; not counted: {report['not_counted']}",
    )
    if budget:
        for heading in ("", "rows × tokens", "activations", "logits", "temporary", "the rest", "peak"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=heading in ("", "rows × tokens"))
        for e in found:
            loose = (e.activations, e.logits, e.temporary)
            cells = [size(part) for part in (*loose, e.peak - sum(loose), e.peak)]
            table.add_row(e.checkpoint, f"[bold]{e.batch} × {e.seq:,}", *cells)
    else:
        table.add_column(no_wrap=True)
        for e in found:
            table.add_column(e.checkpoint, justify="right")
        for part in PARTS:
            if any(getattr(e, part) for e in found):
                table.add_row(part, *(size(getattr(e, part)) for e in found))
        table.add_row("[bold]peak", *(f"[bold]{size(e.peak)}" for e in found), end_section=True)
        table.add_row("at", *(e.moment.removeprefix("the ").replace(" of layer", ",") for e in found))
        table.add_row("recompute", *(f"+{100 * e.recompute:.1f} %" for e in found))
    console.print(table)
    if any(e.paged_out for e in found):
        console.print(f"[faint]{size(found[0].paged_out)} of optimizer state may be paged out to the host")
    if any(e.offloaded for e in found):
        console.print(f"[faint]offload: {size(max(e.offloaded for e in found))} of layer inputs in host memory")


def _draw(options: EstimateOptions, found: list[Estimate], budget: int | None) -> None:
    from fastpeft.cli.plots import stacked_bars

    assert options.out is not None
    bars = [
        (f"{e.checkpoint}\n{e.batch} × {e.seq:,}" if budget else e.checkpoint, {p: getattr(e, p) for p in PARTS})
        for e in found
    ]
    title = f"estimate: {options.model or options.config}, {options.method}\n{options.optim}"
    title += "" if budget else f", {options.batch} × {options.seq:,} tokens"
    written = str(options.out / "estimate.json")
    if stacked_bars(options.out / "estimate.png", bars, title, budget):
        written += f", {options.out / 'estimate.png'}"
    else:
        warn("no chart drawn: matplotlib is not installed (pip install matplotlib)")
    if not options.json:
        console.print(f"[faint]written to[/faint] {escape(written)}")
