"""LoRA over a 4-bit weight in one operator, for the rows of a decoded token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from called import Called
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from fastpeft.ops import decisions, nf4_linear
from fastpeft.ops.backend import OPS, backend, cpu_extension
from fastpeft.ops.lora_linear_4bit import lora_linear_4bit, reference
from fastpeft.ops.nf4 import Weight4bit, dequantize_4bit, quantize_4bit

needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight(n: int, k: int, blocksize: int = 64, nested: bool = True, kind: str = "nf4") -> Weight4bit:
    return quantize_4bit(torch.randn(n, k) / k**0.5, kind, blocksize, nested=nested)


def operands(lead: tuple[int, ...], n: int, k: int, r: int, dtype: torch.dtype, adapter: torch.dtype) -> list[Tensor]:
    """x, bias, A and B."""
    x, bias = torch.randn(*lead, k).to(dtype), torch.randn(n).to(dtype)
    A, B = (Parameter(t.to(adapter)) for t in (torch.randn(r, k) / k**0.5, torch.randn(n, r)))
    return [x, bias, A, B]


def formula(x: Tensor, w: Tensor, bias: Tensor, A: Tensor, B: Tensor, c: float) -> Tensor:
    return F.linear(x, w, bias) + c * F.linear(F.linear(x, A), B)


def assert_right(no_worse: Callable[..., None], w: Weight4bit, t: list[Tensor], c: float) -> None:
    x, bias, A, B = (v.detach() for v in t)
    ours = OPS["auto"].lora_linear_4bit(x, *w.storage(), w.rows, bias, A, B, c)
    exact = [v.double() for v in (x, dequantize_4bit(w, torch.float32), bias, A, B)]
    sizes = formula(*(v.abs() for v in exact), abs(c))
    theirs = formula(x, dequantize_4bit(w, x.dtype), bias, A.to(x.dtype), B.to(x.dtype), c)
    no_worse(ours, theirs, formula(*exact, c), sizes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [((1,), 40, 64, 16), ((1, 1), 37, 192, 5), ((2, 3), 33, 136, 20), ((), 5, 130, 1), ((7,), 38, 128, 3)]
)
def test_each_instruction_set(isa: str, no_worse: Callable[..., None], shape: tuple, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lead, n, k, r = shape
    for adapter in {dtype, torch.float32}:
        assert_right(no_worse, weight(n, k), operands(lead, n, k, r, dtype, adapter), 0.7)


@needs_extension
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 6),
    n=st.integers(8, 80),
    k=st.integers(1, 40).map(lambda k: 2 * k),
    r=st.integers(1, 40),
    blocksize=st.sampled_from([32, 64, 256]),
    nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 99),
)
def test_any_shape(no_worse, m, n, k, r, blocksize, nested, kind, seed) -> None:
    torch.manual_seed(seed)
    t = operands((m,), n, k, r, torch.float32, torch.float32)
    assert_right(no_worse, weight(n, k, blocksize, nested, kind), t, -1.5)


def test_the_operator_is_well_formed() -> None:
    w = weight(40, 64)
    x, bias, A, B = (t.detach() for t in operands((2, 1), 40, 64, 4, torch.float32, torch.float32))
    for b in (bias, None):
        torch.library.opcheck(
            torch.ops.fastpeft.lora_linear_4bit.default, (x, *w.storage(), w.rows, b, A, B, 0.5),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_float64_is_the_reference() -> None:
    w = weight(40, 64)
    x, bias, A, B = (t.detach().double() for t in operands((3,), 40, 64, 4, torch.float32, torch.float32))
    args = (x, *w.storage(), w.rows, bias, A, B, 0.5)
    assert torch.equal(OPS["auto"].lora_linear_4bit(*args), reference(*args))


@needs_extension
def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "linear_4bit", lambda *_: decisions.Rows(4, 4, 4096))
    w = weight(40, 64)
    x, bias, A, B = operands((1, 4), 40, 64, 4, torch.float32, torch.float32)
    assert lora_linear_4bit(x, w, bias, A, B, 0.5) is None  # a graph may be recorded
    assert nf4_linear(x, w, bias, A, B, 0.5).requires_grad
    with torch.no_grad():
        found = lora_linear_4bit(x, w, bias, A, B, 0.5)
        assert found is not None and found.shape == (1, 4, 40)
        with Called() as called:
            nf4_linear(x, w, bias, A, B, 0.5)
        assert called.names == ["fastpeft::lora_linear_4bit"]
        for other in (torch.randn(5, 64), torch.randn(0, 64), x[..., :63], torch.tensor(1.0)):
            assert lora_linear_4bit(other, w, bias, A, B, 0.5) is None
        assert lora_linear_4bit(x, w, bias, A[:, :60], B, 0.5) is None
        assert lora_linear_4bit(x, w, bias, A, B[:, :3], 0.5) is None
        with backend("reference"):
            assert lora_linear_4bit(x, w, bias, A, B, 0.5) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert lora_linear_4bit(x, w, bias, A, B, 0.5) is None
        with pytest.raises(ValueError, match="needs an input"):
            nf4_linear(x[..., :60], w, bias, A, B, 0.5)
        with pytest.raises(ValueError, match="lora_A must be"):
            nf4_linear(x, w, bias, A, B[:, :3], 0.5)
    with torch.inference_mode():
        torch.testing.assert_close(lora_linear_4bit(x, w, bias, A, B, 0.5), found)


@needs_extension
def test_the_operator_refuses_what_does_not_fit() -> None:
    w = weight(40, 64)
    x, bias, A, B = (t.detach() for t in operands((2,), 40, 64, 4, torch.float32, torch.float32))
    for bad in ((A[:3], B), (A, B[:30]), (A[:, :32], B)):
        with pytest.raises(RuntimeError, match="A must be"):
            OPS["auto"].lora_linear_4bit(x, *w.storage(), w.rows, bias, *bad, 0.5)
    with pytest.raises(RuntimeError, match="bias"):
        OPS["auto"].lora_linear_4bit(x, *w.storage(), w.rows, bias[:4], A, B, 0.5)
