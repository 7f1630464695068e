"""The operators behind `glu`: every instruction set against the reference, at shapes that fit nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops.activation import ACTIVATIONS
from fastpeft.ops.backend import OPS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AUTO, REFERENCE = OPS["auto"], OPS["reference"]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Operands; gate, up, dh and ds are column blocks of wider matrices."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, n = draw(st.integers(0, 150)), draw(st.integers(1, 200))
    members, rank = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(FLOATS))
    adapter = draw(st.sampled_from((dtype, torch.float32)))
    p, gap = draw(st.sampled_from((0.0, 0.05, 0.6))), draw(st.integers(0, 9))

    def block(columns: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        return (size * torch.randn(rows, columns + gap)).to(dtype)[:, :columns]

    return {
        "gate": block(n, dtype, 2.0),
        "up": block(n, dtype) if draw(st.booleans()) else None,
        "dh": block(n, dtype),
        "ds": block(members * rank, adapter),
        "A": torch.randn(members * rank, n).to(adapter),
        "act": draw(st.sampled_from(list(ACTIVATIONS))),
        "dropout": (
            [draw(st.floats(0.1, 4.0)) for _ in range(members)],
            p,
            torch.randint(2**63 - 1, (1,)) if p else None,
        ),
    }


def everything(ops: object, case: dict, cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All results of the four operators."""
    gate, up, dh, ds, A = (None if case[k] is None else cast(case[k]) for k in ("gate", "up", "dh", "ds", "A"))
    act, dropout = case["act"], case["dropout"]
    out = {"h": ops.glu(gate, up, act)}
    out["dgate"], out["dup"] = ops.glu_backward(dh, gate, up, act)
    out["shrink h"], out["s"] = ops.glu_shrink(gate, up, act, A, *dropout)
    found = ops.glu_shrink_backward(dh, ds, gate, up, act, A, *dropout, True)
    out["shrink dgate"], out["shrink dup"], out["dA"] = found
    *none, out["dA alone"] = ops.glu_shrink_backward(None, ds, gate, up, act, A, *dropout, False)
    assert none == [None, None]
    return {name: t for name, t in out.items() if t is not None}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=cases())
def test_operators_equal_the_reference(isa: str, no_worse: Callable[..., None], case: dict) -> None:
    ours = everything(AUTO, case, lambda t: t)
    theirs = everything(REFERENCE, case, lambda t: t)
    exact = everything(REFERENCE, case, Tensor.double)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        # Where sums of many terms cancel, one rounding of the sum of magnitudes is granted.
        magnitude = truth.abs().max() * 8 * truth.shape[0] ** 0.5 if name.startswith("dA") and truth.numel() else None
        no_worse(ours[name], theirs[name], truth, magnitude)
    if case["dropout"][1] == 0.0:
        assert torch.equal(ours["h"], ours["shrink h"])


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
