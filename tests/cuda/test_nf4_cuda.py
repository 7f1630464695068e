"""The CUDA kernels for weights of 4 bits, executed from the PTX that nvcc makes: bitsandbytes' bits, products as exact
as PyTorch's, no byte read twice from memory, no spill on any target.

The tolerance of a product is twice the error that PyTorch makes with the dequantised weight in the same dtype.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import SOURCES
from torch import Tensor

from fastpeft.ops import nf4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(rows: int, columns: int, blocksize: int = 64, nested: bool = True, kind: str = "nf4") -> nf4.Weight4bit:
    return nf4.quantize_4bit(torch.randn(rows, columns) * 0.05, kind, blocksize, nested)


def decoded(w: nf4.Weight4bit) -> Tensor:
    return nf4.decode_reference(*w.storage(), w.columns, w.rows)


def no_worse(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape
    error, allowed = ((t.double() - exact).norm().item() for t in (ours, torchs))
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.norm().item()
    assert error <= max(2 * allowed, rounding), f"error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize(
    "rows, columns, blocksize, nested, kind, dtype",
    [
        (3, 2048, 64, True, "nf4", BF16),
        (3, 160, 64, True, "fp4", FP16),  # blocks go across rows
        (5, 1056, 32, False, "nf4", FP32),
        (2, 2048, 4096, True, "nf4", BF16),
        (3, 51, 32, True, "nf4", BF16),  # an odd row begins in the middle of a byte
    ],
)
def test_dequantised_weights_have_the_references_bits(emulator, rows, columns, blocksize, nested, kind, dtype):
    w = make(rows, columns, blocksize, nested, kind)
    out = emulator.dequantize(w, torch.full((rows, columns), torch.nan, dtype=dtype))
    assert torch.equal(out, decoded(w).to(dtype))


def test_dequantised_extremes_have_the_references_bits(emulator):
    """Blocks of zeros, of one outlier, of the largest and of subnormal numbers."""
    W = torch.zeros(5, 64)
    W[1, 3], W[2], W[3], W[4] = 3e4, torch.finfo(FP32).max, 1e-41, torch.linspace(-1, 1, 64)
    w = nf4.quantize_4bit(W, "nf4", 64, False)
    for dtype in (FP32, BF16):
        out = emulator.dequantize(w, torch.empty(5, 64, dtype=dtype))
        assert torch.equal(out, decoded(w).to(dtype))


@pytest.mark.parametrize("row, column, shape", [(2, 64, (3, 128)), (0, 96, (6, 224)), (1, 7, (4, 33))])
def test_a_panel_is_that_part_of_the_weight(emulator, row, column, shape):
    """Into a wider matrix too, whose other columns stay."""
    w, rim = make(8, 320), 16
    out = torch.full((shape[0], shape[1] + rim), 7.0, dtype=BF16)
    emulator.dequantize(w, out[:, : shape[1]], row, column)
    assert torch.equal(out[:, : shape[1]], decoded(w)[row : row + shape[0], column : column + shape[1]].to(BF16))
    assert (out[:, shape[1] :] == 7).all()


@pytest.mark.parametrize(
    "M, N, K, blocksize, nested, dtype, adapter",
    [
        (1, 37, 1344, 64, True, BF16, None),
        (1, 70, 96, 64, True, FP32, FP32),
        (2, 20, 160, 64, True, FP16, FP16),
        (3, 19, 544, 32, False, BF16, FP32),
        (5, 17, 64, 4096, True, FP32, None),
    ],
)
def test_the_product_of_few_rows(emulator, M, N, K, blocksize, nested, dtype, adapter):
    w, x = make(N, K, blocksize, nested), torch.randn(M, K + 8).to(dtype)[:, :K]
    extra = ()
    if adapter is not None:
        extra = (torch.randn(N).to(dtype), torch.randn(M, 5).to(adapter), torch.randn(N, 5).to(adapter))
    y = emulator.gemv(x, w, *extra)
    check_product(y, x, decoded(w), *extra)


def check_product(y: Tensor, x: Tensor, W: Tensor, bias: Any = None, s: Any = None, B: Any = None) -> None:
    exact, torchs = x.double() @ W.double().T, x @ W.to(x.dtype).T
    if bias is not None:
        exact, torchs = exact + bias.double(), torchs + bias
    if s is not None:
        exact, torchs = exact + s.double() @ B.double().T, (torchs + s @ B.T).to(x.dtype)
    no_worse(y, torchs, exact)


GEMM_CASES = [
    # M, N, K, blocksize, nested, dtype, adapter
    (8, 128, 1024, 64, True, BF16, None),
    (5, 40, 96, 64, True, FP16, FP32),
    (19, 136, 1184, 32, False, BF16, BF16),  # two parts along K, tiles that stick out on every side
    (36, 16, 64, 4096, True, BF16, FP32),
]


@pytest.mark.parametrize("M, N, K, blocksize, nested, dtype, adapter", GEMM_CASES)
def test_the_product_on_tensor_cores(emulator, M, N, K, blocksize, nested, dtype, adapter):
    w, x = make(N, K, blocksize, nested), torch.randn(M, K).to(dtype)
    extra = ()
    if adapter is not None:
        extra = (torch.randn(N).to(dtype), torch.randn(M, 18).to(adapter), torch.randn(N, 18).to(adapter))
    check_product(emulator.gemm(x, w, *extra), x, decoded(w), *extra)


@pytest.mark.parametrize("M, N, K, blocksize, nested, dtype, adapter", GEMM_CASES)
def test_the_input_gradient_on_tensor_cores(emulator, M, N, K, blocksize, nested, dtype, adapter):
    w, dy = make(N, K, blocksize, nested), torch.randn(M, N).to(dtype)
    W = decoded(w)
    exact, torchs, extra = dy.double() @ W.double(), dy @ W.to(dtype), ()
    if adapter is not None:
        ds, A = torch.randn(M, 18).to(adapter), torch.randn(18, K).to(adapter)
        exact, torchs, extra = exact + ds.double() @ A.double(), (torchs + ds @ A).to(dtype), (ds, A)
    no_worse(emulator.backward(dy, w, *extra), torchs, exact)


@pytest.mark.parametrize(
    "M, N, K, blocksize, nested, dtype, adapter",
    [
        (1, 70, 96, 64, True, FP32, FP32),
        (2, 37, 264, 64, True, FP32, None),  # more columns than a block's, and a number of rows that no tile divides
        (4, 19, 160, 32, False, BF16, FP32),
        (11, 300, 64, 4096, True, FP32, BF16),  # more rows of W than a chunk's
    ],
)
def test_the_input_gradient_without_tensor_cores(emulator, M, N, K, blocksize, nested, dtype, adapter):
    w, dy = make(N, K, blocksize, nested), torch.randn(M, N + 3).to(dtype)[:, :N]
    W = decoded(w)
    exact, torchs, extra = dy.double() @ W.double(), dy @ W.to(dtype), ()
    if adapter is not None:
        ds, A = torch.randn(M, 5).to(adapter), torch.randn(5, K).to(adapter)
        exact, torchs = exact + ds.double() @ A.double(), (torchs.float() + ds.float() @ A.float()).to(dtype)
        extra = (ds, A)
    no_worse(emulator.backward(dy, w, *extra, cores=False), torchs, exact)


def test_split_sums_have_the_same_bits_every_time(emulator):
    w, x = make(8, 2080), torch.randn(6, 2080).to(BF16)
    ys = [emulator.gemm(x, w, sms=24) for _ in range(2)]
    assert len(emulator.log) == 2, "the parts' sum is a launch of its own"
    assert torch.equal(*ys)
    check_product(ys[0], x, decoded(w))
    w, dy = make(1032, 32), torch.randn(6, 1032).to(BF16)
    dxs = [emulator.backward(dy, w, sms=24) for _ in range(2)]
    assert len(emulator.log) == 2 and torch.equal(*dxs)
    no_worse(dxs[0], dy @ decoded(w).to(BF16), dy.double() @ decoded(w).double())
    w, dy = make(516, 32), torch.randn(3, 516)
    dxs = [emulator.backward(dy, w, sms=24, cores=False) for _ in range(2)]
    assert len(emulator.log) == 2 and torch.equal(*dxs)
    no_worse(dxs[0], dy @ decoded(w), dy.double() @ decoded(w).double())


def test_decoding_a_token_reads_the_packed_weight_and_little_else(emulator):
    """At most 1.1 times the bytes of codes and scales, by whole sectors, and no load that leaves much of a sector."""
    w, x = make(64, 4096), torch.randn(1, 4096).to(BF16)
    emulator.gemv(x, w)
    (report,) = emulator.log
    floor = w.packed.numel() + w.absmax.numel()
    assert report.dram_floor_sectors - x.nbytes <= 1.1 * floor
    assert report.coalescing >= 0.95
    assert report.bank_conflicts <= 0.05 * report.shared_wavefronts


def test_tensor_core_kernels_read_whole_sectors(emulator):
    w, x = make(128, 1024), torch.randn(8, 1024).to(BF16)
    emulator.gemm(x, w)
    (forward,) = emulator.log
    assert forward.coalescing >= 0.95
    w, dy = make(512, 256), torch.randn(32, 512).to(BF16)
    emulator.backward(dy, w)
    (backward,) = emulator.log
    assert backward.coalescing >= 0.95
    emulator.backward(torch.randn(2, 64), make(64, 256), cores=False)
    (plain,) = emulator.log
    assert plain.bank_conflicts <= 0.12 * plain.shared_wavefronts, plain
    emulator.dequantize(make(8, 2048), torch.empty(8, 2048, dtype=BF16))
    (dequantize,) = emulator.log
    for report in (forward, backward, dequantize):
        assert report.bank_conflicts <= 0.12 * report.shared_wavefronts, report
    assert dequantize.store_efficiency == 1.0


def new(*shape: int) -> Tensor:
    return torch.randn(*shape)


LAUNCHES = {
    "dequantize": lambda e: e.dequantize(make(8, 4096), torch.empty(8, 4096, dtype=BF16)),
    "gemv": lambda e: e.gemv(new(1, 4096).to(BF16), make(16, 4096)),
    "gemv fp32": lambda e: e.gemv(new(1, 4096), make(16, 4096), new(16), new(1, 16), new(16, 16)),
    "gemm": lambda e: e.gemm(new(8, 2048).to(BF16), make(128, 2048), None, new(8, 16), new(128, 16)),
    "backward": lambda e: e.backward(new(8, 512).to(BF16), make(512, 512), new(8, 16), new(16, 512)),
    "backward without tensor cores": lambda e: e.backward(
        new(4, 256), make(256, 512), new(4, 16), new(16, 512), cores=False
    ),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_sectors_are_used_or_moved_once(emulator, launch):
    """As tests/ptxsim/test_coalesced.py has it for the Triton kernels."""
    LAUNCHES[launch](emulator)
    for accesses in emulator.accesses:
        for kind in ("load", "store"):
            rows = [row for row in accesses if row["kind"] == kind]
            moved = sum(row["moved"] for row in rows)
            shares = [sum(row["moved"] * min(row[of], 1.0) for row in rows) / moved for of in ("used", "once")]
            assert max(shares) >= 0.95, rows
            for row in rows:
                assert max(row["used"], row["once"]) >= 0.95 or row["moved"] <= 0.05 * moved, row


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_no_kernel_spills(compiled, toolkit, target, tmp_path: Path):
    """(sm_75, where the sources differ, is the wheel's test.)"""
    for name in SOURCES:
        path = tmp_path / f"{name}.ptx"
        path.write_text(compiled[1][name])
        command = [toolkit.root / "bin" / "ptxas", f"-arch=sm_{target}", "-v", path, "-o", tmp_path / "out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert spills and all(counts == ("0", "0") for counts in spills), f"{name}: {done.stderr}"
