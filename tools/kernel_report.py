"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel, without a GPU.

    python tools/kernel_report.py                      # all cases, four targets, a Markdown table
    python tools/kernel_report.py --case wide --target 90 --json

The launchers of `fastpeft.kernels` run as they are; each launch is compiled for the target instead of started, by the
compiler and assembler that Triton ships, and the machine code is read with its cuobjdump. A spill is an access to local
memory (STL, LDL) in that code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: these kernels are compiled

import torch
import triton
from fastpeft.kernels import (
    _launch,
    cross_entropy,
    dora_linear,
    glu,
    layer_norm,
    lora_embedding,
    lora_linear,
    nf4,
    philox,
    rms_norm,
    rope,
    weight_norm,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# (multiprocessors, shared bytes a program may use) that tiles are chosen for: A100, H100, B200, RTX 5090.
TARGETS = {80: (108, 163 * 1024), 90: (132, 227 * 1024), 100: (148, 227 * 1024), 120: (170, 99 * 1024)}
MATRIX = {"mma": r"\bHMMA\.", "wgmma": r"\bHGMMA\.", "tcgen05": r"\bUTC\w*MMA"}


class _Compiler:
    """Stands in for Triton's driver: names a target, has no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[object]]:
    """Within, `kernel[grid](...)` compiles for sm_<arch>; yields the list the compiled kernels are appended to."""
    compiled: list[object] = []
    run, launch_limits = JITFunction.run, _launch._limits

    def warm_up(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = warm_up
    _launch._limits = lambda kind, index: _launch.Limits(*TARGETS[arch])
    triton.runtime.driver.set_active(_Compiler(arch))
    try:
        yield compiled
    finally:
        JITFunction.run, _launch._limits = run, launch_limits


def measure(kernel: object) -> dict[str, object]:
    """Registers, spills, shared memory and matrix instructions of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    row: dict[str, object] = {
        "kernel": kernel.metadata.name.strip("_").removesuffix("_kernel"),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "asserts": "__assertfail" in kernel.asm["ptx"],
        "ptx_wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
    }
    row["mma"] = {name: n for name, pattern in MATRIX.items() if (n := len(re.findall(pattern, sass)))}
    return row


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _linear(
    operator: str, r: int, members: int = 1, p: float = 0.0, M: int = 4096, x: torch.dtype = BF16,
    a: torch.dtype | None = None, dx: bool = True, N: int = 4096, K: int = 4096,
) -> Callable[[], object]:  # fmt: skip
    a = a or x

    def call() -> object:
        new, seed, scaling = torch.empty, torch.zeros(1, dtype=torch.int64), [2.0] * members
        X, Y, W = new(M, K, dtype=x), new(M, N * members, dtype=x), new(N * members, K, dtype=x)
        A, B, S = new(members * r, K, dtype=a), new(N * members, r, dtype=a), new(M, members * r, dtype=a)
        seed = seed if p else None
        return {
            "shrink": lambda: lora_linear.lora_shrink(X, A, scaling, p, seed),
            "expand": lambda: lora_linear.lora_expand_(Y, S, B, [N] * members),
            "expand_backward": lambda: lora_linear.lora_expand_backward(Y, S, B),
            "shrink_backward": lambda: lora_linear.lora_shrink_backward(S, X, A, scaling, p, seed, X if dx else None),
            "wide": lambda: lora_linear.lora_linear_wide(X, W, X[0, :1].expand(N * members), S, B, [N] * members),
            "wide_backward": lambda: lora_linear.lora_linear_wide_backward(Y, W, S, A, scaling, p, seed),
        }[operator]()

    return call


def _embedding(r: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        index = torch.zeros(4096, dtype=torch.int64)
        W, A, B, dy = (torch.empty(*s, dtype=dtype) for s in ((32000, 4096), (r, 32000), (4096, r), (4096, 4096)))
        lora_embedding.lora_embedding(index, W, A, B, 2.0)
        return lora_embedding.lora_embedding_backward(dy, index, A, B, 2.0)

    return call


def _cross_entropy(operator: str, dtype: torch.dtype, cap: float = 0.0, columns: int = 8192) -> Callable[[], object]:
    def call() -> object:
        z, labels, state = (
            torch.empty(4096, columns, dtype=dtype),
            torch.zeros(4096, dtype=torch.int64),
            torch.empty(4, 4096),
        )
        if operator == "gradient":
            return cross_entropy.cross_entropy_gradient_(z, labels, 0, 1.0, cap, state)
        return cross_entropy.cross_entropy_accumulate_(z, labels, 0, 1.0, cap, state, torch.empty(4096, 4096))

    return call


def _dora(
    operator: str, r: int, y: torch.dtype = BF16, b: torch.dtype | None = None, N: int = 4096, bias: bool = True
) -> Callable[[], object]:
    def call() -> object:
        new, seed = torch.empty, torch.zeros(1, dtype=torch.int64)
        Y, S, B, gain = new(4096, N, dtype=y), new(4096, r, dtype=b or y), new(N, r, dtype=b or y), new(N)
        A, W, v = new(r, 4096, dtype=b or y), new(N, 4096, dtype=y), new(N, dtype=y) if bias else None
        return {
            "gain": lambda: dora_linear.dora_gain(gain, gain.to(b or y)),
            "expand": lambda: dora_linear.dora_expand_(Y, S, B, gain, v),
            "mix": lambda: dora_linear.dora_mix_(Y, Y, S, B, gain, v),
            "backward": lambda: dora_linear.dora_expand_backward(Y, Y, v, S, B, gain, gain, Y),
            "dropout": lambda: dora_linear.dropout_add_(Y, dora_linear.dropout(Y, 0.05, seed, 1), 0.05, seed, 1),
            "norm": lambda: weight_norm.weight_norm(W, A, B, 2.0),
        }[operator]()

    return call


def _norm(
    kind: str, operator: str, K: int, x: torch.dtype = BF16, a: torch.dtype | None = None, r: int = 16,
    members: int = 1, p: float = 0.0, grads: bool = True, M: int = 4096,
) -> Callable[[], object]:  # fmt: skip
    """One operator of `kind`, in its longest form: residual or d_h, and with `grads` the parameters' gradients."""
    a = a or x

    def call() -> object:
        X, A, S = (torch.empty(*s, dtype=t) for s, t in (((M, K), x), ((members * r, K), a), ((M, members * r), a)))
        w, rstd, seed = torch.empty(K, dtype=x), torch.empty(M), torch.zeros(1, dtype=torch.int64) if p else None
        centred = kind == "layer_norm"
        module, norm = (layer_norm, (w, w)) if centred else (rms_norm, (w,))
        kept, need = (X, rstd, rstd) if centred else (X, rstd), (grads,) * len(norm)
        shrink = (A, [2.0] * members, p, seed, x)
        arguments = {
            "": (X, *norm, 1e-6, 0.0, x),
            "_add": (X, X, *norm, 1e-6, 0.0, x),
            "_backward": (X, *kept, *norm, 0.0, X, *need),
            "_shrink": (X, *norm, 1e-6, 0.0, *shrink),
            "_shrink_backward": (X, S, *kept, *norm, 0.0, *shrink, True, *need),
        }[operator]
        return getattr(module, kind + operator)(*arguments)

    return call


def _glu(
    operator: str, act: str = "silu", r: int = 16, members: int = 1, p: float = 0.0, x: torch.dtype = BF16,
    a: torch.dtype | None = None, gated: bool = True, N: int = 14336, M: int = 4096,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        X = torch.empty(M, N, dtype=x)
        up = X if gated else None
        A, S = torch.empty(members * r, N, dtype=a or x), torch.empty(M, members * r, dtype=a or x)
        rest = (A, [2.0] * members, p, torch.zeros(1, dtype=torch.int64) if p else None)
        return {
            "forward": lambda: glu.glu(X, up, act),
            "backward": lambda: glu.glu_backward(X, X, up, act),
            "shrink": lambda: glu.glu_shrink(X, up, act, *rest),
            "shrink_backward": lambda: glu.glu_shrink_backward(X, S, X, up, act, *rest, True),
            "dA": lambda: glu.glu_shrink_backward(None, S, X, up, act, *rest, False),
        }[operator]()

    return call


def _rope(
    heads: tuple[int, int], width: int, columns: int, x: torch.dtype = BF16, interleaved: bool = False,
    pairs: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        q, k = (torch.empty(2, 2048, h * width, dtype=x).view(2, 2048, h, width).transpose(1, 2) for h in heads)
        cos = torch.empty(1, 2048, columns // 2 if pairs else columns, dtype=x)
        rope.rope(q, k, cos, cos, interleaved, pairs, False)
        return rope.rope(q, k, cos, cos, interleaved, pairs, True)

    return call


def _four_bits(
    operator: str, M: int = 16, x: torch.dtype = BF16, r: int = 16, blocksize: int = 64, nested: bool = True,
    N: int = 4096, K: int = 4096,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        new, blocks = torch.empty, N * K // blocksize
        scales = (new(256), new(blocks // 256 + 1), new(1)) if nested else (None, None, None)
        absmax = new(blocks, dtype=torch.uint8 if nested else FP32)
        w = (new(N * K // 2, dtype=torch.uint8), absmax, new(16), *scales, blocksize, 256 if nested else 0)
        X, Y, S, A, B = (new(*s, dtype=x) for s in ((M, K), (M, N), (M, r), (r, K), (N, r)))
        return {
            "dequantize": lambda: nf4.dequantize_4bit_(new(N, K, dtype=x), *w, K, 0, 0),
            "linear": lambda: nf4.linear_4bit(X, *w, N, X[0, :1].expand(N), S, B),
            "linear_backward": lambda: nf4.linear_4bit_backward(Y, *w, K, S, A),
        }[operator]()

    return call


# What is worth compiling: every kernel, in each of the tile configurations that its launcher can choose.
CASES: dict[str, Callable[[], object]] = {
    "philox mask": lambda: philox.dropout_mask(torch.zeros(1, dtype=torch.int64), 64, 4096, 0, 0.05),
    "shrink r16": _linear("shrink", 16),
    "shrink r16 dropout": _linear("shrink", 16, p=0.05),
    "shrink r16 x3 dropout": _linear("shrink", 16, 3, p=0.05),
    "shrink r64 x2 dropout": _linear("shrink", 64, 2, p=0.05),
    "shrink r512": _linear("shrink", 512),
    "shrink r512 dropout": _linear("shrink", 512, p=0.05),
    "shrink r16 one row": _linear("shrink", 16, M=1),
    "shrink r16 fp16": _linear("shrink", 16, x=FP16),
    "shrink r16 bf16 x fp32 A dropout": _linear("shrink", 16, p=0.05, a=FP32),
    "shrink r16 x3 fp32 dropout": _linear("shrink", 16, 3, p=0.05, x=FP32),
    "shrink r512 fp32": _linear("shrink", 512, x=FP32),
    "shrink r64 bf16 x fp32 A": _linear("shrink", 64, a=FP32),
    "shrink r128 K odd": _linear("shrink", 128, K=4095),
    "shrink r16 K odd": _linear("shrink", 16, p=0.05, K=4095),
    "expand r16": _linear("expand", 16),
    "expand r16 N odd": _linear("expand", 16, N=4095),
    "expand r16 x3": _linear("expand", 16, 3),
    "expand r512": _linear("expand", 512),
    "expand r16 one row": _linear("expand", 16, M=1),
    "expand r16 bf16 y fp32 B": _linear("expand", 16, a=FP32),
    "expand r64 bf16 y fp32 B": _linear("expand", 64, a=FP32),
    "expand r512 fp32": _linear("expand", 512, x=FP32),
    "expand_backward r16": _linear("expand_backward", 16),
    "expand_backward r32": _linear("expand_backward", 32),
    "expand_backward r64": _linear("expand_backward", 64),
    "expand_backward r128": _linear("expand_backward", 128),
    "expand_backward r512": _linear("expand_backward", 512),
    "expand_backward r16 bf16 dy fp32 B": _linear("expand_backward", 16, a=FP32),
    "expand_backward r32 fp32": _linear("expand_backward", 32, x=FP32),
    "expand_backward r64 fp32": _linear("expand_backward", 64, x=FP32),
    "expand_backward r16 N odd": _linear("expand_backward", 16, N=4095),
    "shrink_backward r16": _linear("shrink_backward", 16),
    "shrink_backward r16 no dx": _linear("shrink_backward", 16, dx=False),
    "shrink_backward r16 dropout": _linear("shrink_backward", 16, p=0.05),
    "shrink_backward r16 x3 dropout": _linear("shrink_backward", 16, 3, p=0.05),
    "shrink_backward r16 x4 dropout": _linear("shrink_backward", 16, 4, p=0.05),
    "shrink_backward r16 x4 K odd dropout": _linear("shrink_backward", 16, 4, p=0.05, K=4095),
    "shrink_backward r64 x2 dropout": _linear("shrink_backward", 64, 2, p=0.05),
    "shrink_backward r128": _linear("shrink_backward", 128),
    "shrink_backward r128 dropout": _linear("shrink_backward", 128, p=0.05),
    "shrink_backward r512 dropout": _linear("shrink_backward", 512, p=0.05),
    "shrink_backward r16 bf16 x fp32 A dropout": _linear("shrink_backward", 16, p=0.05, a=FP32),
    "shrink_backward r16 x3 fp32 dropout": _linear("shrink_backward", 16, 3, p=0.05, x=FP32),
    "shrink_backward r32 fp32 dropout": _linear("shrink_backward", 32, p=0.05, x=FP32),
    "shrink_backward r64 fp32 dropout": _linear("shrink_backward", 64, p=0.05, x=FP32),
    "shrink_backward r16 K odd": _linear("shrink_backward", 16, p=0.05, K=4095),
    "wide r16": _linear("wide", 16),
    "wide r16 x3": _linear("wide", 16, 3),
    "wide r512": _linear("wide", 512),
    "wide r16 512 rows": _linear("wide", 16, M=512),
    "wide r16 96 rows": _linear("wide", 16, M=96, N=1024),
    "wide r16 one row": _linear("wide", 16, M=1),
    "wide r16 K odd": _linear("wide", 16, K=4095),
    "wide r16 K 4080": _linear("wide", 16, K=4080),
    "wide r16 bf16 W fp32 B": _linear("wide", 16, a=FP32),
    "wide r16 fp32": _linear("wide", 16, x=FP32),
    "wide_backward r16": _linear("wide_backward", 16),
    "wide_backward r16 dropout": _linear("wide_backward", 16, p=0.05),
    "wide_backward r16 x3 dropout": _linear("wide_backward", 16, 3, p=0.05),
    "wide_backward r64 x3 bf16 W fp32 A dropout": _linear("wide_backward", 64, 3, p=0.05, a=FP32),
    "wide_backward r16 N odd": _linear("wide_backward", 16, p=0.05, N=4095),
    "wide_backward r16 fp32 dropout": _linear("wide_backward", 16, p=0.05, x=FP32),
    "dora gain": _dora("gain", 16),
    "dora expand r16": _dora("expand", 16),
    "dora expand r16 fp32": _dora("expand", 16, FP32),
    "dora expand r512": _dora("expand", 512),
    "dora mix r16": _dora("mix", 16),
    "dora mix r16 bf16 y fp32 B": _dora("mix", 16, b=FP32),
    "dora backward r16": _dora("backward", 16),
    "dora backward r64": _dora("backward", 64),
    "dora backward r128": _dora("backward", 128),
    "dora backward r512": _dora("backward", 512),
    "dora backward r16 bf16 dy fp32 B": _dora("backward", 16, b=FP32),
    "dora backward r32 fp32": _dora("backward", 32, FP32),
    "dora backward r16 N odd": _dora("backward", 16, N=4095),
    "dora dropout": _dora("dropout", 16),
    "weight_norm r16": _dora("norm", 16),
    "weight_norm r384": _dora("norm", 384),
    "weight_norm r16 bf16 W fp32 A": _dora("norm", 16, b=FP32),
    "weight_norm r64 fp32": _dora("norm", 64, FP32),
    **{f"glu forward {act}": _glu("forward", act) for act in glu.NAMES},
    **{f"glu backward {act}": _glu("backward", act) for act in glu.NAMES},
    "glu backward gelu fp32 plain": _glu("backward", "gelu", x=FP32, gated=False),
    "glu forward N odd": _glu("forward", N=14335),
    "glu shrink r16": _glu("shrink"),
    "glu shrink r16 gelu dropout": _glu("shrink", "gelu", p=0.05),
    "glu shrink r16 x3 dropout": _glu("shrink", members=3, p=0.05),
    "glu shrink r64": _glu("shrink", r=64),
    "glu shrink r16 bf16 gate fp32 A dropout": _glu("shrink", p=0.05, a=FP32),
    "glu shrink r16 fp32": _glu("shrink", x=FP32),
    "glu shrink r16 one row": _glu("shrink", M=1),
    "glu shrink_backward r16": _glu("shrink_backward"),
    "glu shrink_backward r16 gelu dropout": _glu("shrink_backward", "gelu", p=0.05),
    "glu shrink_backward r16 x3 dropout": _glu("shrink_backward", members=3, p=0.05),
    "glu shrink_backward r64 dropout": _glu("shrink_backward", r=64, p=0.05),
    "glu shrink_backward r16 bf16 gate fp32 A dropout": _glu("shrink_backward", p=0.05, a=FP32),
    "glu shrink_backward r16 fp32 dropout": _glu("shrink_backward", p=0.05, x=FP32),
    "glu dA r16": _glu("dA"),
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
    "4 bits linear": _four_bits("linear"),
    "4 bits linear 64 rows": _four_bits("linear", M=64),
    "4 bits linear fp32": _four_bits("linear", M=32, x=FP32),
    "4 bits linear block 32": _four_bits("linear", blocksize=32),
    "4 bits linear block 4096": _four_bits("linear", blocksize=4096, nested=False),
    "4 bits linear K 4080": _four_bits("linear", K=4080),
    "4 bits linear_backward": _four_bits("linear_backward"),
    "4 bits linear_backward 64 rows": _four_bits("linear_backward", M=64),
    "4 bits linear_backward fp32": _four_bits("linear_backward", M=32, x=FP32),
    "cross_entropy accumulate": _cross_entropy("accumulate", BF16),
    "cross_entropy accumulate cap": _cross_entropy("accumulate", BF16, 30.0),
    "cross_entropy accumulate fp32": _cross_entropy("accumulate", FP32),
    "cross_entropy gradient": _cross_entropy("gradient", BF16),
    "cross_entropy gradient fp32 cap columns odd": _cross_entropy("gradient", FP32, 30.0, 8191),
    **{f"rms_norm K {K}": _norm("rms_norm", "_add", K) for K in (128, 576, 4096, 8192, 16384, 20480)},
    **{f"layer_norm K {K}": _norm("layer_norm", "", K) for K in (576, 4096, 8192, 20480)},
    "layer_norm K 4096 fp32": _norm("layer_norm", "_add", 4096, FP32),
    **{f"rms_norm_backward K {K}": _norm("rms_norm", "_backward", K) for K in (128, 576, 4096, 8192, 16384, 20480)},
    **{f"layer_norm_backward K {K}": _norm("layer_norm", "_backward", K) for K in (576, 4096, 8192, 20480)},
    "layer_norm_backward K 8192 fp32": _norm("layer_norm", "_backward", 8192, FP32),
    "rms_norm_backward K 16384 frozen": _norm("rms_norm", "_backward", 16384, grads=False),
    **{f"rms_norm_shrink K {K} r16": _norm("rms_norm", "_shrink", K) for K in (576, 4096, 8192)},
    "rms_norm_shrink K 4096 r16 x3 dropout": _norm("rms_norm", "_shrink", 4096, members=3, p=0.05),
    "rms_norm_shrink K 4096 r16 x3 fp32 A dropout": _norm("rms_norm", "_shrink", 4096, a=FP32, members=3, p=0.05),
    "rms_norm_shrink K 4096 r64 x2 fp32 dropout": _norm("rms_norm", "_shrink", 4096, FP32, r=64, members=2, p=0.05),
    "layer_norm_shrink K 4096 r16 x3 dropout": _norm("layer_norm", "_shrink", 4096, members=3, p=0.05),
    **{f"rms_norm_shrink_backward K {K} r16": _norm("rms_norm", "_shrink_backward", K) for K in (576, 4096, 8192)},
    "rms_norm_shrink_backward K 4096 r64 x3": _norm("rms_norm", "_shrink_backward", 4096, r=64, members=3),
    "rms_norm_shrink_backward K 4096 r16 x3 dropout": _norm(
        "rms_norm", "_shrink_backward", 4096, members=3, p=0.05, grads=False
    ),
    "layer_norm_shrink_backward K 4096 r16 x3 dropout": _norm(
        "layer_norm", "_shrink_backward", 4096, members=3, p=0.05
    ),
    "rms_norm_shrink_backward K 4096 r16 x3 fp32 A dropout": _norm(
        "rms_norm", "_shrink_backward", 4096, a=FP32, members=3, p=0.05
    ),
    "layer_norm_shrink_backward K 4096 r32 x2 fp32 dropout": _norm(
        "layer_norm", "_shrink_backward", 4096, FP32, r=32, members=2, p=0.05
    ),
}


def report(cases: list[str], targets: list[int]) -> list[dict[str, object]]:
    """A row per kernel launched by a case and target."""
    rows = []
    for target in targets:
        seen = set()
        for case in cases:
            print(f"sm_{target}: {case}", file=sys.stderr)
            with compiling(target) as compiled:
                CASES[case]()
            for kernel in compiled:
                if kernel.hash not in seen:  # the second passes are the same in most cases
                    seen.add(kernel.hash)
                    rows.append({"case": case, "target": target, **measure(kernel)})
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """A table: a line per case and kernel, a column per target."""
    targets = sorted({row["target"] for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        mma = " ".join(f"{n} {name}" for name, n in row["mma"].items()) or "–"
        cell = f"{row['registers']} · {row['shared'] / 1024:.0f} · {row['spills']} · {mma}"
        cells.setdefault((row["case"], row["kernel"]), {}).setdefault(row["target"], cell)
    lines = ["| case | kernel | " + " | ".join(f"sm_{t}" for t in targets) + " |", "|---" * (2 + len(targets)) + "|"]
    for (case, kernel), by_target in cells.items():
        lines.append(f"| {case} | `{kernel}` | " + " | ".join(by_target.get(t, "") for t in targets) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="only cases whose name starts so (repeatable)")
    parser.add_argument("--target", action="append", type=int, choices=list(TARGETS), help="only this (repeatable)")
    parser.add_argument("--exact", action="store_true", help="--case gives whole names")
    parser.add_argument("--json", action="store_true", help="rows as JSON, not a Markdown table")
    options = parser.parse_args()
    match = str.__eq__ if options.exact else str.startswith
    cases = [name for name in CASES if not options.case or any(match(name, case) for case in options.case)]
    if not cases:
        sys.exit(f"no such case; there are: {', '.join(CASES)}")
    rows = report(cases, options.target or list(TARGETS))
    print(json.dumps(rows) if options.json else markdown(rows))


if __name__ == "__main__":
    main()
