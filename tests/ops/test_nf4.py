"""4-bit weights: bitsandbytes' bits, and the products with them, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops import nf4
from fastpeft.ops.backend import OPS, backend
from fastpeft.ops.nf4 import BLOCKSIZES, DTYPES, dequantize_4bit, quantize_4bit, weight_4bit

AUTO = OPS["auto"]


def adversarial(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros, one outlier, extremes, one sign, subnormals, values on the middles between codes."""
    w = torch.randn(rows, columns) * 0.02
    middles = (torch.tensor(nf4.NF4[1:]) + torch.tensor(nf4.NF4[:-1])) / 2
    for row, values in enumerate((0.0, 1e-30, 3e4, None, None, 1e-40, None)):
        if row < rows and values is not None:
            w[row] = values
    if rows > 6:
        w[3, columns // 2] = 100.0
        w[4] = -w[4].abs()
        w[6] = middles.repeat(columns // 15 + 1)[:columns]
        w[6, 0] = 1.0
    return w.to(dtype)


def theirs(w: Tensor, quant_type: str, blocksize: int, nested: bool, storage: torch.dtype = torch.uint8) -> Any:
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.quantize_4bit(
        w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )


def their_weight(packed: Tensor, state: Any) -> Tensor:
    """bitsandbytes' own decoding. Its AVX-512 kernel reads wrong scales where a row is not whole blocks (0.50.2: a
    (48, 128) weight in blocks of 256 comes out wrong by its largest element); there, its kernel in PyTorch, which it
    uses for blocks of 2048 and more itself, compiled."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if state.shape[1] % state.blocksize == 0 and state.blocksize < 2048:
        return functional.dequantize_4bit(packed, state)
    compute = pytest.importorskip("bitsandbytes.backends.default.ops")._dequantize_4bit_compute.__wrapped__
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return compute(packed.view(torch.uint8).view(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bits_are_those_of_bitsandbytes(isa: str, quant_type: str, blocksize: int) -> None:
    for dtype, nested in itertools.product(DTYPES, (False, True)):
        for rows, columns in ((9, 512), (33, 70), (7, 31)):
            w = adversarial(rows, columns, dtype)
            packed, state = theirs(w, quant_type, blocksize, nested)
            ours = quantize_4bit(w, quant_type, blocksize, nested)
            assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax)
            if nested:
                assert ours.nested_code is not None and torch.equal(ours.nested_code, state.state2.code)
                assert torch.equal(ours.nested_absmax, state.state2.absmax) and torch.equal(ours.offset, state.offset)
            weight = weight_4bit(packed, state)
            for found in (dequantize_4bit(ours), dequantize_4bit(weight)):
                assert found.dtype == dtype and torch.equal(found, their_weight(packed, state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_any_storage_dtype_and_no_copy(isa: str, storage: torch.dtype) -> None:
    w = torch.randn(64, 128)
    packed, state = theirs(w, "nf4", 64, True, storage)
    weight = weight_4bit(packed, state)
    assert weight.packed.data_ptr() == packed.data_ptr() and weight.shape == (64, 128)
    assert torch.equal(dequantize_4bit(weight), dequantize_4bit(quantize_4bit(w, "nf4", 64, True)))


def test_parts_and_other_dtypes(isa: str) -> None:
    """A panel is a cut of the whole, wherever it begins, in any dtype and into rows of any stride."""
    for columns, blocksize in ((128, 64), (192, 64), (100, 32), (31, 64), (96, 256)):
        weight = quantize_4bit(torch.randn(40, columns), "nf4", blocksize, True)
        for dtype in (*DTYPES, torch.float64):
            with backend("reference"):
                whole = dequantize_4bit(weight, dtype)
            for row, n, column, k in ((0, 40, 0, columns), (3, 9, 5, 20), (39, 1, columns - 1, 1), (8, 16, 0, 16)):
                out = torch.full((n, k + 7), 5.0, dtype=dtype)
                AUTO.dequantize_4bit_(out[:, :k], *weight.storage(), columns, row, column)
                assert torch.equal(out[:, :k], whole[row : row + n, column : column + k])
                assert bool((out[:, k:] == 5.0).all())


@st.composite
def products(draw: st.DrawFn) -> dict[str, Any]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    m, n = draw(st.integers(0, 20)), draw(st.integers(1, 70))
    k = draw(
        st.one_of(
            st.integers(1, 40), st.sampled_from((64, 128, 192, 320, 576)), st.integers(1, 40).map(lambda i: 8 * i)
        )
    )
    r = draw(st.integers(1, 20))
    weight = quantize_4bit(
        torch.randn(n, k), draw(st.sampled_from(("nf4", "fp4"))), draw(st.sampled_from(BLOCKSIZES)), draw(st.booleans())
    )
    adapter = draw(st.sampled_from((dtype, torch.float32)))
    rim = draw(st.booleans())
    gap = draw(st.integers(0, 5))

    def block(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns + gap).to(dtype)[:, :columns]

    return {
        "weight": weight,
        "x": block(m, k),
        "dy": block(m, n),
        "bias": torch.randn(n).to(dtype) if draw(st.booleans()) else None,
        "s": torch.randn(m, r).to(adapter) if rim else None,
        "B": torch.randn(n, r).to(adapter) if rim else None,
        "A": torch.randn(r, k).to(adapter) if rim else None,
    }


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=products())
def test_products_are_no_worse_than_pytorchs(isa: str, no_worse: Callable[..., None], case: dict[str, Any]) -> None:
    """Against the formula in float64; PyTorch decodes into the dtype and multiplies in it."""
    weight, x, dy, bias, s, A, B = (case[name] for name in ("weight", "x", "dy", "bias", "s", "A", "B"))
    n, k = weight.shape
    with backend("reference"):
        exact, rounded = dequantize_4bit(weight, torch.float32).double(), dequantize_4bit(weight, x.dtype)

    def product(x: Tensor, W: Tensor, bias: Tensor | None, s: Tensor | None, B: Tensor | None) -> Tensor:
        y = x @ W.T if bias is None else x @ W.T + bias
        return y if s is None or B is None else (y + (s @ B.T).to(y.dtype))

    def doubled(*tensors: Tensor | None, magnitude: bool = False) -> list[Any]:
        return [None if t is None else t.double().abs() if magnitude else t.double() for t in tensors]

    no_worse(
        AUTO.linear_4bit(x, *weight.storage(), n, bias, s, B),
        product(x, rounded, bias, s, B),
        product(*doubled(x, exact, bias, s, B)),
        product(*doubled(x, exact, bias, s, B, magnitude=True)),
    )
    A_T = None if A is None else A.T
    no_worse(
        AUTO.linear_4bit_backward(dy, *weight.storage(), k, s, A),
        product(dy, rounded.T, None, s, A_T),
        product(*doubled(dy, exact.T, None, s, A_T)),
        product(*doubled(dy, exact.T, None, s, A_T, magnitude=True)),
    )


def test_what_does_not_fit_is_refused() -> None:
    weight = quantize_4bit(torch.randn(6, 64))
    for call in (
        lambda: quantize_4bit(torch.randn(6, 64), "int4"),
        lambda: quantize_4bit(torch.randn(6, 64), blocksize=48),
        lambda: quantize_4bit(torch.randn(64)),
        lambda: quantize_4bit(torch.randn(6, 64).double()),
        lambda: AUTO.linear_4bit(torch.randn(2, 32), *weight.storage(), 20, None, None, None),
        lambda: AUTO.linear_4bit_backward(torch.randn(2, 20), *weight.storage(), 64, None, None),
        lambda: AUTO.dequantize_4bit_(torch.empty(7, 64), *weight.storage(), 64, 0, 0),
        lambda: AUTO.dequantize_4bit_(torch.empty(6, 64), *weight.storage(), 64, 0, 1),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()
    with pytest.raises(ValueError, match="not quantised yet"):
        weight_4bit(torch.randn(4, 4))


def test_kernels_say_what_of_the_storage_is_wrong(isa: str) -> None:
    """What Python's own functions never hand over, and another caller of the operators may."""
    w, x = quantize_4bit(torch.randn(6, 64), nested=True), torch.randn(2, 64)

    def product(s: Tensor | None = None, B: Tensor | None = None, **wrong: Any) -> None:
        AUTO.linear_4bit(x, *w._replace(**wrong).storage(), 6, None, s, B)

    product()
    assert w.nested_absmax is not None
    for wrong, message in (
        ({"packed": w.packed[:-1]}, "packed must have 192 contiguous uint8 values on the CPU"),
        ({"absmax": w.absmax.float()}, r"absmax \(of nested scales\) must have 6 contiguous uint8"),
        ({"code": w.code[::2]}, "code must have 16 contiguous fp32"),
        ({"nested_absmax": w.nested_absmax[:0]}, "nested_absmax must have 1 contiguous"),
        ({"blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
        ({"s": torch.randn(2, 3)}, "s and B must both be given or both be None"),
        ({"s": torch.randn(2, 3), "B": torch.randn(6, 4)}, r"s and B must be \(2, r\) and \(6, r\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            product(**wrong)
    with pytest.raises(RuntimeError, match="columns 32 to 96 are not all among the weight's 64"):
        AUTO.dequantize_4bit_(torch.empty(2, 64), *w.storage(), 64, 0, 32)


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schemas_and_fakes_are_true(namespace: str) -> None:
    """What torch.compile relies on: mutation and aliasing as declared, shapes and dtypes as the fakes say."""
    for nested in (False, True):
        weight = quantize_4bit(torch.randn(9, 64), nested=nested)
        x, dy, s = torch.randn(7, 64), torch.randn(7, 9), torch.randn(7, 2)
        calls: dict[str, tuple[Any, ...]] = {
            "dequantize_4bit_": (torch.empty(4, 8), *weight.storage(), 64, 1, 16),
            "linear_4bit": (x, *weight.storage(), 9, torch.randn(9), s, torch.randn(9, 2)),
            "linear_4bit_backward": (dy, *weight.storage(), 64, s, torch.randn(2, 64)),
            "quantize_4bit": (torch.randn(3, 5), weight.code, 64),
        }
        for name, arguments in calls.items():
            operator = getattr(getattr(torch.ops, namespace), name).default
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
