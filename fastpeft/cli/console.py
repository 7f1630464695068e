"""What the commands share in how they speak: one console, quiet libraries, sizes a person can read."""

from __future__ import annotations

import logging
import os
import warnings

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

console = Console(theme=Theme({"name": "cyan", "good": "green", "bad": "bold red", "warn": "yellow", "faint": "dim"}))
errors = Console(stderr=True, theme=Theme({"bad": "bold red", "warn": "yellow"}))


def quiet_libraries() -> None:
    """Keep bars and advice of the libraries underneath out of our output; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # without the package `kernels` its import warns
    from huggingface_hub.utils import disable_progress_bars as disable_hub_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_hub_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning)


def size(count: float) -> str:
    """Bytes in binary units, three figures: 1.47 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB" if abs(count) < 100 else f"{count:.0f} TiB"


def number(count: float) -> str:
    """A count in short form: 4.88M, 134M, 1.7B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(count) >= limit:
            return f"{count / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """42s, 3m 07s, 1h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def facts(title: str, rows: dict[str, str], style: str = "cyan") -> Panel:
    """A panel of name and value lines; a value may carry rich markup."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="faint", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        grid.add_row(key, Text.from_markup(value))
    return Panel(grid, title=f"[bold]{title}[/bold]", title_align="left", border_style=style, expand=False)


def warn(message: str) -> None:
    """One line of warning; the message is shown as it is, without markup."""
    console.print(Text.assemble(("! ", "warn"), message))
