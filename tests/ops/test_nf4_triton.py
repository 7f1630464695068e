"""The Triton launchers for weights of 4 bits against the float64 reference; bits where bits are promised.

A product may be off by twice what PyTorch's with the dequantised weight is, or by one rounding, whichever is more.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels import nf4 as triton_ops
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.ops import nf4

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


def make(rows, columns, blocksize, nested, kind="nf4", device=CPU):
    w = nf4.quantize_4bit(torch.randn(rows, columns) * 0.05, kind, blocksize, nested)
    return w._replace(**{name: getattr(w, name).to(device) for name in w._fields[:6] if getattr(w, name) is not None})


def decoded(w):
    return nf4.decode_reference(*w.storage(), w.columns, w.rows)


def check_bits(rows, columns, blocksize, nested, kind, dtype, device=CPU):
    w = make(rows, columns, blocksize, nested, kind, device)
    out = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
    triton_ops.dequantize_4bit_(out, *w.storage(), columns, 0, 0)
    assert torch.equal(out, decoded(w).to(dtype))


def no_worse(ours, torchs, exact, what):
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape
    error, allowed = ((t.double() - exact).norm().item() for t in (ours, torchs))
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.norm().item()
    assert error <= max(2 * allowed, rounding), f"{what}: error {error:.2e}, PyTorch's {allowed:.2e}"


def check_products(M, N, K, blocksize=64, nested=True, dtypes=(BF16, BF16), r=5, device=CPU):
    dtype, adapter = dtypes
    w = make(N, K, blocksize, nested, device=device)
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    x, dy, bias = new(M, K + 8).to(dtype)[:, :K], new(M, N).to(dtype), new(N).to(dtype)
    s, B, ds, A = (new(*shape).to(adapter) for shape in ((M, r), (N, r), (M, r), (r, K)))
    W = decoded(w)
    exact = x.double() @ W.double().T
    torchs = x @ W.to(dtype).T
    no_worse(triton_ops.linear_4bit(x, *w.storage(), N, None, None, None), torchs, exact, "y")
    y = triton_ops.linear_4bit(x, *w.storage(), N, bias, s, B)
    no_worse(y, (torchs + bias + s @ B.T).to(dtype), exact + bias.double() + s.double() @ B.double().T, "y with a rim")
    exact, torchs = dy.double() @ W.double(), dy @ W.to(dtype)
    no_worse(triton_ops.linear_4bit_backward(dy, *w.storage(), K, None, None), torchs, exact, "dx")
    dx = triton_ops.linear_4bit_backward(dy, *w.storage(), K, ds, A)
    no_worse(dx, (torchs + ds @ A).to(dtype), exact + ds.double() @ A.double(), "dx with a rim")


@pytest.mark.parametrize(
    "rows, columns, blocksize, nested, kind, dtype",
    [
        (3, 256, 64, True, "nf4", BF16),
        (3, 96, 64, True, "fp4", FP16),  # blocks go across rows
        (5, 160, 32, False, "nf4", FP32),
        (2, 4096, 4096, True, "nf4", FP32),
        (3, 51, 32, True, "nf4", BF16),  # an odd row begins in the middle of a byte
    ],
)
def test_dequantised_weights_have_the_references_bits(rows, columns, blocksize, nested, kind, dtype, device):
    check_bits(rows, columns, blocksize, nested, kind, dtype, device)


@pytest.mark.parametrize("row, column, shape", [(2, 64, (3, 128)), (0, 96, (6, 224)), (1, 7, (4, 33))])
def test_a_panel_is_that_part_of_the_weight(row, column, shape, device):
    w, rim = make(8, 320, 64, True, device=device), 16
    out = torch.full((shape[0], shape[1] + rim), 7.0, dtype=BF16, device=device)
    triton_ops.dequantize_4bit_(out[:, : shape[1]], *w.storage(), 320, row, column)
    assert torch.equal(out[:, : shape[1]], decoded(w)[row : row + shape[0], column : column + shape[1]].to(BF16))
    assert (out[:, shape[1] :] == 7).all()


@pytest.mark.parametrize(
    "M, N, K, blocksize, nested, dtypes",
    [
        (1, 40, 128, 64, True, (BF16, BF16)),
        (20, 72, 192, 64, True, (FP16, FP32)),
        (3, 70, 96, 64, False, (FP32, FP32)),  # blocks go across rows
        (70, 16, 64, 4096, True, (BF16, FP32)),
    ],
)
def test_the_products(M, N, K, blocksize, nested, dtypes, device):
    check_products(M, N, K, blocksize, nested, dtypes, device=device)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 70),
    K=st.integers(1, 90),
    blocksize=st.sampled_from([32, 64, 256]),
    nested=st.booleans(),
    dtypes=st.sampled_from([(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]),
    r=st.integers(1, 20),
)
def test_any_shape(M, N, K, blocksize, nested, dtypes, r):
    check_products(M, N, K, blocksize, nested, dtypes, r)


def test_long_sums_are_split_with_the_same_bits_every_time(device):
    w, x = make(16, 1056, 32, True, device=device), torch.randn(2, 1056, device=device).to(FP16)
    first, second = (triton_ops.linear_4bit(x, *w.storage(), 16, None, None, None) for _ in range(2))
    assert torch.equal(first, second)
    check_products(2, 16, 1056, 32, dtypes=(FP16, FP16), device=device)


def test_what_the_kernels_do_not_have_is_refused(device):
    w, x = make(8, 64, 64, True, device=device), torch.zeros(2, 64, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        triton_ops.linear_4bit(x, *w.storage(), 8, None, None, None)
    with pytest.raises(ValueError, match="blocksize must be a power of two, got 48"):
        triton_ops.linear_4bit(x.float(), *w._replace(blocksize=48).storage(), 8, None, None, None)
