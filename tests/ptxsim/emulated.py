"""Runs the Triton launchers on the PTX emulator and returns what was counted, a row per launch.

Imported by a process that compiles kernels (`apart`), never by the tests themselves. The emulator executes the PTX that
was compiled for sm_80 and stops at the first access outside a tensor or of memory never written.
"""

from __future__ import annotations

from collections.abc import Callable

import ptxsim
import torch
from count_traffic import recording
from glu_results import case as glu_case
from norm_operands import norm_case
from test_cross_entropy_triton import test_equals_the_reference as cross_entropy_equals_the_reference
from test_dora_linear_triton import test_backward as dora_backward_equals_eager
from test_dora_linear_triton import test_dropout as dora_dropout_equals_eager
from test_dora_linear_triton import test_forward as dora_equals_eager
from test_dora_linear_triton import test_gain as dora_gain_equals_eager
from test_dora_linear_triton import test_weight_norm as weight_norm_is_exact
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
    x, dy, w = (torch.randn(*shape).to(BF16) for shape in ((2, 16640), (2, 16640), (16640,)))
    for kind in KINDS:
        ops, parameters = FUNCTIONS[kind][0], (w, w) if kind == "layer_norm" else (w,)
        found = []
        for implementation in (ops, OPS["reference"]):
            y, *kept = getattr(implementation, kind)(x, *parameters, 1e-5, 0.0, BF16)
            backward = getattr(implementation, f"{kind}_backward")
            found.append([y, *backward(dy, x, *kept, *parameters, 0.0, None, *[True] * len(parameters))])
        torch.testing.assert_close(*found)


def dora(M: int, N: int, rank: int, pad: int, dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16)) -> None:
    dora_equals_eager(dtypes, M, N, rank, True, CPU, pad)
    dora_backward_equals_eager(dtypes, M, N, rank, True, CPU, pad)
    dora_gain_equals_eager(dtypes[1], CPU, N)
    dora_dropout_equals_eager(dtypes[0], 0.05, CPU, (M, N), pad)


CASES = {
    "philox": lambda: mask_is_the_references(17, 515, 2, 0.05, 1234567890123456789, CPU),
    "aligned philox": lambda: mask_is_the_references(32, 512, 2, 0.05, 1234567890123456789, CPU),
    "aligned": lambda: check(Case(128, 256, [256], 16, pad=16)),
    "aligned dropout": lambda: check(Case(128, 256, [128, 64, 64], 16, 0.1, pad=16)),
    "fp32 adapter": lambda: check(Case(64, 128, [128], 16, 0.1, (BF16, FP32), pad=16)),
    "fp32": lambda: check(Case(64, 128, [64, 64], 8, 0.1, (FP32, FP32), [1.0, 2.0])),
    "odd fp16": lambda: check(Case(33, 99, [5, 33, 1, 40, 7], 3, 0.5, (FP16, FP16), [1.0, 2.0, 3.0, 4.0, 5.0])),
    "aligned fp32": lambda: check(Case(64, 256, [256], 16, 0.1, (FP32, FP32), pad=16)),
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
    "4 bits decoded": lambda: four_bits_are_decoded(32, 512, 64, True, "nf4", BF16),
    "4 bits products": lambda: four_bits_are_multiplied(16, 64, 128),
    "dora": lambda: dora(64, 256, 16, 16),
    "odd dora": lambda: dora(19, 51, 3, 3, (BF16, FP32)),
    "weight_norm": lambda: weight_norm_is_exact((BF16, BF16), 32, 1024, 16, False, CPU),
    "embedding": lambda: embedding_equals_the_reference(150, 3, 48, 16, -1, BF16, BF16, torch.int64, CPU),
}


def counted_by_the_tool(launches: Callable[[], object]) -> list[int]:
    """The bytes of the same launches by tools/count_traffic.py, on the multiprocessors that CPU tensors are given."""
    with recording(108, 163 * 1024) as log:
        launches()
    return [sum(size for _, size in operands.values()) for _, operands in log]


def launch_norms() -> None:
    for kind in KINDS:
        launch_norm(kind, norm_case(32, 192, BF16, BF16, BF16, BF16, members=2, rank=16, p=0.1, gap=16))


COUNTED = {"aligned": lambda: Case(128, 256, [256], 16, pad=16).triton(), "norms": launch_norms}


def emulate(name: str) -> list[dict[str, object]]:
    """A row per launch of a case, whose results are checked as the tests in tests/ops do it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with ptxsim.emulate() as log:
        CASES[name]()
    counted = counted_by_the_tool(COUNTED[name]) if name in COUNTED else [None] * len(log)
    return [
        {
            "kernel": r.kernel.strip("_").removesuffix("_kernel"),
            "load": r.load_efficiency,
            "store": r.store_efficiency,
            "conflicts": r.bank_conflicts,
            "wavefronts": r.shared_wavefronts,
            "floor": r.dram_floor,
            "l2": r.l2_bytes,
            "counted": bytes_counted,
        }
        for r, bytes_counted in zip(log, counted, strict=True)
    ]
