"""Every Triton kernel compiles for sm_80, 90, 100 and 120 without a spill, and the wide ones use wgmma on sm_90.

One case of tools/kernel_report.py a kernel, the heaviest, or one that spilled once; the tool compiles all. Each worker
has one compiling process, and each case and target is a test, so that workers share them evenly.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from apart import compiling_process

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
    pytest.skip("this Triton ships no NVIDIA tools", allow_module_level=True)

CASES = {
    "philox mask": {"mask"},
    "shrink r16 x3 dropout": {"shrink"},
    "expand r16 x3": {"expand"},
    "expand_backward r16": {"expand_backward", "sum_parts"},
    "shrink_backward r16 x3 dropout": {"shrink_backward"},
    "shrink_backward r128 dropout": {"outer", "expand"},
    "wide r16 x3": {"wide"},
    "wide_backward r16 x3 dropout": {"wide_backward"},
    "embedding r16": {"gather", "embedding", "scatter"},
    "dora gain": {"gain"},
    "dora mix r16": {"mix"},
    "dora backward r16": {"backward"},
    "dora dropout": {"dropout"},
    "weight_norm r384": {"terms", "root"},
    "glu forward gelu": {"glu"},
    "glu backward gelu": {"glu_backward"},
    "glu shrink r16 x3 dropout": {"glu_shrink"},
    "glu shrink_backward r64 dropout": {"glu_shrink_backward"},
    "rope D128": {"rope"},
    "4 bits dequantize": {"dequantize_4bit"},
    "4 bits linear 64 rows": {"linear_4bit"},
    "4 bits linear_backward 64 rows": {"linear_4bit_backward"},
    "layer_norm K 4096": {"norm"},
    "layer_norm_backward K 8192": {"norm_backward"},
    "rms_norm_backward K 16384": {"norm_backward", "parameters"},
    "rms_norm_shrink K 4096 r16 x3 dropout": {"norm_shrink"},
    "layer_norm_shrink_backward K 4096 r16 x3 dropout": {"norm_shrink_backward", "norm_outer"},
    "layer_norm_shrink_backward K 4096 r32 x2 fp32 dropout": {"norm_shrink_backward", "remake", "outer"},
    "cross_entropy accumulate cap": {"cross_entropy_accumulate"},
    "cross_entropy gradient fp32 cap columns odd": {"cross_entropy_gradient"},
}
TARGETS = (80, 90, 100, 120)


@pytest.fixture(scope="module")
def compiled():
    """compiled(case, target) is a row per kernel."""
    with compiling_process(ROOT / "tools") as call:
        yield lambda case, target: call("kernel_report", "report", [case], [target])


def test_every_kernel_has_a_case():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r"^def _?(\w+)_kernel\(", sources, re.MULTILINE)) == set().union(*CASES.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_no_kernel_spills(compiled, case, target):
    rows = compiled(case, target)
    assert {row["kernel"] for row in rows} >= CASES[case]
    assert not [row for row in rows if row["spills"]]
    for row in rows:
        if row["kernel"].startswith("wide"):
            assert row["mma"], "no tensor cores"
            if target == 90:
                assert row["ptx_wgmma"] and set(row["mma"]) == {"wgmma"}
        if row["kernel"] == "gather":
            # As PyTorch's embedding: an index out of range stops the kernel, where a gather would read at random.
            assert row["asserts"]
