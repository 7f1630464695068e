"""What `patch` did, module by module: fused as what, or left and why."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..memory.planner import Plan

_COLUMNS = (("module", 4), ("×", None), ("kind", 2), ("fused as", 4), ("form, or why it was left", 6))


@dataclass(frozen=True)
class Row:
    """One module. Exactly one of `fused` and `reason` is set."""

    module: str
    kind: str
    fused: str | None = None  # the operator, with the other members where it is a group
    form: str | None = None  # how the base weights and the adapters are computed, and why so
    reason: str | None = None  # why the module is as it was


@dataclass
class Report:
    """The rows in the order of the model's modules. `print(report)` draws a table; `to_dict()` is for programs."""

    rows: list[Row] = field(default_factory=list)
    patched: bool = False
    note: str | None = None
    checkpoint: list[str] = field(default_factory=list)  # the mode of each layer, where there are any
    plan: Plan | None = None  # with checkpoint="auto"

    @property
    def fused(self) -> list[Row]:
        """The rows of the modules that were replaced."""
        return [row for row in self.rows if row.fused is not None]

    @property
    def left(self) -> list[Row]:
        """The rows of the modules that are as they were."""
        return [row for row in self.rows if row.fused is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {"patched", "note", "checkpoint", "plan", "fused", "left", "rows": [{"module", "kind", …}]}."""
        return {
            "patched": self.patched,
            "note": self.note,
            "checkpoint": self.checkpoint,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "fused": len(self.fused),
            "left": len(self.left),
            "rows": [asdict(row) for row in self.rows],
        }

    def summary(self) -> str:
        """One line."""
        if not self.rows:
            return "fastpeft: no adapters found, nothing to fuse"
        not_patched = "" if self.patched else " (not patched)"
        return f"fastpeft: {len(self.fused)} of {len(self.rows)} modules fused{not_patched}"

    def __str__(self) -> str:
        text = io.StringIO()
        try:
            from rich.console import Console
        except ImportError:
            return "\n".join([self.summary(), *(_plain_line(*line) for line in self._lines()), *self._notes()])
        terminal = sys.stdout.isatty()
        console = Console(file=text, force_terminal=terminal, width=None if terminal else 140)
        console.print(self.__rich__())
        return text.getvalue().rstrip("\n")

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.summary(), title_justify="left", title_style="bold")
        for heading, width in _COLUMNS:
            table.add_column(heading, ratio=width, overflow="fold")
        for module, count, row in self._lines():
            done = Text(row.fused, "green") if row.fused else Text("left", "yellow")
            table.add_row(Text(module), str(count), Text(row.kind), done, Text(row.form or row.reason or ""))
        return Group(*([table] if self.rows else [self.summary()]), *self._notes())

    def _notes(self) -> list[str]:
        notes = [f"note: {self.note}"] if self.note else []
        if self.plan is not None:
            return [*notes, str(self.plan)]
        modes = ", ".join(f"{mode} × {count}" for mode, count in Counter(self.checkpoint).items())
        return [*notes, f"checkpointing, by layers: {modes}"] if modes else notes

    def _lines(self) -> Iterable[tuple[str, int, Row]]:
        """Neighbours that differ only in the layer number or the last name, together: names, how many, one of them."""
        together: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            place = re.sub(r"(?<=\.)\d+(?=\.)", "#", row.module.rpartition(".")[0])
            reason = row.reason and re.sub(r"\d[\d.e-]*", "#", row.reason)  # measured errors differ from layer to layer
            together.setdefault((place, row.kind, row.fused, row.form, reason), []).append(row)
        for rows in together.values():
            yield _common_name([row.module for row in rows]), len(rows), rows[0]


def _common_name(names: list[str]) -> str:
    """`a.{0-3}.b, c` for a.0.b, a.0.c … a.3.b, a.3.c."""
    *columns, last = (list(dict.fromkeys(column)) for column in zip(*(name.split(".") for name in names)))
    merged = [column[0] if len(column) == 1 else "{" + _ranges(sorted(map(int, column))) + "}" for column in columns]
    return ".".join([*merged, ", ".join(last)])


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _plain_line(module: str, count: int, row: Row) -> str:
    return f"{module}  x{count}  {row.kind}  {row.fused or 'left'}  {row.form or row.reason or ''}"
