"""Every load and store of the Triton kernels: bytes asked for against the 32-byte sectors that are moved for them.

    PYTHONPATH=folder/of/ptxsim python tools/coalescing_report.py     # every case: what is below 95 %
    PYTHONPATH=folder/of/ptxsim python tools/coalescing_report.py --case "4 bits" --all --programs 4

Some programs of each launch, spread evenly, run on a PTX emulator from the code that is compiled for sm_80. A row is
one access of the source in one kernel, summed over the requests of its warps:

* asked: distinct bytes of a request;
* moved: 32 bytes for each sector that a request touches, as if nothing were cached;
* used: asked / moved, the usual measure of coalescing;
* run: the sectors that a request's bytes would touch if they were neighbours, from its first one on / moved. Rows that
  begin anywhere are read an element a lane: 64 bytes in 16 bit, which lie in three sectors (68 % used).
* once: needed / moved. Needed are the distinct sectors in which a program's bytes of this access lie, as often as it
  asks for a byte. A scalar of a row, or a row that is shorter than a sector or begins inside one, needs sectors that
  are not full; below 100 % sectors are moved again for bytes beside those they were moved for.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import ptxsim
import torch
from fastpeft.kernels import cross_entropy, lora_embedding, philox, weight_norm
from kernel_report import (
    BF16,
    FP32,
    _cross_entropy,
    _dora,
    _four_bits,
    _glu,
    _linear,
    _norm,
    _rope,
)
from ptxsim import triton_api
from sectors import Row, row_of, watching

ENOUGH = 0.95


def _embedding(r: int, dtype: torch.dtype) -> Callable[[], object]:
    """Half the tokens are of 16 of the vocabulary: as in a text, some often."""

    def call() -> object:
        index = torch.cat((torch.randint(0, 16, (256,)) * 500, torch.randint(0, 8192, (256,))))
        W, A, B, dy = (torch.randn(*s).to(dtype) for s in ((8192, 512), (r, 8192), (512, r), (512, 512)))
        lora_embedding.lora_embedding(index, W, A, B, 2.0)
        return lora_embedding.lora_embedding_backward(dy, index, A, B, 2.0)

    return call


def _norms(r: int, cancel: bool) -> Callable[[], object]:
    """Norms of rows, which cancel or not."""

    def call() -> object:
        W, A, B = (torch.randn(*s, dtype=BF16) for s in ((512, 512), (r, 512), (512, r)))
        return weight_norm.weight_norm(-2 * B @ A if cancel else W, A, B, 2.0)

    return call


def _accumulate(dtype: torch.dtype) -> Callable[[], object]:
    """The first chunk of a cross-entropy: what was summed up before is rescaled."""

    def call() -> object:
        z, labels, acc = torch.randn(64, 8192).to(dtype), torch.zeros(64, dtype=torch.int64), torch.randn(64, 4096)
        state = torch.tensor([float("-inf"), 0.0, 0.0, 0.0])[:, None].repeat(1, 64)
        return cross_entropy.cross_entropy_accumulate_(z, labels, 0, 1.0, 0.0, state, acc)

    return call


# Every kernel in the tile configurations that its launcher can choose. The loops are short: a step is as the next.
SHORT: dict[str, Any] = {"K": 512, "N": 512}
CASES: dict[str, Callable[[], object]] = {
    "philox mask": lambda: philox.dropout_mask(torch.zeros(1, dtype=torch.int64), 64, 4096, 0, 0.05),
    "shrink r16 x3 dropout": _linear("shrink", 16, 3, p=0.05, **SHORT),
    "shrink r16": _linear("shrink", 16, **SHORT),
    "shrink r512": _linear("shrink", 512, **SHORT),
    "shrink r16 one row": _linear("shrink", 16, M=1, K=4096),
    "shrink r64 bf16 x fp32 A": _linear("shrink", 64, a=FP32, **SHORT),
    "shrink r16 fp32": _linear("shrink", 16, x=FP32, **SHORT),
    "shrink r16 K odd": _linear("shrink", 16, K=511),
    "expand r16": _linear("expand", 16, **SHORT),
    "expand r512": _linear("expand", 512, **SHORT),
    "expand r16 one row": _linear("expand", 16, M=1, **SHORT),
    "expand r16 bf16 y fp32 B": _linear("expand", 16, a=FP32, **SHORT),
    "expand r16 N odd": _linear("expand", 16, N=511),
    "expand_backward r16": _linear("expand_backward", 16, **SHORT),
    "expand_backward r64": _linear("expand_backward", 64, **SHORT),
    "expand_backward r16 bf16 dy fp32 B": _linear("expand_backward", 16, a=FP32, **SHORT),
    "expand_backward r16 N odd": _linear("expand_backward", 16, N=511),
    "shrink_backward r16": _linear("shrink_backward", 16, **SHORT),
    "shrink_backward r16 x3 dropout": _linear("shrink_backward", 16, 3, p=0.05, **SHORT),
    "shrink_backward r128 dropout": _linear("shrink_backward", 128, p=0.05, **SHORT),
    "shrink_backward r16 fp32": _linear("shrink_backward", 16, x=FP32, **SHORT),
    "shrink_backward r16 K odd": _linear("shrink_backward", 16, K=511),
    "wide r16": _linear("wide", 16, **SHORT),
    "wide r16 one row": _linear("wide", 16, M=1, **SHORT),
    "wide r16 K odd": _linear("wide", 16, K=255, N=255, M=256),
    "wide_backward r16 dropout": _linear("wide_backward", 16, p=0.05, **SHORT),
    "wide_backward r16 N odd": _linear("wide_backward", 16, K=255, N=255, M=256),
    "dora gain": _dora("gain", 16, N=512),
    "dora expand r16": _dora("expand", 16, N=512),
    "dora mix r16": _dora("mix", 16, N=512),
    "dora backward r16": _dora("backward", 16, N=512),
    "dora backward r128": _dora("backward", 128, N=512),
    "dora backward r16 N odd": _dora("backward", 16, N=511),
    "dora dropout": _dora("dropout", 16, N=512),
    "weight_norm r16": _norms(16, False),
    "weight_norm r384": _norms(384, False),
    "weight_norm r16 cancelling": _norms(16, True),
    "glu forward": _glu("forward", M=512),
    "glu backward": _glu("backward", M=512),
    "glu forward N odd": _glu("forward", N=1023),
    "glu shrink r16 x3 dropout": _glu("shrink", members=3, p=0.05, N=512),
    "glu shrink_backward r16 dropout": _glu("shrink_backward", p=0.05, N=512),
    "glu shrink_backward r64": _glu("shrink_backward", r=64, N=512),
    "glu dA r16": _glu("dA", N=512),
    "rope D128": _rope((32, 8), 128, 128),
    "rope D64 fp32": _rope((9, 3), 64, 64, FP32),
    "rope D80 partial": _rope((32, 32), 80, 32),
    "rope D128 interleaved": _rope((32, 8), 128, 128, interleaved=True),
    "rope D128 interleaved pairs fp32": _rope((32, 2), 128, 64, FP32, True, True),
    "embedding r16": _embedding(16, BF16),
    "embedding r64": _embedding(64, BF16),
    "embedding r16 fp32": _embedding(16, FP32),
    "4 bits dequantize": _four_bits("dequantize"),
    "4 bits dequantize fp32": _four_bits("dequantize", x=FP32),
    "4 bits dequantize block 32": _four_bits("dequantize", blocksize=32, nested=False),
    "4 bits linear": _four_bits("linear", **SHORT),
    "4 bits linear not nested": _four_bits("linear", nested=False, **SHORT),
    "4 bits linear 64 rows": _four_bits("linear", M=64, **SHORT),
    "4 bits linear fp32": _four_bits("linear", M=32, x=FP32, **SHORT),
    "4 bits linear_backward": _four_bits("linear_backward", **SHORT),
    "4 bits linear_backward 64 rows": _four_bits("linear_backward", M=64, **SHORT),
    "4 bits linear_backward fp32": _four_bits("linear_backward", M=32, x=FP32, **SHORT),
    "cross_entropy accumulate": _accumulate(BF16),
    "cross_entropy accumulate fp32": _accumulate(FP32),
    "cross_entropy gradient": _cross_entropy("gradient", BF16),
    **{f"{kind} K {K}": _norm(kind, "", K) for kind in ("rms_norm", "layer_norm") for K in (128, 192, 576, 4096)},
    "rms_norm add K 20480": _norm("rms_norm", "_add", 20480, M=256),
    **{
        f"{kind}_backward K {K}": _norm(kind, "_backward", K, M=8192 if K < 1024 else 1024)
        for kind in ("rms_norm", "layer_norm")
        for K in (128, 192, 576, 4096)
    },
    "layer_norm_backward K 16384": _norm("layer_norm", "_backward", 16384, M=256),
    "rms_norm_backward K 20480 frozen": _norm("rms_norm", "_backward", 20480, grads=False, M=256),
    "rms_norm_shrink K 576 r16": _norm("rms_norm", "_shrink", 576),
    "layer_norm_shrink K 192 r16 x3 dropout": _norm("layer_norm", "_shrink", 192, members=3, p=0.05),
    "rms_norm_shrink_backward K 576 r16": _norm("rms_norm", "_shrink_backward", 576),
    "layer_norm_shrink_backward K 192 r16 x3 dropout": _norm("layer_norm", "_shrink_backward", 192, members=3, p=0.05),
    "rms_norm_shrink_backward K 512 r64 x3": _norm("rms_norm", "_shrink_backward", 512, r=64, members=3),
}


def place_of(ptx: str) -> Callable[[int], str]:
    """place(line of the PTX) is "file.py:line" in the source; of a function that was inlined, its own."""
    lines, places = [0], ["?"]
    for number, line in enumerate(ptx.splitlines(), 1):
        if match := re.search(r"^\s*\.loc\s.*//\s*(\S+?\.py):(\d+)", line):
            lines.append(number)
            places.append(f"{Path(match[1]).name}:{match[2]}")
    return lambda line: places[bisect.bisect_right(lines, line) - 1]


def accesses(call: Callable[[], object], programs: int | None = None) -> list[Row]:
    """A row for each access of each launch of `call`, of so many of its programs."""
    rows: list[Row] = []
    launches: list[str] = []
    launch = triton_api.launch

    def watched(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        with watching() as log:
            report = launch(kernel, *args, **kwargs)
        place, by_place = place_of(kernel.asm["ptx"]), defaultdict(list)
        for (kind, argument, line), access in log.items():
            by_place[kind, argument, place(line)].append(access)
        name = report.kernel.strip("_").removesuffix("_kernel")
        number = len(launches)
        launches.append(name)
        for (kind, argument, where), some in sorted(by_place.items()):
            access = {"kind": kind, "argument": argument, "place": where}
            rows.append({"launch": number, "kernel": name, **access, **row_of(some)})
        return report

    triton_api.launch = watched
    try:
        with ptxsim.emulate(ctas=programs):
            call()
    finally:
        triton_api.launch = launch
    return rows


def counted(case: str, programs: int = 2) -> list[Row]:
    """A row for each access of a case, the same every time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return [{"case": case, **row} for row in accesses(CASES[case], programs)]


def markdown(rows: list[Row]) -> str:
    lines = ["| case | kernel | access | source | asked | moved | used | run | once |", "|---" * 9 + "|"]
    for row in rows:
        access = f"{row['kind']} {row['argument']}"
        lines.append(
            f"| {row['case']} | `{row['kernel']}` | {access} | {row['place']} | {row['asked']:,} | {row['moved']:,} | "
            f"{row['used']:.1%} | {row['run']:.1%} | {row['once']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only cases whose name starts so (repeatable)")
    parser.add_argument("--programs", type=int, default=2, help="so many of each launch")
    parser.add_argument("--all", action="store_true", help="also what is coalesced")
    parser.add_argument("--json", action="store_true", help="rows as JSON, not a Markdown table")
    options = parser.parse_args()
    cases = [name for name in CASES if not options.case or any(name.startswith(case) for case in options.case)]
    if not cases:
        sys.exit(f"no such case; there are: {', '.join(CASES)}")
    rows = []
    for case in cases:
        print(case, file=sys.stderr)
        rows += counted(case, options.programs)
    shown = [row for row in rows if options.all or row["used"] < ENOUGH]
    print(json.dumps(shown) if options.json else markdown(shown))
    print(f"{len(rows)} accesses, {len(shown)} listed", file=sys.stderr)


if __name__ == "__main__":
    main()
