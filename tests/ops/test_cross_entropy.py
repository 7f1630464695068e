"""The softmax on a tile of logits: every instruction set against the reference, tile after tile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops.backend import OPS
from fastpeft.ops.cross_entropy import accumulate_reference, gradient_reference, logits_and_slope, new_state

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def block(rows: int, columns: int, dtype: torch.dtype, size: float) -> Tensor:
    """A column block of a wider matrix."""
    return (torch.randn(rows, columns + 3) * size).to(dtype)[:, :columns]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from((1.0, 0.6)),
    cap=st.sampled_from((0.0, 5.0)),
    size=st.sampled_from((0.3, 3.0, 30.0)),
    wanted=st.booleans(),
)
def test_tiles_one_after_another(
    isa: str, no_worse: Callable[..., None], seed: int, rows: int, widths: list[int], dtype: torch.dtype, scale: float,
    cap: float, size: float, wanted: bool,
) -> None:  # fmt: skip
    """size 30: the reference of a row grows from tile to tile, and what was summed up is scaled down."""
    torch.manual_seed(seed)
    tiles = [block(rows, n, dtype, size * (i + 1)) for i, n in enumerate(widths)]
    labels = torch.randint(-1, sum(widths), (rows,))
    found = []
    for operator, cast in (
        (OPS["auto"].cross_entropy_accumulate_, torch.Tensor.clone),
        (accumulate_reference, torch.Tensor.clone),
        (accumulate_reference, torch.Tensor.double),
    ):
        zs = [cast(z) for z in tiles]
        state = new_state(rows, zs[0])
        acc = torch.ones(rows, 4, dtype=state.dtype) if wanted else None
        first = 0
        for z in zs:
            operator(z, labels, first, scale, cap, state, acc)
            first += z.shape[1]
        state[0].clamp_min_(-1e4)  # a row of nothing but its label
        found.append([state[0], state[1], state[2], state[3], *([acc] if acc is not None else []), *zs])
    # What cancels: the sum of x, and in 1 - t², by which exponentials are multiplied. A rounding of x is part of each.
    x = torch.cat([logits_and_slope(z.double(), scale, cap)[0] for z in tiles], dim=1)
    top = torch.exp(x.amax(1) - found[2][0]).clamp_min(1.0) * x.abs().amax(1).clamp_min(1.0)
    magnitudes = [None, top, None, x.abs().sum(1), *[top] * 4]
    for ours, theirs, exact, magnitude in zip(*found, magnitudes):
        no_worse(ours, theirs, exact, magnitude)
    assert torch.equal(found[0][0], found[1][0]) or cap
    if not wanted:
        assert all(torch.equal(z, tile) for z, tile in zip(found[0][4:], tiles))

    given_rows = torch.stack([torch.randn(rows) + 3 * size, torch.rand(rows), torch.rand(rows) / 9, torch.randn(rows)])
    first = widths[0]
    for tile in tiles[1:]:
        three = [tile.clone(), tile.clone(), tile.double()]
        OPS["auto"].cross_entropy_gradient_(three[0], labels, first, scale, cap, given_rows)
        gradient_reference(three[1], labels, first, scale, cap, given_rows)
        gradient_reference(three[2], labels, first, scale, cap, given_rows.double())
        x, _ = logits_and_slope(tile.double(), scale, cap)
        a, b, c = given_rows.double()[1:].unsqueeze(2).unbind(0)
        magnitude = (a * torch.exp(x - given_rows[0].double().unsqueeze(1)) * x.abs() + b).maximum(c.abs())
        no_worse(*three, magnitude)
        first += tile.shape[1]


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_what_is_not_a_number_is_not_lost(isa: str, special: float) -> None:
    for column in (0, 37, 69):
        z = torch.randn(3, 70)
        z[1, column] = special
        state = new_state(3, z)
        OPS["auto"].cross_entropy_accumulate_(z, torch.tensor([1, 1, -1]), 0, 1.0, 0.0, state, None)
        assert state[1].isnan().tolist() == [False, True, False]


def test_forbidden_columns(isa: str) -> None:
    z = torch.full((2, 40), -torch.inf)
    state, labels = new_state(2, z), torch.tensor([3, -1])
    OPS["auto"].cross_entropy_accumulate_(z, labels, 0, 1.0, 0.0, state, torch.zeros(2, 5))
    assert not state[1].any() and not z.any()
    z = torch.zeros(2, 40)
    OPS["auto"].cross_entropy_accumulate_(z, labels, 0, 1.0, 0.0, state, torch.zeros(2, 5))
    assert state[0].tolist() == [0.0, 0.0] and state[1].tolist() == [39.0, 40.0]


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    z, labels = torch.randn(50, 900), torch.randint(900, (50,))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            tile, state = z.clone(), new_state(50, z)
            OPS["auto"].cross_entropy_accumulate_(tile, labels, 0, 1.0, 0.0, state, torch.zeros(50, 5))
            found.append((tile, state))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))
