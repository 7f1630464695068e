"""`fastpeft bench --report`: the page it writes stands alone and shows what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
def test_a_sweep_makes_a_page_that_stands_alone(fastpeft_command: Callable[..., Any], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 256, **SIZES}))
    common = ("bench", "--config", config, "--baseline", "eager", "--batch", 1, "--steps", 1, "--warmup", 0)
    fastpeft_command(
        *common, "--lengths", "48,96", "--checkpoints", "block", "--device", "cpu", "--report", tmp_path / "out"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "http" not in page  # nothing is fetched from elsewhere
    for name in ("throughput", "memory", "saved", "frontier"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [(r["implementation"], r["checkpoint"], r["length"]) for r in rows] == [
        (name, "block", length) for length in (48, 96) for name in ("fastpeft", "eager")
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["peak_growth_bytes"] > 0 and row["estimated_growth_bytes"] > 0
        assert f"{row['length']:,}" in page


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--lengths", "48,x", "--report", "out"), "needs numbers"),
        (("--checkpoints", "blocks", "--report", "out"), "choose from none, selective"),
        (("--lengths", "48"), "is for the sweep that --report makes"),
    ],
)
def test_mistakes(fastpeft_command: Callable[..., Any], option: tuple[str, ...], words: str) -> None:
    told = fastpeft_command("bench", "--model", "smollm2-6l", "--baseline", "eager", *option, code=2).output
    assert words in " ".join(told.replace("│", " ").split())
