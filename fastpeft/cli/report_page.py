"""The page of a sweep: one HTML file with its pictures inside, and the same pictures as PNGs beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastpeft import atomic
from fastpeft.cli.console import size
from fastpeft.cli.errors import CommandError
from fastpeft.cli.plots import pyplot

_COLOURS = {"none": "#334155", "selective": "#0f766e", "mlp": "#c2410c", "block": "#7c3aed", "offload": "#0369a1"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; } .faint { color: #6b7785; }
img { max-width: 100%; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e4e7eb; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
"""


def write_page(path: Path, report: dict[str, Any]) -> list[Path]:
    """Write `path` and the PNGs beside it; returns the PNGs' paths.

    Raises:
        CommandError: matplotlib is not installed.
    """
    plt = pyplot()
    if plt is None:
        raise CommandError("--report draws with matplotlib: pip install matplotlib")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, bytes, Path]] = []
    for title, name, draw in _PICTURES:
        picture = _picture(plt, report["rows"], draw)
        beside = path.with_name(f"{name}.png")
        atomic.write(beside, picture)
        pictures.append((title, picture, beside))
    atomic.write(path, _page(report, pictures).encode())
    return [beside for _, _, beside in pictures]


def _picture(plt: Any, rows: list[dict[str, Any]], draw: Callable[[Any, list[dict[str, Any]]], None]) -> bytes:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, all_axes = plt.subplots(
        1, len(methods), figsize=(7.2 * len(methods), 4.2), squeeze=False, layout="constrained"
    )
    for axes, method in zip(all_axes[0], methods):
        draw(axes, [row for row in rows if row["method"] == method])
        axes.set_title(method)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=7, ncols=2, handlelength=3.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    return picture.getvalue()


def _lines(rows: list[dict[str, Any]]) -> Iterable[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(label, style, rows by length) of each implementation and mode."""
    for name, mode in dict.fromkeys((row["implementation"], row["checkpoint"]) for row in rows):
        style = {
            "color": _COLOURS[mode],
            "linestyle": "-" if name == "fastpeft" else "--",
            "marker": "o",
            "markersize": 4,
        }
        yield f"{name} {mode}", style, [r for r in rows if (r["implementation"], r["checkpoint"]) == (name, mode)]


def _throughput(axes: Any, rows: list[dict[str, Any]]) -> None:
    for label, style, line in _lines(rows):
        axes.plot([r["length"] for r in line], [r["tokens_per_second"] for r in line], label=label, **style)
    axes.set(xlabel="tokens a row", ylabel="tokens per second")
    axes.set_ylim(bottom=0)


def _memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    for label, style, line in _lines(rows):
        lengths = [r["length"] for r in line]
        axes.plot(lengths, [r["peak_growth_bytes"] / 2**20 for r in line], label=label, **style)
        if all(r["estimated_growth_bytes"] is not None for r in line):
            estimated = [r["estimated_growth_bytes"] / 2**20 for r in line]
            axes.plot(lengths, estimated, color=style["color"], linestyle=":", linewidth=1, marker="x", markersize=6)
    axes.plot([], [], color="#6b7785", linestyle=":", marker="x", label="estimate of each")
    axes.set(xlabel="tokens a row", ylabel="growth of peak memory, MiB")
    axes.set_ylim(bottom=0)


def _saved(axes: Any, rows: list[dict[str, Any]]) -> None:
    for label, style, line in _lines(rows):
        axes.plot([r["length"] for r in line], [r["saved_bytes"] / 2**20 for r in line], label=label, **style)
    axes.set(xlabel="tokens a row", ylabel="kept for the backward, MiB")
    axes.set_ylim(bottom=0)


def _frontier(axes: Any, rows: list[dict[str, Any]]) -> None:
    """At the longest rows: up and to the left is better."""
    longest = max(row["length"] for row in rows)
    points = [row for row in rows if row["length"] == longest]
    for row in points:
        style = {"color": _COLOURS[row["checkpoint"]], "marker": "o" if row["implementation"] == "fastpeft" else "s"}
        label = f"{row['implementation']} {row['checkpoint']}"
        axes.scatter(row["peak_growth_bytes"] / 2**20, row["tokens_per_second"], s=42, label=label, zorder=3, **style)
    best, edge = 0.0, []
    for row in sorted(points, key=lambda r: (r["peak_growth_bytes"], -r["tokens_per_second"])):
        if row["tokens_per_second"] > best:
            best = row["tokens_per_second"]
            edge.append((row["peak_growth_bytes"] / 2**20, best))
    axes.step(*zip(*edge), where="post", color="#9aa5b1", linewidth=1)
    axes.set(xlabel=f"growth of peak memory at {longest:,} tokens a row, MiB", ylabel="tokens per second")


_PICTURES: list[tuple[str, str, Callable[[Any, list[dict[str, Any]]], None]]] = [
    ("Throughput", "throughput", _throughput),
    ("Peak memory against length, the estimate beside the measurement", "memory", _memory),
    ("Kept between forward and backward", "saved", _saved),
    ("Speed against memory", "frontier", _frontier),
]


def _page(report: dict[str, Any], pictures: list[tuple[str, bytes, Path]]) -> str:
    options, text = report["options"], html.escape
    threads = f" × {report['threads']} threads" if report["threads"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    about = (
        f"{report['layers']} layers, {options['batch']} rows a step, {report['dtype']}, rank {options['r']} on "
        f"{options['target_modules']}, dropout {options['dropout']:g}, {report['device']}{threads}; {versions}"
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>fastpeft bench: {text(report['model'])}</title><style>{_STYLE}</style>",
        f"<h1>{text(report['model'])}</h1><p class=faint>{text(about)}</p>",
        f"<p class=faint>Step times are medians of {options['steps']} steps, interleaved over all lines of a length in "
        "one process. Peak memory was measured in a process a line; the estimate was counted from the config.</p>",
    ]
    for title, picture, _ in pictures:
        data = base64.b64encode(picture).decode()
        parts.append(f"<h2>{text(title)}</h2><img alt='{text(title)}' src='data:image/png;base64,{data}'>")
    headings = ("", "tokens a row", "step, ms", "tokens/s", "kept", "peak growth", "estimated", "estimate / measured")
    parts.append("<h2>Numbers</h2><table><tr>" + "".join(f"<th>{h}</th>" for h in headings) + "</tr>")
    for row in report["rows"]:
        guess, measured = row["estimated_growth_bytes"], row["peak_growth_bytes"]
        cells = (
            text(f"{row['method']} {row['implementation']} {row['checkpoint']}"),
            f"{row['length']:,}",
            f"{1e3 * row['step_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            size(row["saved_bytes"]),
            size(measured),
            size(guess) if guess is not None else "",
            f"{guess / measured:.2f}" if guess and measured else "",
        )
        parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    parts.append("</table></html>\n")
    return "\n".join(parts)
