"""`fastpeft bench --calibrate`: the user's table of decisions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastpeft.cli.app import app
from fastpeft.cli.calibrate import _from_line, _from_tokens, calibrate
from fastpeft.measure import Contender, StepTimes
from fastpeft.ops import decisions
from fastpeft.ops.backend import cpu_extension, native_calls


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
    decisions.forget()
    yield tmp_path
    decisions.forget()


def test_the_table_is_measured_written_and_used(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decisions.in_force().startswith("shipped: ")
    before = decisions.load()[0]
    path = calibrate(
        "cpu", None, rows=(1, 2), shape=(64, 64), steps=1, gemm_rows=(4, 8), few_rows=(1, 3), attention_tokens=(4, 20)
    )
    assert path == cache / "decisions.json"
    table = json.loads(path.read_text())
    assert decisions.in_force() == f"calibrated: {table['measured']}"
    assert table["linear_4bit"]["cuda"] == before["linear_4bit"]["cuda"]
    gemm = table["gemm"]["cpu"]["float32"]
    assert ("attention in fp32: " in capsys.readouterr().out) == native_calls()
    if native_calls():
        assert gemm["rows"] in (4, 8, None) and gemm["processors"] is None  # this machine's own, whoever made it
        assert decisions.gemm_rows() == (gemm["rows"] or float("inf")) or cpu_extension().isa() == "scalar"
        attention = table["attention"]["cpu"]["float32"]
        assert attention["tokens"] in (4, 20, None) and attention["processors"] is None
        assert (
            decisions.attention_tokens() == (attention["tokens"] or float("inf")) or cpu_extension().isa() == "scalar"
        )
        for name, entry in table["linear_rows"]["cpu"].items():
            assert entry["rows"] in (0, 1, 3) and entry["processors"] is None
            assert decisions.linear_rows(getattr(torch, name)) == entry["rows"] or cpu_extension().isa() == "scalar"
    else:
        assert all(table[name] == before[name] for name in ("gemm", "attention", "linear_rows"))
    for name in ("float32", "bfloat16", "float16"):
        entry = table["linear_4bit"]["cpu"][name]
        assert entry["forward"] in (0, 1, 2) and entry["backward"] in (0, 1, 2)
        assert decisions.linear_4bit("cpu", getattr(torch, name)) == decisions.Rows(**entry)


@pytest.mark.skipif(not native_calls(), reason="no C++ extension")
@pytest.mark.parametrize(("slower_at", "least"), [((), 4), ((4, 8), 16), ((8,), 16), ((16,), None)])
def test_attention_is_ours_from_where_on_it_is_never_slower(
    monkeypatch: pytest.MonkeyPatch, slower_at: tuple[int, ...], least: int | None
) -> None:
    """Both contenders are run, and are the same gradient; their times are made up."""
    descending = iter((16, 8, 4))

    def made_up(contenders: list[Contender], **_: object) -> dict[str, StepTimes]:
        torch.testing.assert_close(*(contender.step(0) for contender in contenders))
        seconds = {"ours": 2.0 if next(descending) in slower_at else 0.5, "theirs": 1.0}
        return {contender.name: StepTimes(contender.name, [seconds[contender.name]]) for contender in contenders}

    monkeypatch.setattr("fastpeft.cli.calibrate.interleave", made_up)
    assert _from_tokens((4, 8, 16), 1) == least


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"tokens": None, "processors": None}, "the vendor's"),
        ({"tokens": 16, "processors": None}, "ours from 16 tokens"),
        ({"tokens": 16, "processors": ["amd", "other"]}, "ours from 16 tokens, on processors of amd, other"),
    ],
)
def test_the_line_of_an_entry(entry: dict[str, object], line: str) -> None:
    assert _from_line(entry, "tokens") == line


def test_it_measures_nothing_else(cache: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--calibrate", "--model", "smollm2-6l"])
    assert result.exit_code == 2 and not (cache / "decisions.json").exists()


def test_forced_answers_end_with_their_block(cache: Path) -> None:
    usual = decisions.linear_4bit("cpu", torch.float32)
    with decisions.forced(decisions.Rows(5, 6, 7)):
        assert decisions.linear_4bit("cpu", torch.float32) == decisions.Rows(5, 6, 7)
    assert decisions.linear_4bit("cpu", torch.float32) == usual
