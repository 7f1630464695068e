"""The operators of a LoRA group: every instruction set against the reference, at shapes that fit nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops import products as P
from fastpeft.ops.backend import OPS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AUTO = OPS["auto"]


@st.composite
def groups(draw: st.DrawFn) -> dict:
    """Operands of one group, drawn from a seed; x, y, dy and s are column blocks of wider matrices."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, k = draw(st.integers(0, 150)), draw(st.integers(1, 200))
    members, rank = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    splits = [draw(st.integers(1, 90)) for _ in range(members)]
    dtype = draw(st.sampled_from(FLOATS))
    adapter = draw(st.sampled_from((dtype, torch.float32)))
    p = draw(st.sampled_from((0.0, 0.05, 0.6)))
    gap = draw(st.integers(0, 9))

    def block(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns + gap).to(dtype)[:, :columns]

    return {
        "x": block(rows, k, dtype),
        "dx": block(rows, k, dtype),
        "y": block(rows, sum(splits), dtype),
        "s": block(rows, members * rank, adapter),
        "A": torch.randn(members * rank, k).to(adapter),
        "B": torch.randn(sum(splits), rank).to(adapter),
        "splits": splits,
        "scaling": [draw(st.floats(0.1, 4.0)) for _ in splits],
        "p": p,
        "seed": torch.randint(2**63 - 1, (1,)) if p else None,
    }


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(group=groups())
def test_operators_equal_the_reference(isa: str, no_worse: Callable[..., None], group: dict) -> None:
    x, dx, y, s, A, B = (group[name] for name in ("x", "dx", "y", "s", "A", "B"))
    splits, dropout = group["splits"], (group["scaling"], group["p"], group["seed"])

    # Each product four times: ours, the reference in these dtypes, in float64, and of magnitudes in float64.
    def doubled(*operands: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [t.double() for t in operands], [t.double().abs() for t in operands]

    exact, magnitudes = doubled(x, A)
    no_worse(
        AUTO.lora_shrink(x, A, *dropout),
        *(P.shrink_reference(*operands, *dropout) for operands in ((x, A), exact, magnitudes)),
    )

    padded = torch.cat([y, y], dim=1)  # rows are further apart than they are long
    AUTO.lora_expand_(padded[:, : y.shape[1]], s, B, splits)
    assert torch.equal(padded[:, y.shape[1] :], y)
    expanded = []
    for base, s_, B_ in ((y, s, B), *doubled(y, s, B)):
        expanded.append(base.clone())
        P.expand_reference(expanded[-1], s_, B_, splits)
    no_worse(padded[:, : y.shape[1]], *expanded)

    operands = (y, s[:, : B.shape[1]], B)
    exact, magnitudes = doubled(*operands)
    for four in zip(
        AUTO.lora_expand_backward(*operands), *(P.expand_backward_reference(*o) for o in (operands, exact, magnitudes))
    ):
        no_worse(*four)

    for given_dx in (True, False):
        exact, magnitudes = doubled(s, x, A, dx)
        found = []
        for function, (ds_, x_, A_, dx_) in (
            (AUTO.lora_shrink_backward, (s, x, A, dx)),
            (P.shrink_backward_reference, (s, x, A, dx)),
            (P.shrink_backward_reference, exact),
            (P.shrink_backward_reference, magnitudes),
        ):
            into = dx_.clone() if given_dx else None
            found.append((function(ds_, x_, A_, *dropout, into), into))
        no_worse(*(dA for dA, _ in found))
        if given_dx:
            no_worse(*(into for _, into in found))


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 511, 512])
def test_any_rank(isa: str, no_worse: Callable[..., None], rank: int) -> None:
    x, A, B = torch.randn(33, 70), torch.randn(rank, 70), torch.randn(65, rank)
    s = AUTO.lora_shrink(x, A, [1.0], 0.0, None)
    float64 = x.double() @ A.double().T
    no_worse(s, x @ A.T, float64)
    y = torch.zeros(33, 65)
    AUTO.lora_expand_(y, s, B, [65])
    no_worse(y, s @ B.T, s.double() @ B.double().T)
    no_worse(AUTO.lora_shrink_backward(s, x, A, [1.0], 0.0, None, None), s.T @ x, s.double().T @ x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_and_special_values(isa: str, dtype: torch.dtype) -> None:
    """Conversions agree with PyTorch's on ties, subnormals, infinities and NaN: s = x when A is the identity."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float().reshape(-1, 64)
    for x in (every.to(dtype), every * (1 + 2.0**-9), every * (1 + 2.0**-12)):
        y = torch.zeros(x.shape, dtype=dtype)
        finite = x.isfinite()
        values = torch.where(finite, x.float(), torch.zeros(()))
        AUTO.lora_expand_(y, values, torch.eye(64), [64])
        assert torch.equal(y, values.to(dtype))
    for special in (float("inf"), float("-inf"), float("nan")):
        y = torch.full((2, 64), special, dtype=dtype)
        AUTO.lora_expand_(y, torch.ones(2, 1), torch.ones(64, 1), [64])
        assert torch.equal(y.isnan(), torch.full((2, 64), special, dtype=dtype).isnan())
        assert torch.equal(y.isinf(), torch.full((2, 64), special, dtype=dtype).isinf())


@pytest.mark.parametrize("rows", [1, 300, 700])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    x, A, B, y = torch.randn(rows, 300), torch.randn(32, 300), torch.randn(300, 16), torch.randn(rows, 300)
    seed, threads, results = torch.tensor([9]), torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            s = AUTO.lora_shrink(x, A, [1.0, 2.0], 0.1, seed)
            dx = y.clone()
            dA = AUTO.lora_shrink_backward(s, x, A, [1.0, 2.0], 0.1, seed, dx)
            results.append([s, *AUTO.lora_expand_backward(y, s[:, :16], B), dA, dx])
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, A, B = torch.randn(4, 6), torch.randn(2, 6), torch.randn(5, 2)
    for call in (
        lambda: AUTO.lora_shrink(x, A[:, :5].clone(), [1.0], 0.0, None),
        lambda: AUTO.lora_shrink(x, A, [1.0] * 3, 0.0, None),
        lambda: AUTO.lora_shrink(x, A, [1.0], 1.5, torch.tensor([1])),
        lambda: AUTO.lora_expand_(torch.zeros(4, 5), torch.zeros(4, 2), B, [4]),
        lambda: AUTO.lora_expand_(torch.zeros(4, 5), torch.zeros(3, 2), B, [5]),
        lambda: AUTO.lora_expand_backward(torch.zeros(4, 4), torch.zeros(4, 2), B),
        lambda: AUTO.lora_shrink_backward(torch.zeros(4, 3), x, A, [1.0], 0.0, None, None),
        lambda: AUTO.lora_shrink_backward(torch.zeros(4, 2), x, A, [1.0], 0.0, None, torch.zeros(4, 5)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch says it from 2.13 on")
def test_what_the_reference_says_comes_through_the_extension() -> None:
    """float64 goes to the reference by way of C++, which must not keep its message to itself."""
    y, h, B = (torch.zeros(shape, dtype=torch.float64) for shape in ((4, 5), (3, 2), (5, 2)))
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(3\)"):
        AUTO.lora_expand_(y, h, B, [5])


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schemas_and_fakes_are_true(namespace: str) -> None:
    """What torch.compile relies on: mutation and aliasing as declared, shapes and dtypes as the fakes say."""
    x, A, B, s = torch.randn(7, 10), torch.randn(4, 10), torch.randn(9, 2), torch.randn(7, 4)
    seed, y, w = torch.tensor([3]), torch.randn(7, 9), torch.randn(9, 10)
    c = [1.0, 2.0]
    calls = {
        "lora_shrink": (x, A, c, 0.1, seed),
        "lora_expand_": (y, s, B, [4, 5]),
        "lora_expand_backward": (y, s[:, :2], B),
        "lora_shrink_backward": (s, x, A, c, 0.1, seed, torch.randn(7, 10)),
        "lora_linear_wide": (x, w, torch.randn(9), s, B, [4, 5]),
        "lora_linear_wide_backward": (y, w, s, A, c, 0.1, seed),
        "lora_embedding": (torch.randint(10, (6,)), torch.randn(10, 9), A[:2], B, 0.5, -1),
        "lora_embedding_backward": (torch.randn(6, 9), torch.randint(10, (6,)), A[:2], B, 0.5, 3),
    }
    for name, arguments in calls.items():
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
