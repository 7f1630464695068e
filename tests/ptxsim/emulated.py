# ruff: noqa: E402
"""Runs the Triton launchers on the PTX emulator and prints what was counted, as JSON: {case: [a row per launch]}.

A program of its own, since Triton decides at import whether kernels are compiled or interpreted. The emulator executes
the PTX that was compiled for sm_80 and stops at the first access outside a tensor or of memory never written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path[:0] = [str(Path(__file__).parents[1] / "ops"), str(Path(__file__).parents[2] / "tools")]

import ptxsim
import torch
from count_traffic import recording
from glu_results import case as glu_case
from norm_operands import norm_case
from test_cross_entropy_triton import test_equals_the_reference as cross_entropy_equals_the_reference
from test_glu_triton import check as check_glu
from test_lora_embedding_triton import test_equals_the_reference as embedding_equals_the_reference
from test_lora_linear_triton import BF16, FP16, FP32, Case, check
from test_nf4_triton import check_bits as four_bits_are_decoded
from test_nf4_triton import check_products as four_bits_are_multiplied
from test_norms_triton import FUNCTIONS, KINDS
from test_norms_triton import check as check_norm
from test_norms_triton import launch as launch_norm
from test_philox_triton import test_mask_is_the_references as mask_is_the_references
from test_rope_triton import Case as RopeCase
from test_rope_triton import check as check_rope
from tolerance import no_worse

from fastpeft.ops.backend import OPS

CPU = torch.device("cpu")


def norms(rows: int, columns: int, *dtypes: torch.dtype, members: int, rank: int, p: float, gap: int) -> None:
    """Both norms, alone and with the narrow products: x, y, adapters and parameters of these dtypes."""
    for kind in KINDS:
        check_norm(kind, no_worse, norm_case(rows, columns, *dtypes, members=members, rank=rank, p=p, gap=gap))


def norms_of_long_rows() -> None:
    """Longer than what stays in registers: dweight and dbias by a kernel of their own."""
    x, dy, w = (torch.randn(*shape).to(BF16) for shape in ((2, 16400), (2, 16400), (16400,)))
    for kind in KINDS:
        ops, parameters = FUNCTIONS[kind][0], (w, w) if kind == "layer_norm" else (w,)
        found = []
        for implementation in (ops, OPS["reference"]):
            y, *kept = getattr(implementation, kind)(x, *parameters, 1e-5, 0.0, BF16)
            backward = getattr(implementation, f"{kind}_backward")
            found.append([y, *backward(dy, x, *kept, *parameters, 0.0, None, *[True] * len(parameters))])
        torch.testing.assert_close(*found)


CASES = {
    "philox": lambda: mask_is_the_references(17, 515, 2, 0.05, 1234567890123456789, CPU),
    "aligned": lambda: check(Case(128, 256, [256], 16, pad=16)),
    "aligned dropout": lambda: check(Case(128, 256, [128, 64, 64], 16, 0.1, pad=16)),
    "fp32 adapter": lambda: check(Case(64, 128, [128], 16, 0.1, (BF16, FP32), pad=16)),
    "fp32": lambda: check(Case(64, 128, [64, 64], 8, 0.1, (FP32, FP32), [1.0, 2.0])),
    "odd fp16": lambda: check(Case(33, 99, [5, 33, 1, 40, 7], 3, 0.5, (FP16, FP16), [1.0, 2.0, 3.0, 4.0, 5.0])),
    "rank 160": lambda: check(Case(40, 96, [64], 160, 0.1)),
    "one row": lambda: check(Case(1, 128, [64], 16)),
    "split sums": lambda: check(Case(160, 2304, [288], 16, pad=0)),
    "norms": lambda: norms(32, 192, BF16, BF16, BF16, BF16, members=2, rank=16, p=0.1, gap=16),
    "norms 576": lambda: norms(16, 576, BF16, BF16, BF16, BF16, members=1, rank=16, p=0.0, gap=0),
    "norms 8192": lambda: norms(3, 8192, BF16, BF16, BF16, BF16, members=1, rank=16, p=0.0, gap=0),
    "norms fp32": lambda: norms(16, 576, FP32, FP32, FP32, FP32, members=1, rank=16, p=0.1, gap=16),
    "odd norms": lambda: norms(9, 51, FP16, FP16, FP32, FP16, members=5, rank=3, p=0.1, gap=3),
    "norms of long rows": norms_of_long_rows,
    "cross_entropy": lambda: cross_entropy_equals_the_reference(CPU, BF16, (8192,), 1.0, 0.0),
    "odd cross_entropy": lambda: cross_entropy_equals_the_reference(CPU, FP16, (37, 130), 0.7, 4.0),
    "glu": lambda: check_glu(glu_case(64, 256, 1, 16, BF16, BF16, 0.1, "silu", gap=16)),
    "glu plain odd": lambda: check_glu(glu_case(33, 71, 2, 5, FP16, FP32, 0.1, "gelu", False)),
    # Enough tokens for a program on every multiprocessor: then each reads its rows of the tables once.
    "rope": lambda: check_rope(RopeCase(1, 872, (1, 1), 128, 128, dtype=BF16)),
    "rope interleaved": lambda: check_rope(RopeCase(1, 872, (1, 1), 128, 128, True, dtype=BF16)),
    "rope few tokens": lambda: check_rope(RopeCase(2, 3, (3, 1), 26, 10, True, dtype=FP16, table=FP32, shared=False)),
    "4 bits": lambda: four_bits_are_decoded(16, 256, 64, True, "nf4", BF16),
    "4 bits odd": lambda: four_bits_are_decoded(5, 51, 32, True, "nf4", FP16),
    "4 bits products": lambda: four_bits_are_multiplied(16, 64, 128),
    "embedding": lambda: embedding_equals_the_reference(150, 3, 48, 16, -1, BF16, BF16, torch.int64, CPU),
}


def main() -> None:
    torch.set_num_threads(1)
    out: dict[str, object] = {}
    for name, run in CASES.items():
        torch.manual_seed(0)
        with ptxsim.emulate() as log:
            run()
        out[name] = [
            {
                "kernel": r.kernel.strip("_").removesuffix("_kernel"),
                "load": r.load_efficiency,
                "store": r.store_efficiency,
                "conflicts": r.bank_conflicts,
                "wavefronts": r.shared_wavefronts,
                "floor": r.dram_floor,
                "l2": r.l2_bytes,
            }
            for r in log
        ]
    # The same launches by tools/count_traffic.py, on the multiprocessors that CPU tensors are given.
    with recording(108, 163 * 1024) as log:
        Case(128, 256, [256], 16, pad=16).triton()
        first = len(log)
        for kind in KINDS:
            case = norm_case(32, 192, BF16, BF16, BF16, BF16, members=2, rank=16, p=0.1, gap=16)
            launch_norm(kind, case)
    for rows, some in ((out["aligned"], log[:first]), (out["norms"], log[first:])):
        for row, (_, operands) in zip(rows, some, strict=True):
            row["counted"] = sum(size for _, size in operands.values())
    print(json.dumps(out))


if __name__ == "__main__":
    main()
