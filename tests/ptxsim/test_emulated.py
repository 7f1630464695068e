"""The compiled Triton kernels, executed on a PTX emulator: right, no stray access, coalesced, every byte read once.

Skipped where the emulator `ptxsim` cannot be imported; FASTPEFT_PTXSIM may name its folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("FASTPEFT_PTXSIM", "")
SPEC = importlib.util.find_spec("ptxsim")  # a folder of that name without a module in it, as this one, has no origin
if not (Path(FOLDER, "ptxsim").is_dir() if FOLDER else SPEC and SPEC.origin):
    pytest.skip("the PTX emulator ptxsim is not here (FASTPEFT_PTXSIM=folder)", allow_module_level=True)
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def counts() -> dict[str, list[dict[str, float]]]:
    path = os.pathsep.join(p for p in (FOLDER, os.environ.get("PYTHONPATH", "")) if p)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("emulated.py"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-3000:]  # a wrong result or a stray access, with its PTX line
    return json.loads(run.stdout)


def test_results_equal_the_reference(counts):
    kernels = {row["kernel"] for rows in counts.values() for row in rows}
    assert kernels == {
        "mask", "shrink", "expand", "expand_backward", "shrink_backward", "outer", "sum_parts", "wide", "wide_backward",
        "gather", "embedding", "scatter", "dequantize_4bit", "linear_4bit",
        "linear_4bit_backward",
        "norm", "norm_backward", "parameters", "remake", "norm_shrink", "norm_shrink_backward", "norm_outer",
        "cross_entropy_accumulate", "cross_entropy_gradient",
        "glu", "glu_backward", "glu_shrink", "glu_shrink_backward", "rope",
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        "aligned",
        "aligned dropout",
        "fp32 adapter",
        "split sums",
        "norms 576",
        "norms 8192",
        "norms fp32",
        "cross_entropy",
    ],
)
def test_aligned_shapes_are_coalesced_and_free_of_bank_conflicts(counts, case):
    for row in counts[case]:
        assert min(row["load"] or 1, row["store"] or 1) >= 0.95, row
        # norm_outer meets conflicts on its sums' way out of the registers, once a program: much beside a few rows.
        if row["kernel"] != "norm_outer":
            assert row["conflicts"] <= 0.1 * row["wavefronts"], row


@pytest.mark.parametrize("case", ["glu", "rope", "rope interleaved"])
def test_activations_and_rotations_move_what_they_must(counts, case):
    """Coalesced, and from L2 within 1.1 times the bytes of the operands (1.15 where blocks each read the adapter)."""
    for row in counts[case]:
        if row["kernel"] == "sum_parts":
            continue
        assert min(row["load"], row["store"]) >= 0.95, row
        assert row["l2"] <= (1.15 if "shrink" in row["kernel"] else 1.1) * row["floor"], row


def test_every_operand_is_moved_once(counts):
    """What tools/count_traffic.py takes for a launch's traffic is what the emulator saw: no byte more, none missed."""
    for row in counts["aligned"] + counts["norms"]:
        assert row["floor"] == row["counted"], row


def test_a_tile_of_logits_is_read_and_written_once(counts):
    """The second reading is the cache's. The rest is scalars of a row, and sums where it is rescaled."""
    tile = 5 * 8192 * 2
    silent, accumulate, gradient = counts["cross_entropy"]
    for row, floor, l2 in ((silent, 1.01, 2.1), (accumulate, 2.03, 3.15), (gradient, 2.01, 2.1)):
        assert row["floor"] <= floor * tile and row["l2"] <= l2 * tile, row
        assert row["conflicts"] == 0 and row["load"] >= 0.93, row
    assert accumulate["store"] >= 0.99 and gradient["store"] >= 0.99


def test_the_big_operand_is_read_once(counts):
    """Not only from memory but also from L2."""
    M, K, N, size = 128, 256, 256, 2
    big = {"shrink": M * K, "expand": 2 * M * N, "expand_backward": M * N, "shrink_backward": 3 * M * K}
    for row in counts["aligned"]:
        if row["kernel"] in big:
            # The rest is s, ds, partial sums, and the adapter, which each block of rows reads.
            assert row["l2"] <= 1.75 * big[row["kernel"]] * size, row
