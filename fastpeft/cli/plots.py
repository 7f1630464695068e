"""The PNGs: a loss curve and a comparison of contenders. Without matplotlib there are none; the command says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.cli.files import replacing

_INK, _FAINT = "#1f2933", "#9aa5b1"
COLOURS = ("#0f766e", "#c2410c", "#6d28d9", "#475569")


def _pyplot() -> Any:
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
    plt = _pyplot()
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
    plt = _pyplot()
    if plt is None:
        return False
    figure, all_axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    panels = (
        ("tokens per second", "tokens_per_second", 1.0, "{:,.0f}"),
        ("saved activations, MiB", "saved_activation_bytes", 2.0**20, "{:,.1f}"),
        ("peak memory growth, MiB", "peak_memory_growth_bytes", 2.0**20, "{:,.0f}"),
    )
    names = [result["name"] for result in results]
    for axes, (label, key, unit, form) in zip(all_axes, panels):
        values = [(result[key] or 0) / unit for result in results]
        bars = axes.bar(names, values, color=COLOURS[: len(names)], width=0.6)
        axes.bar_label(bars, labels=[form.format(value) for value in values], padding=2)
        axes.set_title(label)
        axes.margins(y=0.15)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for index, result in enumerate(results):
        all_axes[3].plot(
            result["losses"], color=COLOURS[index], linestyle="-" if index == 0 else "--", label=result["name"]
        )
    all_axes[3].set_title("loss by step")
    all_axes[3].legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=_FAINT)
    _save(plt, figure, path)
    return True


def _save(plt: Any, figure: Any, path: Path) -> None:
    with replacing(path) as draft:
        figure.savefig(draft, format="png")
    plt.close(figure)


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The curve in one line of text; "" with fewer than two values."""
    if len(values) < 2:
        return ""
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:]) if b > a]
    low, high = min(means), max(means)
    ticks = "▁▂▃▄▅▆▇█"
    return "".join(ticks[round((mean - low) / ((high - low) or 1) * 7)] for mean in means)
