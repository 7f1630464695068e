"""The Triton launcher of `rope` against eager code in float64. Without a GPU it runs in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from test_rope import FORMS, Case, eager_both

from fastpeft.ops import rope
from fastpeft.ops.backend import backend


def check(case: Case) -> None:
    with backend("triton"):
        ours = case.run(rope)
    for got, theirs, exact in zip(ours, case.run(eager_both), case.run(eager_both, torch.float64)):
        assert got.dtype == theirs.dtype
        error, allowed = ((t.double() - exact).norm().item() for t in (got, theirs))
        assert error <= max(2 * allowed, torch.finfo(got.dtype).eps / 2 * exact.norm().item())


@FORMS
@pytest.mark.parametrize("layout", ["dense", "transposed", "block", "columns"])
def test_every_form_and_layout(device, layout, interleaved, pairs):
    check(Case(interleaved=interleaved, pairs=pairs, dtype=torch.bfloat16, layout=layout, columns=12, device=device))


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width", "columns", "dtype", "table"),
    [
        (1, 1, (2, 1), 2, 2, torch.float32, None),
        (3, 5, (1, 4), 26, 10, torch.float16, torch.float32),
        (2, 9, (5, 3), 80, 32, torch.bfloat16, torch.float32),
        (1, 0, (2, 2), 8, 8, torch.float32, None),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_shapes(device, batch, tokens, heads, width, columns, dtype, table, shared):
    check(Case(batch, tokens, heads, width, columns, dtype=dtype, table=table, shared=shared, device=device))


def test_queries_alone(device):
    case = Case(device=device)
    with backend("triton"):
        q, nothing = rope(case.q, None, case.cos, case.sin)
        assert nothing is None and torch.equal(q, rope(case.q, case.k, case.cos, case.sin)[0])
