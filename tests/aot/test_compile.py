"""Every Triton kernel compiles for sm_80, 90, 100 and 120 without a spill, and the wide ones use wgmma on sm_90.

The cases are those of tools/kernel_report.py that cover each kernel once and the heaviest tiles; the tool does all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
    pytest.skip("this Triton ships no NVIDIA tools", allow_module_level=True)

CASES = (
    "philox mask",
    "shrink r16",
    "shrink r128 K odd",
    "shrink r16 x3 dropout",
    "shrink r512",
    "expand r16 x3",
    "expand_backward r128",
    "shrink_backward r16 x3 dropout",
    "shrink_backward r16 x4 dropout",
    "shrink_backward r16 x3 fp32 dropout",
    "shrink_backward r512 dropout",
    "wide r16 x3",
    "wide r16 fp32",
    "wide_backward r16 x3 dropout",
    "glu backward gelu",
    "glu shrink r16 x3 dropout",
    "glu shrink_backward r16 x3 dropout",
    "rope D128",
    "rope D128 interleaved",
    "embedding r16",
    "4 bits dequantize",
    "4 bits linear 64 rows",
    "4 bits linear_backward 64 rows",
    "dora mix r16",
    "dora backward r16",
    "dora backward r128",
    "dora dropout",
    "weight_norm r384",
    "rms_norm K 4096",
    "layer_norm K 8192",
    "rms_norm_backward K 576",
    "layer_norm_backward K 8192",
    "rms_norm_backward K 16384",
    "rms_norm_shrink K 4096 r16 x3 dropout",
    "rms_norm_shrink_backward K 4096 r64 x3",
    "layer_norm_shrink_backward K 4096 r16 x3 dropout",
    "cross_entropy accumulate cap",
    "cross_entropy gradient fp32 cap columns odd",
)
TARGETS = (80, 90, 100, 120)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """One compiling process per pair of targets."""
    command = [sys.executable, str(ROOT / "tools/kernel_report.py"), "--exact", "--json"]
    command += [part for case in CASES for part in ("--case", case)]
    runs = [
        subprocess.Popen(
            [*command, *(part for target in pair for part in ("--target", str(target)))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0"},
        )
        for pair in (TARGETS[:2], TARGETS[2:])
    ]
    out = []
    for run in runs:
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stderr[-3000:]
        out += json.loads(stdout)
    return out


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(rows, target):
    compiled = [row for row in rows if row["target"] == target]
    assert {row["kernel"] for row in compiled} >= {
        "mask", "shrink", "expand", "expand_backward", "shrink_backward", "outer", "wide", "wide_backward",
        "gather", "embedding", "scatter", "dequantize_4bit", "linear_4bit",
        "linear_4bit_backward", "glu_backward", "glu_shrink", "glu_shrink_backward", "rope",
        "norm", "norm_backward", "parameters", "remake", "norm_shrink",
        "norm_shrink_backward", "norm_outer", "cross_entropy_accumulate", "cross_entropy_gradient",
    }  # fmt: skip
    assert not [row for row in compiled if row["spills"]]


def test_wide_kernels_use_wgmma_on_hopper(rows):
    hopper = [row for row in rows if row["target"] == 90 and "fp32" not in row["case"]]
    wide = [row for row in hopper if row["kernel"].startswith("wide")]
    assert len(wide) == 2
    assert all(row["ptx_wgmma"] and row["mma"].get("wgmma") and not row["mma"].get("mma") for row in wide)


def test_wide_kernels_use_tensor_cores_everywhere(rows):
    for row in rows:
        if row["kernel"].startswith("wide") and "fp32" not in row["case"]:
            assert row["mma"], row


def test_an_embedding_index_out_of_range_stops_the_kernel(rows):
    """As PyTorch's embedding does: the check is compiled in, where a gather would read at random."""
    gathers = [row for row in rows if row["kernel"] == "gather"]
    assert gathers and all(row["asserts"] for row in gathers)
