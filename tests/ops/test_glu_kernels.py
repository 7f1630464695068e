"""The operators behind `glu`: every instruction set against the reference, at shapes that fit nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from glu_results import case, everything, magnitudes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops.activation import ACTIVATIONS
from fastpeft.ops.backend import OPS, cpu_extension

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AUTO, REFERENCE = OPS["auto"], OPS["reference"]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    members, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(FLOATS))
    return case(
        draw(st.integers(0, 150)),
        draw(st.integers(1, 200)),
        members,
        draw(st.integers(1, 40)),
        dtype,
        draw(st.sampled_from((dtype, torch.float32))),
        draw(st.sampled_from((0.0, 0.05, 0.6))),
        draw(st.sampled_from(list(ACTIVATIONS))),
        draw(st.booleans()),
        draw(st.integers(0, 9)),
        [draw(st.floats(0.1, 4.0)) for _ in range(members)],
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(operands=cases())
def test_operators_equal_the_reference(isa: str, no_worse: Callable[..., None], operands: dict) -> None:
    ours = everything(AUTO, operands, lambda t: t)
    theirs = everything(REFERENCE, operands, lambda t: t)
    exact = everything(REFERENCE, operands, Tensor.double)
    assert ours.keys() == exact.keys()
    sums = magnitudes(operands, exact["h"])
    for name, truth in exact.items():
        no_worse(ours[name], theirs[name], truth, sums.get(name) if truth.numel() else None)
    if operands["dropout"][1] == 0.0:
        assert torch.equal(ours["h"], ours["shrink h"])


def exactly(x: Tensor, act: str) -> Tensor:
    """The activation in float64, where need be by a formula in which nothing cancels."""
    x = x.double()
    if act == "gelu":
        return x * torch.erfc(-x / 2**0.5) / 2
    if act == "gelu_tanh":
        return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return ACTIVATIONS[act][0](x)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_half_precision_number(isa: str, act: str) -> None:
    """In 16 bit the result is the float64 value rounded, or its neighbour, over the whole range; NaN stays NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 64)
        truth = exactly(x, act)
        ours, defined = AUTO.glu(x, None, act), truth.isfinite() & (truth.abs() < torch.finfo(dtype).max)
        # Where σ is below fp32's normal range results may be lost; fp16's own subnormals are 6e-8 apart.
        least = 6e-8 if dtype == torch.float16 else 200 * torch.finfo(torch.float32).tiny
        torch.testing.assert_close(
            ours[defined].double(), truth[defined], rtol=0.51 * torch.finfo(dtype).eps, atol=least
        )
        assert ours[x.isnan()].isnan().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_fp32_is_right_to_a_few_units_in_the_last_place(isa: str, act: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 1, 4000), -torch.logspace(-30, 1, 4000)])[None]
    # The arguments of these two's σ, up to 90 here, are rounded themselves.
    rtol = 2e-5 if act in ("gelu_tanh", "quick_gelu") else 6e-7
    torch.testing.assert_close(AUTO.glu(x, None, act).double(), exactly(x, act), rtol=rtol, atol=1e-37)


def test_the_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    gate, up, dh, ds, A = *(torch.randn(700, 300) for _ in range(3)), torch.randn(700, 32), torch.randn(32, 300)
    dropout, threads, results = ([1.0, 2.0], 0.1, torch.tensor([9])), torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append([*AUTO.glu_shrink(gate, up, "silu", A, *dropout)])
            results[-1] += AUTO.glu_shrink_backward(dh, ds, gate, up, "silu", A, *dropout, True)
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


def test_shapes_that_do_not_fit_are_refused() -> None:
    if cpu_extension() is None:
        pytest.skip("the checks of the C++ extension")
    gate, A, none = torch.randn(4, 6), torch.randn(2, 6), ([1.0], 0.0, None)
    for call in (
        lambda: AUTO.glu(gate, gate[:, :5], "silu"),
        lambda: AUTO.glu(gate, gate.bfloat16(), "silu"),
        lambda: AUTO.glu(gate, None, "swoosh"),
        lambda: AUTO.glu_backward(gate[:3], gate, None, "silu"),
        lambda: AUTO.glu_shrink(gate, None, "silu", A[:, :5], *none),
        lambda: AUTO.glu_shrink_backward(gate, gate[:, :3], gate, None, "silu", A, *none, True),
        lambda: AUTO.glu_shrink_backward(None, gate[:, :2], gate, None, "silu", A, *none, True),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
@pytest.mark.parametrize("gated", [True, False])
def test_schemas_and_fakes_are_true(namespace: str, gated: bool) -> None:
    gate, ds, A = torch.randn(7, 10), torch.randn(7, 4), torch.randn(4, 10)
    up, rest = torch.randn(7, 10) if gated else None, ("silu", A, [1.0, 2.0], 0.1, torch.tensor([3]))
    for name, arguments in (
        ("glu", (gate, up, "silu")),
        ("glu_backward", (gate, gate, up, "silu")),
        ("glu_shrink", (gate, up, *rest)),
        ("glu_shrink_backward", (gate, ds, gate, up, *rest, True)),
        ("glu_shrink_backward", (None, ds, gate, up, *rest, False)),
    ):
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
