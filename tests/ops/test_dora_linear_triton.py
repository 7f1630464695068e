"""The Triton launchers of DoRA against the float64 reference, in any dtypes, with and without what is optional.

A result may be off by twice what PyTorch's own operators are off in the same dtypes, or by four roundings.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels import dora_linear as kernels
from fastpeft.kernels import weight_norm as norms

from fastpeft.ops import dora_products as reference
from fastpeft.ops.weight_norm import direct

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]  # of y and of the adapter
IDS = ["-".join(str(t)[6:] for t in pair) for pair in DTYPES]


def strided(t, pad):
    """The same numbers as the columns of a wider matrix."""
    wide = torch.zeros(t.shape[0], t.shape[1] + pad, dtype=t.dtype, device=t.device)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def operands(M, N, r, dtypes, device, pad=8, bias=True):
    y, adapter = dtypes
    new = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    return {
        "dy": strided(new(M, N).to(y), pad),
        "y": strided(new(M, N).to(y), pad),
        "u": strided(new(M, N).to(y), pad),
        "bias": new(N).to(y) if bias else None,
        "s": strided(new(M, r).to(adapter), pad),
        "B": (new(N, r) / r**0.5).to(adapter),
        "gain": new(N),
        "out_gain": new(N),
    }


def close(ours, eager, exact):
    for got, theirs, truth in zip(ours, eager, exact, strict=True):
        assert got.dtype == theirs.dtype and got.shape == truth.shape
        error, allowed = ((t.double() - truth).norm().item() for t in (got, theirs))
        assert error <= max(2 * allowed, 2 * torch.finfo(got.dtype).eps * truth.norm().item())


def eager_mix(y, u, s, B, gain, bias):
    rim = s @ B.T
    if u is None:
        v = (y + rim).to(y.dtype)
        return ((v + gain.to(y.dtype) * (v if bias is None else v - bias)).to(y.dtype),)
    t = (u + rim).to(y.dtype)
    out = y + rim + gain.to(y.dtype) * t
    return (out if bias is None else out + bias).to(y.dtype), t


def exactly(o):
    return {k: None if t is None else t.double() for k, t in o.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_gain(dtype, device, N=70):
    """The reference's bits: a magnitude at its start is a gain of exactly 1, nothing divides by 0, NaN stays NaN."""
    norm = torch.rand(N, device=device) + 0.5
    magnitude = norm.to(dtype).clone()
    norm[1:4], magnitude[2:9] = torch.tensor([0.0, float("nan"), 1e-3]), torch.randn(7, device=device).to(dtype)
    got, want = kernels.dora_gain(norm, magnitude.view(N, 1)), reference.gain_reference(norm, magnitude)
    assert torch.equal(got[0, 9:], torch.zeros(N - 9, device=device))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=IDS)
@pytest.mark.parametrize("M, N, r, bias", [(40, 136, 16, True), (1, 33, 3, False), (20, 65, 72, True)])
def test_forward(dtypes, M, N, r, bias, device, pad=8):
    for with_u in (False, True):
        o = operands(M, N, r, dtypes, device, pad, bias)
        e = exactly(o)
        exact_y, exact_u = e["y"].clone(), e["u"].clone()
        if with_u:
            eager = eager_mix(o["y"], o["u"], o["s"], o["B"], o["gain"], o["bias"])
            reference.mix_reference(exact_y, exact_u, e["s"], e["B"], e["gain"], e["bias"])
            kernels.dora_mix_(o["y"], o["u"], o["s"], o["B"], o["gain"], o["bias"])
            close((o["y"], o["u"]), eager, (exact_y, exact_u))
        else:
            eager = eager_mix(o["y"], None, o["s"], o["B"], o["gain"], o["bias"])
            reference.expand_reference(exact_y, e["s"], e["B"], e["gain"], e["bias"])
            kernels.dora_expand_(o["y"], o["s"], o["B"], o["gain"], o["bias"])
            close((o["y"],), eager, (exact_y,))


@pytest.mark.parametrize("dtypes", DTYPES, ids=IDS)
@pytest.mark.parametrize("M, N, r, bias", [(40, 136, 16, True), (1, 33, 3, False), (70, 65, 72, True)])
def test_backward(dtypes, M, N, r, bias, device, pad=8):
    o = operands(M, N, r, dtypes, device, pad, bias)
    e = exactly(o)
    dt, exact_dt = torch.empty_like(o["dy"]), torch.empty_like(e["dy"])
    names = ("y", "bias", "s", "B", "gain", "out_gain")
    ours = kernels.dora_expand_backward(o["dy"], *(o[n] for n in names), dt)
    exact = reference.expand_backward_reference(e["dy"], *(e[n] for n in names), exact_dt)
    scaled = o["dy"].to(o["B"].dtype) * o["gain"].to(o["B"].dtype)
    kept = o["y"].float() if o["bias"] is None else (o["y"] - o["bias"]).float()
    eager = (scaled @ o["B"], scaled.T @ o["s"], (o["dy"].float() * kept).sum(0), o["dy"] * o["out_gain"].to(dt.dtype))
    close((*ours, dt), eager, (*exact, exact_dt))
    assert not kernels.dora_expand_backward(o["dy"], None, None, o["s"], o["B"], o["gain"], None, None)[2].any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("p", [0.05, 1.0])
def test_dropout(dtype, p, device, shape=(33, 70), pad=8):
    x, seed = strided(torch.randn(shape, device=device).to(dtype), pad), torch.tensor([12345678901], device=device)
    got = kernels.dropout(x, p, seed, 2)
    torch.testing.assert_close(got, reference.dropout_reference(x, p, seed, 2).to(dtype))
    dx = torch.randn(shape, device=device).to(dtype)
    want = dx.clone()
    reference.dropout_add_reference(want, x, p, seed, 2)
    kernels.dropout_add_(dx, x, p, seed, 2)
    torch.testing.assert_close(dx, want)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, BF16), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("n, k, r, transposed", [(40, 136, 16, False), (17, 33, 3, True), (33, 70, 40, False)])
def test_weight_norm(dtypes, n, k, r, transposed, device):
    weight = torch.randn(n, k, device=device).to(dtypes[0])
    A, B = (torch.randn(r, k, device=device) / k**0.5).to(dtypes[1]), torch.randn(n, r, device=device).to(dtypes[1])
    B[: n // 2] = (-(weight[: n // 2].float() @ torch.linalg.pinv(A.float())) / 0.7).to(dtypes[1])  # it cancels there
    if transposed:
        weight = weight.t().contiguous().t()
    got, exact = norms.weight_norm(weight, A, B, 0.7), direct(weight.double(), A.double(), B.double(), 0.7)
    assert ((got.double() - exact) / exact).abs().max().item() <= 1e-6


def test_empty(device):
    A = torch.zeros(1, 8, device=device)
    assert norms.weight_norm(torch.zeros(0, 8, device=device), A, torch.zeros(0, 1, device=device), 1.0).shape == (0,)
    o = operands(0, 8, 4, (FP32, FP32), device)
    kernels.dora_expand_(o["y"], o["s"], o["B"], o["gain"], o["bias"])
    ds, dB, sums = kernels.dora_expand_backward(o["dy"], o["y"], None, o["s"], o["B"], o["gain"], None, None)
    assert not (ds.any() or dB.any() or sums.any())
