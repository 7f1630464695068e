"""Products of the frozen weights: every number of a model passes through one, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import no_worse

from fastpeft.ops import decisions, gemm
from fastpeft.ops.backend import OPS, cpu_extension

needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")


@pytest.fixture
def from_32_rows(monkeypatch):
    """As on a processor on which ours was measured to be faster."""
    monkeypatch.setattr(decisions, "gemm_rows", lambda: 32)


def operand(rows, columns, turned, gap):
    """(rows, columns) as it lies in memory with `gap` more elements from one row (turned: column) to the next."""
    if turned:
        return torch.randn(columns, rows + gap)[:, :rows].t()
    return torch.randn(rows, columns + gap)[:, :columns]


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_right(a, b, y):
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    product = OPS["auto"].gemm(a, b)
    no_worse(product, a @ b, exact, sizes)
    into = y.clone()
    OPS["auto"].gemm_(into, a, b, True)
    no_worse(into, torch.addmm(y, a, b), y.double() + exact, y.double().abs() + sizes)
    OPS["auto"].gemm_(into, a, b, False)
    assert torch.equal(into, product)
    gain = torch.randn(a.shape[1])
    exact, sizes = (a.double() * gain.double()) @ b.double(), (a * gain).double().abs() @ b.double().abs()
    no_worse(OPS["auto"].gemm(a, b, gain), (a * gain) @ b, exact, sizes)


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 320, 32), (13, 321, 33), (100, 700, 70), (800, 40, 20)])
def test_each_instruction_set(isa, shape):
    torch.manual_seed(0)
    m, k, n = shape
    for a_turned in (False, True):
        for b_turned in (False, True):
            assert_right(operand(m, k, a_turned, 3), operand(k, n, b_turned, 5), torch.randn(m, n + 2)[:, :n])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 70), st.integers(0, 400), st.integers(0, 80), st.booleans(), st.booleans(), st.integers(0, 3),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(m, k, n, a_turned, b_turned, gap, seed):
    torch.manual_seed(seed)
    assert_right(operand(m, k, a_turned, gap), operand(k, n, b_turned, gap), torch.randn(m, n))


def test_nothing_beside_the_result_is_written():
    space = torch.full((40, 100), 7.0)
    OPS["auto"].gemm_(space[3:35, 9:79], torch.randn(32, 50), torch.randn(50, 70), False)
    space[3:35, 9:79] = 7.0
    assert (space == 7).all()


def test_error_of_a_long_sum_is_at_most_twice_the_vendors():
    torch.manual_seed(0)
    a, b = torch.randn(48, 14336), torch.randn(14336, 64)
    exact = a.double() @ b.double()
    assert error(OPS["auto"].gemm(a, b), exact) <= 2 * error(a @ b, exact)


def test_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    a, b = torch.randn(90, 500), torch.randn(500, 130)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(OPS["auto"].gemm(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_vendors(dtype):
    a, b = torch.randn(40, 70).to(dtype), torch.randn(70, 90).to(dtype)
    assert torch.equal(OPS["auto"].gemm(a, b), a @ b)


def test_shapes_that_do_not_fit():
    for y, b in [(torch.empty(4, 6), torch.randn(4, 6)), (torch.empty(4, 5), torch.randn(5, 6))]:
        with pytest.raises(RuntimeError):
            OPS["auto"].gemm_(y, torch.randn(4, 5), b, False)
    with pytest.raises(RuntimeError, match="gain"):
        OPS["auto"].gemm(torch.randn(4, 5), torch.randn(5, 6), torch.randn(6))


@needs_extension
@pytest.mark.parametrize("bias", [None, torch.randn(80)])
def test_linear_is_torch_s(from_32_rows, bias):
    x, weight = torch.randn(40, 70), torch.randn(80, 70)
    torch.testing.assert_close(gemm.linear("auto", x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    out = torch.empty(40, 100)[:, :80]
    gemm.linear("auto", x, weight, bias, out)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))


@needs_extension
def test_when_ours_is_taken(from_32_rows, monkeypatch):
    a, b = torch.randn(32, 64), torch.randn(64, 64)
    assert gemm.ours("auto", a, b)
    assert not gemm.ours("reference", a, b)
    assert not gemm.ours("auto", a[:31], b)
    assert not gemm.ours("auto", a, b[:, :63])
    assert not gemm.ours("auto", a[:, :63], b[:63])
    assert not gemm.ours("auto", a.double(), b.double())
    torch.set_float32_matmul_precision("high")
    try:
        assert not gemm.ours("auto", a, b)
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(decisions, "gemm_rows", lambda: float("inf"))
    assert not gemm.ours("auto", a, b)


@pytest.fixture
def rows_by_table(monkeypatch):
    """What the table of decisions says where `gemm.cpu.float32` is the entry given."""
    table = decisions.load()[0]

    def ask(rows, processors):
        changed = {**table, "gemm": {"cpu": {"float32": {"rows": rows, "processors": processors}}}}
        monkeypatch.setattr(decisions, "load", lambda: (changed, "a test"))
        decisions.gemm_rows.cache_clear()
        return decisions.gemm_rows()

    yield ask
    decisions.gemm_rows.cache_clear()


@needs_extension
def test_by_the_table_of_decisions(rows_by_table):
    maker = cpu_extension().maker()
    assert maker in ("amd", "intel", "other")
    assert rows_by_table(None, None) == float("inf")
    if cpu_extension().isa() != "scalar":
        assert rows_by_table(5, None) == 5
        assert rows_by_table(5, [maker]) == 5
    assert rows_by_table(5, ["none of them"]) == float("inf")


@pytest.mark.parametrize("entry", [None, {"rows": 32}, {"rows": "many", "processors": None}])
def test_a_table_whose_entry_cannot_be_used_is_named(entry, assert_named_unusable):
    assert_named_unusable({**decisions.load()[0], "gemm": {"cpu": {"float32": entry}}})


@needs_extension
def test_the_vendors_under_torch_compile(from_32_rows):
    x, weight = torch.randn(40, 70), torch.randn(80, 70)
    compiled = torch.compile(lambda: gemm.linear("auto", x, weight, None), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), torch.nn.functional.linear(x, weight))
