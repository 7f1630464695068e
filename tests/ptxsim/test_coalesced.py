"""No uncoalesced access in any Triton kernel, by the count of tools/coalescing_report.py on the PTX emulator.

Of the bytes in the sectors that a launch's loads move, and its stores, 95 % are used; or 95 % of the sectors are moved
once by a program that needs them, where a scalar of a row or a gathered column is less than a sector. The same holds
for every single access that moves more than a twentieth of a launch's bytes. A case at least for each kernel.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from apart import compiling_process
from test_emulated import FOLDER, ROOT

ENOUGH = 0.95
Row = dict[str, Any]

CASES = {
    "philox mask": {"mask"},
    "shrink r16 x3 dropout": {"shrink"},
    "shrink r16 one row": {"shrink", "sum_parts"},
    "shrink r64 bf16 x fp32 A": {"shrink"},
    "expand r16": {"expand"},
    "expand_backward r16": {"expand_backward", "sum_parts"},
    "shrink_backward r16 x3 dropout": {"shrink_backward"},
    "shrink_backward r128 dropout": {"outer", "expand"},
    "wide r16": {"wide"},
    "wide_backward r16 dropout": {"wide_backward"},
    "dora gain": {"gain"},
    "dora mix r16": {"mix"},
    "dora backward r16": {"backward"},
    "dora dropout": {"dropout"},
    "weight_norm r16": {"terms", "root"},
    "weight_norm r16 cancelling": {"root"},
    "glu forward": {"glu"},
    "glu backward": {"glu_backward"},
    "glu shrink r16 x3 dropout": {"glu_shrink"},
    "glu shrink_backward r16 dropout": {"glu_shrink_backward"},
    "rope D80 partial": {"rope"},
    "rope D128 interleaved": {"rope"},
    "embedding r16": {"gather", "embedding", "scatter"},
    "embedding r64": {"gather", "embedding", "scatter"},
    "4 bits dequantize": {"dequantize_4bit"},
    "4 bits linear": {"linear_4bit"},
    "4 bits linear not nested": {"linear_4bit"},
    "4 bits linear fp32": {"linear_4bit"},
    "4 bits linear_backward": {"linear_4bit_backward"},
    "4 bits linear_backward fp32": {"linear_4bit_backward"},
    "cross_entropy accumulate": {"cross_entropy_accumulate"},
    "cross_entropy gradient": {"cross_entropy_gradient"},
    "rms_norm K 576": {"norm"},
    "layer_norm_backward K 192": {"norm_backward", "sum_parts"},
    "rms_norm_backward K 4096": {"norm_backward"},
    "layer_norm_backward K 16384": {"norm_backward", "parameters"},
    "layer_norm_shrink K 192 r16 x3 dropout": {"norm_shrink"},
    "layer_norm_shrink_backward K 192 r16 x3 dropout": {"norm_shrink_backward", "norm_outer"},
    "rms_norm_shrink_backward K 512 r64 x3": {"norm_shrink_backward", "remake"},
}

# Rows that begin at any element are read an element a lane; a request of 64 bytes then lies in three sectors. Not more.
ODD = ("shrink r16 K odd", "expand r16 N odd", "shrink_backward r16 K odd", "wide r16 K odd", "dora backward r16 N odd")


@pytest.fixture(scope="module")
def counted() -> Iterator[Callable[[str], list[Row]]]:
    """counted(case) is a row per access of each launch."""
    with compiling_process(ROOT / "tools", FOLDER) as call:
        yield lambda case: call("coalescing_report", "counted", case)


def share(rows: Iterable[Row], of: str) -> float:
    """The part of the sectors moved that was used, or needed once."""
    rows = list(rows)
    return sum(row["moved"] * min(row[of], 1.0) for row in rows) / sum(row["moved"] for row in rows)


def coalesced(rows: Iterable[Row]) -> bool:
    rows = list(rows)
    return max(share(rows, "used"), share(rows, "once")) >= ENOUGH


def test_every_kernel_has_a_case():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r"^def _?(\w+)_kernel\(", sources, re.MULTILINE)) == set().union(*CASES.values())


@pytest.mark.parametrize("case", CASES)
def test_sectors_are_used_or_moved_once(counted, case):
    launches: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in counted(case):
        launches[row["launch"], row["kind"]].append(row)
    assert {row["kernel"] for rows in launches.values() for row in rows} >= CASES[case]
    for rows in launches.values():
        assert coalesced(rows), rows
        moved = sum(row["moved"] for row in rows)
        for row in rows:
            assert coalesced([row]) or row["moved"] <= (1 - ENOUGH) * moved, row


@pytest.mark.parametrize("case", ODD)
def test_rows_that_begin_anywhere_are_read_in_runs(counted, case):
    for row in counted(case):
        assert max(row["run"], row["once"]) >= ENOUGH, row
