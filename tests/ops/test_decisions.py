"""The user's table of decisions: one that an older version wrote is used, one that is broken is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.ops import decisions

SECTIONS = ("gemm", "attention", "linear_rows", "linear_4bit")
OWN = {
    "gemm": {"cpu": {"float32": {"rows": 3, "processors": None}}},
    "attention": {"cpu": {"float32": {"tokens": 5, "processors": None}}},
    "linear_rows": {"cpu": {"float32": {"rows": 7, "processors": None}}},
    "linear_4bit": {"cpu": {"float32": {"forward": 9, "backward": 11, "panel_bytes": 4096}}},
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Path]]:
    """written(table): the user's cache has it from now on."""
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    decisions.forget()

    def write(table: Any) -> Path:
        path = tmp_path / "decisions.json"
        path.write_text(json.dumps(table))
        decisions.forget()
        return path

    yield write
    decisions.forget()


@pytest.mark.parametrize("missing", [*((name,) for name in SECTIONS), ("attention", "gemm"), SECTIONS])
def test_a_section_that_is_not_there_is_the_shipped_one(
    written: Callable[[Any], Path], missing: tuple[str, ...]
) -> None:
    shipped = decisions.load()[0]
    path = written({"measured": "long ago", **{name: OWN[name] for name in SECTIONS if name not in missing}})
    table, source = decisions.load()
    assert source == str(path) and decisions.in_force() == "calibrated: long ago"
    assert set(table) == {"measured", *SECTIONS}
    for name in SECTIONS:
        assert table[name] == (shipped if name in missing else OWN)[name]
    rows = decisions.linear_4bit("cpu", torch.float32)
    assert rows == decisions.Rows(**table["linear_4bit"]["cpu"]["float32"])
    assert decisions.save(table) == path and decisions.load()[0] == table  # whole, as calibration writes it


def test_where_it_was_measured_is_not_the_shipped_table_s(written: Callable[[Any], Path]) -> None:
    written({"gemm": OWN["gemm"]})
    assert decisions.in_force() == "calibrated: measured nobody says where"


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("section", [None, [], {"cpu": None}, {"cpu": {"float32": {}}}, {"cpu": {"float32": None}}])
def test_a_section_that_is_broken_is_refused(
    name: str, section: Any, assert_named_unusable: Callable[[Any], None]
) -> None:
    assert_named_unusable({**OWN, name: section})


@pytest.mark.parametrize("name", ["gemm", "attention"])
def test_a_section_without_its_only_entry_is_refused(name: str, assert_named_unusable: Callable[[Any], None]) -> None:
    assert_named_unusable({**OWN, name: {"cpu": {}}})
    assert_named_unusable({**OWN, name: {}})


@pytest.mark.parametrize("table", [None, [], ["gemm"], "gemm", 3])
def test_what_is_no_table_is_refused(table: Any, assert_named_unusable: Callable[[Any], None]) -> None:
    assert_named_unusable(table)


def test_a_table_that_is_written_has_every_section(written: Callable[[Any], Path]) -> None:
    with pytest.raises(KeyError, match="attention"):
        decisions.save({name: OWN[name] for name in SECTIONS if name != "attention"})
