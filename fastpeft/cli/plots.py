"""The PNGs: a loss curve and a comparison of contenders. Without matplotlib there are none; the command says so."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft import atomic

_INK, _FAINT = "#1f2933", "#9aa5b1"
COLOURS = ("#0f766e", "#c2410c")
_CONTENDERS = ("#0f766e", "#94a3b8", "#cbd5e1", "#64748b")


def pyplot() -> Any:
    """matplotlib's pyplot in the style of the commands; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _FAINT,
            "axes.labelcolor": _INK,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "text.color": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "font.size": 9,
            "figure.dpi": 150,
        }
    )
    return plt


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, mean = [], 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**index))
    return result


def loss_curve(path: Path, train: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]], title: str) -> bool:
    """Draw (step, loss) pairs to `path`; False without matplotlib or without a point."""
    plt = pyplot()
    if plt is None or not train:
        return False
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(losses), color=COLOURS[0], linewidth=2, label="train (smoothed)")
    if evals:
        axes.plot(*zip(*evals), color=COLOURS[1], marker="o", markersize=5, linewidth=1.2, label="eval")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(axis="y", color=_FAINT, alpha=0.25)
    axes.legend(frameon=False)
    _save(plt, figure, path)
    return True


def comparison(path: Path, results: Sequence[dict[str, Any]], title: str) -> bool:
    """Draw the contenders of `fastpeft bench`: tokens per second, saved bytes, peak memory, and the losses."""
    plt = pyplot()
    if plt is None:
        return False
    figure, all_axes = plt.subplots(1, 4, figsize=(12, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    panels = (
        ("tokens per second", "more is better", "tokens_per_second", 1.0),
        ("saved activations", "MiB, less is better", "saved_activation_bytes", 2.0**20),
        ("peak memory growth", "MiB, less is better", "peak_memory_growth_bytes", 2.0**20),
    )
    names = [result["name"] for result in results]
    for axes, (label, note, key, unit) in zip(all_axes, panels):
        values = [(result[key] or 0) / unit for result in results]
        bars = axes.bar(names, values, color=_CONTENDERS[: len(names)], width=0.6)
        axes.bar_label(
            bars, labels=[f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=2
        )
        axes.set(title=label, xlabel=note)
        axes.xaxis.label.set_color(_FAINT)
        axes.margins(y=0.15)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for index, result in enumerate(results):
        all_axes[3].plot(
            result["losses"], color=_CONTENDERS[index], linestyle="-" if index == 0 else "--", label=result["name"]
        )
    all_axes[3].set(title="loss", xlabel="step")
    all_axes[3].legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_FAINT)
    _save(plt, figure, path)
    return True


_PARTS = ("#334155", "#0f766e", "#5eead4", "#a3a3a3", "#fbbf24", "#c2410c", "#f472b6", "#818cf8")


def stacked_bars(path: Path, bars: Sequence[tuple[str, dict[str, int]]], title: str, budget: int | None = None) -> bool:
    """Draw (label, bytes of each part) side by side, with a line at the budget; False without matplotlib."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(figsize=(max(5.0, 2.0 + 0.9 * len(bars)), 4.2), layout="constrained")
    places = range(len(bars))
    low = [0.0] * len(bars)
    for colour, part in zip(_PARTS, bars[0][1]):
        heights = [parts[part] / 2**30 for _, parts in bars]
        if any(heights):
            axes.bar(places, heights, bottom=low, color=colour, width=0.62, label=part)
            low = [a + b for a, b in zip(low, heights)]
    for place, top in zip(places, low):
        axes.annotate(f"{top:.1f}", (place, top), ha="center", va="bottom", fontweight="bold", xytext=(0, 2),
                      textcoords="offset points")  # fmt: skip
    if budget:
        axes.axhline(budget / 2**30, color=_INK, linewidth=1, linestyle="--")
    axes.set_xticks(list(places), [label for label, _ in bars])
    axes.set(title=title, ylabel="GiB on each GPU")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_ylim(top=1.1 * max(*low, (budget or 0) / 2**30))
    _save(plt, figure, path)
    return True


def _save(plt: Any, figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, picture.getvalue())


def terminal_curve(values: Sequence[float], width: int = 64, height: int = 8) -> str:
    """The curve in lines of Braille dots (two by four to a character) with its scale; "" with fewer than two values."""
    if len(values) < 2:
        return ""
    columns, rows = 2 * width, 4 * height
    means = [sum(part) / len(part) for part in _parts(smooth(values, 0.7), columns)]
    low, high = min(means), max(means)
    cells = [[0] * width for _ in range(height)]
    previous = None
    for x, mean in enumerate(_stretch(means, columns)):
        y = round((high - mean) / ((high - low) or 1) * (rows - 1))
        # Down to or up from the last point, so that a steep curve has no gaps.
        for dot in range(min(y, y if previous is None else previous), max(y, y if previous is None else previous) + 1):
            bit = (dot % 4 + 3 * (x % 2)) if dot % 4 < 3 else 6 + x % 2
            cells[dot // 4][x // 2] |= 1 << bit
        previous = y
    labels = [high - (high - low) * row / (height - 1) for row in range(height)]
    return "\n".join(
        f"{label:7.3f} ┤" + "".join(chr(0x2800 + cell) for cell in row) for label, row in zip(labels, cells)
    )


def _parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """`values` in at most `count` runs of about equal length."""
    count = min(count, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    return [values[a:b] for a, b in zip(edges, edges[1:])]


def _stretch(values: Sequence[float], count: int) -> list[float]:
    """`values` at `count` evenly spaced places, between two of them on the straight line."""
    result = []
    for i in range(count):
        place = i * (len(values) - 1) / (count - 1)
        left = min(int(place), len(values) - 2)
        result.append(values[left] + (place - left) * (values[left + 1] - values[left]))
    return result
