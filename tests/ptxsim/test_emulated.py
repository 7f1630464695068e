"""The compiled Triton kernels, executed on a PTX emulator: right, no stray access, coalesced, every byte read once.

Skipped where the emulator `ptxsim` cannot be imported; FASTPEFT_PTXSIM may name its folder. A case of emulated.py is a
test: its results are checked there as the tests in tests/ops do it, and here what its launches did to memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apart import compiling_process

FOLDER = os.environ.get("FASTPEFT_PTXSIM", "")
SPEC = importlib.util.find_spec("ptxsim")  # a folder of that name without a module in it, as this one, has no origin
if not (Path(FOLDER, "ptxsim").is_dir() if FOLDER else SPEC and SPEC.origin):
    pytest.skip("the PTX emulator ptxsim is not here (FASTPEFT_PTXSIM=folder)", allow_module_level=True)
pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Row = dict[str, Any]


def coalesced(row: Row) -> None:
    """At least 95 % of the bytes of the sectors that a warp's accesses touch are used."""
    assert min(row["load"] or 1, row["store"] or 1) >= 0.95


def stores_coalesced(row: Row) -> None:
    """Where what is loaded are a few scalars, or tables that the data index."""
    assert row["store"] >= 0.95


def few_conflicts(row: Row) -> None:
    # norm_outer meets conflicts on its sums' way out of the registers, once a program: much beside a few rows.
    if row["kernel"] != "norm_outer":
        assert row["conflicts"] <= 0.1 * row["wavefronts"]


def little_from_l2(row: Row) -> None:
    """Within 1.1 times the bytes of the operands; 1.15 where blocks of rows each read the adapter."""
    if row["kernel"] != "sum_parts":
        assert row["l2"] <= (1.15 if "shrink" in row["kernel"] else 1.1) * row["floor"]


def moved_once(row: Row) -> None:
    """What tools/count_traffic.py takes for a launch's traffic is what the emulator saw: no byte more, none missed."""
    assert row["floor"] == row["counted"]


def big_operand_once(row: Row) -> None:
    """Not only from memory but also from L2. The rest is s, ds, partial sums, and the adapter that each block reads."""
    M, K, N, size = 128, 256, 256, 2
    big = {"shrink": M * K, "expand": 2 * M * N, "expand_backward": M * N, "shrink_backward": 3 * M * K}
    if row["kernel"] in big:
        assert row["l2"] <= 1.75 * big[row["kernel"]] * size


LORA = {"shrink", "expand", "expand_backward", "shrink_backward", "wide", "wide_backward"}
NORMS = {"norm", "norm_backward", "norm_shrink", "norm_shrink_backward", "norm_outer"}
CROSS_ENTROPY = {"cross_entropy_accumulate", "cross_entropy_gradient"}
GLU = {"glu", "glu_backward", "glu_shrink", "glu_shrink_backward"}
DORA = {"gain", "mix", "backward", "dropout"}

# The kernels that a case must launch, and what holds for each launch.
CASES: dict[str, tuple[set[str], tuple[Callable[[Row], None], ...]]] = {
    "philox": ({"mask"}, ()),
    "aligned philox": ({"mask"}, (stores_coalesced,)),
    "aligned": (LORA, (coalesced, few_conflicts, moved_once, big_operand_once)),
    "aligned dropout": (LORA, (coalesced, few_conflicts)),
    "fp32 adapter": (LORA, (coalesced, few_conflicts)),
    "fp32": (LORA, ()),
    "odd fp16": (LORA, ()),
    "aligned fp32": (LORA, (coalesced,)),
    "rank 160": ({"shrink", "expand", "outer"}, ()),
    "one row": ({"shrink", "expand"}, ()),
    "split sums": ({"sum_parts"}, (coalesced, few_conflicts)),
    "norms": (NORMS, (moved_once,)),
    "norms 576": (NORMS, (coalesced, few_conflicts)),
    "norms 8192": (NORMS, (coalesced, few_conflicts)),
    "norms fp32": (NORMS, (coalesced, few_conflicts)),
    "odd norms": ({"norm", "norm_backward", "norm_shrink", "norm_outer", "remake"}, ()),
    "norms of long rows": ({"norm", "norm_backward", "parameters"}, (coalesced,)),
    "cross_entropy": (CROSS_ENTROPY, (few_conflicts,)),
    "odd cross_entropy": (CROSS_ENTROPY, ()),
    "glu": (GLU, (coalesced, little_from_l2)),
    "glu plain odd": ({"glu", "glu_backward"}, ()),
    "rope": ({"rope"}, (coalesced, little_from_l2)),
    "rope interleaved": ({"rope"}, (coalesced, little_from_l2)),
    "rope few tokens": ({"rope"}, ()),
    "4 bits": ({"dequantize_4bit"}, ()),
    "4 bits odd": ({"dequantize_4bit"}, ()),
    "4 bits decoded": ({"dequantize_4bit"}, (stores_coalesced,)),
    "4 bits products": ({"linear_4bit", "linear_4bit_backward"}, (stores_coalesced,)),
    "dora": (DORA, (coalesced,)),
    "odd dora": (DORA, ()),
    "weight_norm": ({"terms", "root"}, (coalesced,)),
    "embedding": ({"gather", "embedding", "scatter"}, ()),
}


@pytest.fixture(scope="module")
def emulate():
    """emulate(case) is a row per launch. A wrong result or a stray access raises, with its PTX line."""
    with compiling_process(HERE, ROOT / "tests/ops", ROOT / "tools", FOLDER) as call:
        yield lambda case: call("emulated", "emulate", case)


def test_every_kernel_has_a_case():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def _?(\w+)_kernel\(", sources, re.MULTILINE))
    assert kernels == set().union(*(kernels for kernels, _ in CASES.values()))


@pytest.mark.parametrize("case", CASES)
def test_right_and_lean(emulate, case):
    kernels, checks = CASES[case]
    rows = emulate(case)
    assert {row["kernel"] for row in rows} >= kernels
    for row in rows:
        for check in checks:
            check(row)
    if case == "cross_entropy":
        # A tile of logits is read and written once; the second reading is the cache's. The rest is scalars of a row,
        # and sums where it is rescaled.
        tile = 5 * 8192 * 2
        for row, floor, l2 in zip(rows, (1.01, 2.03, 2.01), (2.1, 3.15, 2.1), strict=True):
            assert row["floor"] <= floor * tile and row["l2"] <= l2 * tile, row
            assert row["conflicts"] == 0 and row["load"] >= 0.95, row
        # The first launch stores a few scalars of a row and nothing else.
        assert min(row["store"] for row in rows[1:]) >= 0.95
