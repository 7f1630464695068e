"""DoRA in front of RoPE: q and k are not kept, and their magnitudes' gradients come from the rotated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.measure import SavedActivations
from fastpeft.ops import dora_linear_group, dora_projections, rope
from fastpeft.ops.norm_linear import RMSNorm, norm_linear
from fastpeft.ops.promise import Promise, take
from fastpeft.ops.rope import inverse_tables, rotate

B, T, D, K, RANK = 2, 9, 8, 24, 3
HEADS = (3, 1)
FORMS = pytest.mark.parametrize(("interleaved", "pairs"), [(False, False), (True, False), (False, True), (True, True)])


class Case:
    """Two projections of one input, q and k, rotated: by the operators, or as PyTorch does it."""

    def __init__(self, dtype: torch.dtype = torch.float32, interleaved: bool = False, pairs: bool = False) -> None:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
        self.dtype, self.form = dtype, (interleaved, pairs)
        sizes = [h * D for h in HEADS]
        self.x = new(B, T, K).requires_grad_()
        self.weights = [new(n, K) / K**0.5 for n in sizes]
        self.A = [(new(RANK, K) / K**0.5).requires_grad_() for _ in sizes]
        self.B = [(new(n, RANK) / 3).requires_grad_() for n in sizes]
        self.m = [
            (w.double() + 2.0 * (b.double() @ a.double())).norm(dim=1).mul(1.3).to(dtype).detach().requires_grad_()
            for w, a, b in zip(self.weights, self.A, self.B)
        ]
        # Scaled as YaRN's, of six of the eight columns, rounded to the dtype.
        angle = torch.randn(1, T, 3, dtype=torch.float64)
        if not pairs:
            angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
        self.cos, self.sin = ((1.2 * f(angle)).to(dtype) for f in (torch.cos, torch.sin))
        self.dys = [new(B, h, T, D) for h in HEADS]

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.A, *self.B, *self.m]

    def project(self, told: Any = (True, True)) -> list[Tensor]:
        lists = self.weights, [None, None], self.A, self.B
        return list(dora_linear_group(self.x, *lists, self.m, (2.0, 2.0), told=told))

    def run(
        self, project: Callable[[], list[Tensor]] | None = None, between: Any = lambda q, k: (q, k)
    ) -> list[Tensor]:
        q, k = between(*(project or self.project)())
        q, k = (y.view(B, T, -1, D).transpose(1, 2) for y in (q, k))
        return list(rope(q, k, self.cos, self.sin, *self.form))

    def formula(self, dtype: torch.dtype) -> list[Tensor]:
        outputs = []
        for w, a, b, m, h in zip(self.weights, self.A, self.B, self.m, HEADS):
            w, a, b, m, x = (t.to(dtype) for t in (w, a, b, m, self.x))
            norm = (w.double() + 2.0 * (b.double() @ a.double())).norm(dim=1).detach().to(dtype)
            y = F.linear(x, w)
            y = y + (m / norm - 1) * y + m / norm * 2.0 * F.linear(F.linear(x, a), b)
            turned = rotate(
                y.view(B, T, h, D).transpose(1, 2), self.cos.to(dtype), self.sin.to(dtype), *self.form, False
            )
            outputs.append(turned.to(self.dtype))
        return outputs

    def gradients(self, outputs: list[Tensor], **options: Any) -> list[Tensor]:
        return list(
            torch.autograd.grad(outputs, self.leaves(), [dy.to(y.dtype) for y, dy in zip(outputs, self.dys)], **options)
        )


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each base product that is made, forward or again."""
    made: list[int] = []
    linear = F.linear

    def counted(*args: Any) -> Tensor:
        made.append(1)
        return linear(*args)

    monkeypatch.setattr(dora_projections.F, "linear", counted)
    return made


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_pytorch(
    products: list[int], no_worse: Callable[..., None], dtype: torch.dtype, interleaved: bool, pairs: bool
) -> None:
    case = Case(dtype, interleaved, pairs)
    outputs = case.run()
    ours = case.gradients(outputs)
    assert len(products) == 2  # nothing is computed again
    theirs, exact = (case.gradients(case.formula(d)) for d in (dtype, torch.float64))
    for mine, other, true in zip(ours, theirs, exact):
        no_worse(mine, other, true)


@FORMS
def test_the_inverse_undoes_the_rotation(interleaved: bool, pairs: bool) -> None:
    """Tables of any numbers, equal in both columns of a pair or not."""
    torch.manual_seed(0)
    x = torch.randn(B, 2, T, D, dtype=torch.float64)
    cos, sin = torch.randn(2, B, T, 3 if pairs else 6, dtype=torch.float64)
    turned = rotate(x, cos, sin, interleaved, pairs, False)
    back = rotate(turned, *inverse_tables(cos, sin, interleaved, pairs), interleaved, pairs, True)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_tables_of_zeros_give_finite_numbers() -> None:
    case = Case()
    case.cos[:, 0], case.sin[:, 0] = 0.0, 0.0
    for mine, true in zip(case.gradients(case.run()), case.gradients(case.formula(torch.float64))):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)


def test_what_is_kept() -> None:
    """q and k once, rotated, where they were kept twice."""
    sizes = []
    for told in ((), (True, True)):
        case = Case()
        with SavedActivations() as saved:
            outputs = case.run(lambda case=case, told=told: case.project(told))
            scores = [y.square() for y in outputs]  # keeps them, as attention does
            sizes.append(saved.bytes)
            del scores
    assert sizes[0] - sizes[1] == 4 * B * T * sum(HEADS) * D


@pytest.mark.parametrize(
    "between",
    [
        lambda q, k: (q.mul_(2.0), k),  # changed in place
        lambda q, k: (q * 2.0, k),  # another tensor is rotated
        lambda q, k: (q[..., :D], k),  # a part of it
    ],
)
def test_an_output_that_is_not_told_is_computed_again(products: list[int], between: Any) -> None:
    case = Case()
    ours, theirs = (case.run(lambda told=told: case.project(told), between) for told in ((True, True), ()))
    case.dys = [dy[:, : y.shape[1]] for dy, y in zip(case.dys, ours)]
    expected = case.gradients(theirs)
    before = len(products)
    for mine, other in zip(case.gradients(ours), expected):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert len(products) == before + 1


def test_rotated_ones_may_be_written_to() -> None:
    """Attention code scales queries in place: then they tell nothing."""
    case = Case()
    ours, theirs = case.run(), case.run(lambda: case.project(()))
    for outputs in (ours, theirs):
        outputs[0].mul_(0.5)
    for mine, other in zip(case.gradients(ours), case.gradients(theirs)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_backward_twice_and_second_derivatives(products: list[int]) -> None:
    case = Case()
    outputs = case.run()
    first = case.gradients(outputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, case.gradients(outputs, retain_graph=True)))
    assert len(products) == 2
    graph = case.gradients(outputs, create_graph=True)
    theirs = case.gradients(case.formula(torch.float32), create_graph=True)
    for found in (graph, theirs):
        found[0] = torch.autograd.grad(found[-1].square().sum(), case.x)[0]  # dm's own gradient
    for mine, other in zip(graph, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_joined_with_a_norm(products: list[int]) -> None:
    case = Case(torch.float64)

    def project(told: Any) -> list[Tensor]:
        lists = case.weights, [None, None], case.A, case.B, (2.0, 2.0)
        return list(
            norm_linear(RMSNorm(1e-5, 0.0, torch.float64), case.x, (None,), *lists, magnitudes=case.m, told=told)[1]
        )

    told, kept = (case.gradients(case.run(lambda told=told: project(told))) for told in ((True, True), ()))
    assert len(products) == 4
    for mine, other in zip(told, kept):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_only_all_of_an_output_takes_its_promise() -> None:
    y = torch.zeros(4, 6, requires_grad=True) * 1.0
    Promise().of(y)
    assert take(y) and take(y.view(2, 2, 2, 3).transpose(1, 2)) and take(y.t())
    assert take(y[1:]) is None and take(y * 1.0) is None and take(y.expand(1, 4, 6)[:, :, :5]) is None
