"""`fastpeft bench --calibrate`: the user's table of decisions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastpeft.cli.app import app
from fastpeft.cli.calibrate import calibrate
from fastpeft.ops import decisions
from fastpeft.ops.backend import cpu_extension, native_calls


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    decisions.forget()
    yield tmp_path
    decisions.forget()


def test_the_table_is_measured_written_and_used(cache: Path) -> None:
    assert decisions.in_force().startswith("shipped: ")
    before = decisions.load()[0]
    path = calibrate("cpu", None, rows=(1, 2), shape=(64, 64), steps=1, gemm_rows=(4, 8), few_rows=(1, 3))
    assert path == cache / "decisions.json"
    table = json.loads(path.read_text())
    assert decisions.in_force() == f"calibrated: {table['measured']}"
    assert table["linear_4bit"]["cuda"] == before["linear_4bit"]["cuda"]
    gemm = table["gemm"]["cpu"]["float32"]
    if native_calls():
        assert gemm["rows"] in (4, 8, None) and gemm["processors"] is None  # this machine's own, whoever made it
        assert decisions.gemm_rows() == (gemm["rows"] or float("inf")) or cpu_extension().isa() == "scalar"
        for name, entry in table["linear_rows"]["cpu"].items():
            assert entry["rows"] in (0, 1, 3) and entry["processors"] is None
            assert decisions.linear_rows(getattr(torch, name)) == entry["rows"] or cpu_extension().isa() == "scalar"
    else:
        assert gemm == before["gemm"]["cpu"]["float32"] and table["linear_rows"] == before["linear_rows"]
    for name in ("float32", "bfloat16", "float16"):
        entry = table["linear_4bit"]["cpu"][name]
        assert entry["forward"] in (0, 1, 2) and entry["backward"] in (0, 1, 2)
        assert decisions.linear_4bit("cpu", getattr(torch, name)) == decisions.Rows(**entry)


def test_it_measures_nothing_else(cache: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--calibrate", "--model", "smollm2-6l"])
    assert result.exit_code == 2 and not (cache / "decisions.json").exists()


def test_forced_answers_end_with_their_block(cache: Path) -> None:
    usual = decisions.linear_4bit("cpu", torch.float32)
    with decisions.forced(decisions.Rows(5, 6, 7)):
        assert decisions.linear_4bit("cpu", torch.float32) == decisions.Rows(5, 6, 7)
    assert decisions.linear_4bit("cpu", torch.float32) == usual
