"""A lent sum W + c L R: products are made of its terms, whatever the code calls them; all else has the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.layers.weight_sum import WeightSum, summed

E, P, Q, R, M = 3, 16, 24, 2, 5
C = 1.5

x_p, x_q = torch.randn(M, P), torch.randn(M, Q)
stack_p, stack_q = torch.randn(E, M, P), torch.randn(E, M, Q)
offsets = torch.tensor([2, 2, 5], dtype=torch.int32)

# Code that multiplies by the stack t (E, P, Q) without needing the sum.
PRODUCTS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda t: F.linear(x_q, t[1]),
    "linear, keywords": lambda t: F.linear(input=x_q, weight=t[1], bias=torch.ones(P)),
    "linear, sequences": lambda t: F.linear(x_q.view(1, M, Q), t[1]),
    "a tensor's index": lambda t: F.linear(x_q, t[torch.tensor(2)]),
    "from behind": lambda t: F.linear(x_q, t[-1]),
    "matmul": lambda t: x_p @ t[0],
    "matmul, function": lambda t: torch.matmul(x_p, t[0]),
    "matmul, transposed": lambda t: x_q.matmul(t[0].T),
    "mm": lambda t: torch.mm(x_q, t[0].t()),
    "transposed first": lambda t: x_q @ t.transpose(-1, -2)[1],
    "mT": lambda t: F.linear(x_p, t.mT[0]),
    "in its own dtype": lambda t: x_p.float() @ t[0].float() + x_p @ t[1].to(torch.float32),
    "all of them": lambda t: torch.stack([x_p @ m for m in t.unbind()]),
    "iteration": lambda t: torch.stack([F.linear(x_q, m) for m in t]),
    "bmm": lambda t: torch.bmm(stack_p, t),
    "bmm, transposed": lambda t: torch.bmm(stack_q, t.transpose(1, 2)),
    "bmm from the left": lambda t: torch.bmm(t, stack_q.mT),
    "matmul of stacks": lambda t: stack_p @ t + torch.matmul(stack_q, t.mT)[..., :1],
    "gathered": lambda t: torch.bmm(t[torch.tensor([2, 0, 2, 1, 2])], x_q.unsqueeze(-1)).squeeze(-1),
    "grouped": lambda t: F.grouped_mm(x_p, t, offs=offsets),
    "grouped, transposed": lambda t: torch._grouped_mm(x_q, t.transpose(-2, -1), offs=offsets),
    "written to": lambda t: F.linear(x_q, t[1]).add_(1.0) + F.grouped_mm(x_q, t.mT, offs=offsets).add_(1.0),
}


class Double(torch.autograd.Function):
    """Code that takes the parameter below autograd."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return 2 * t

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


OTHERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "einsum": lambda t: torch.einsum("bp,epq->beq", x_p, t),
    "sum": lambda t: t.sum(0) + 1,
    "another dtype": lambda t: x_p.double() @ t[0].double(),
    "a slice": lambda t: F.linear(x_q, t[1][:3]),
    "rows of a tuple": lambda t: t[1, 2],
    "a mask": lambda t: t[torch.tensor([True, False, True])],
    "several matrices": lambda t: x_p @ t,
    "a vector": lambda t: t[0] @ torch.ones(Q),
    "double": Double.apply,
    "an expert below autograd": lambda t: Double.apply(t[1]),
    "shape and all": lambda t: t.view(t.shape[0], -1).to(t.device).contiguous(),
}


def terms(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((E, P, Q), (E, P, R), (E, R, Q))
    weight, left, right = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return weight, left.requires_grad_(), right.requires_grad_()


def run(use: Callable[[Any], Any], lend: Callable[..., Any]) -> list[Tensor]:
    """The value and the gradients of both factors."""
    weight, left, right = terms()
    y = use(lend(weight, left, right))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (left, right), dy)]


def dense(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return weight + C * (left @ right)


@pytest.mark.parametrize("use", [*PRODUCTS, *OTHERS])
def test_every_use_is_a_use_of_the_sum(use: str) -> None:
    note: set[str] = set()
    f = (PRODUCTS | OTHERS)[use]
    ours = run(f, lambda *t: WeightSum.of(*t, C, note))
    theirs = run(f, dense)
    for mine, other in zip(ours, theirs):
        assert type(mine) in (Tensor, WeightSum)
        torch.testing.assert_close(mine + 0, other, rtol=1e-4, atol=1e-4)
    assert bool({"sum", "sum of one"} & note) is (use in OTHERS), note
    if use in ("another dtype", "a slice", "a vector", "an expert below autograd"):
        assert "sum" not in note


def test_an_expert_whose_sum_is_asked_for_makes_no_others() -> None:
    from fastpeft.measure import LiveMemory

    weight, left, right = terms()
    stack = WeightSum.of(weight, left, right, C)
    assert stack is not None
    with LiveMemory() as memory:
        (x_p.double() @ stack[0].double()).sum().backward()
    assert memory.peak < 2 * weight[0].double().nbytes + weight.nbytes


@pytest.mark.parametrize("use", ["linear", "matmul", "bmm", "grouped"])
def test_modes(use: str) -> None:
    """no_grad, inference mode and autocast give what the sum gives in them."""
    weight, left, right = terms()
    with torch.no_grad():
        y = PRODUCTS[use](WeightSum.of(weight, left, right, C))
        assert not y.requires_grad
        torch.testing.assert_close(y, PRODUCTS[use](dense(weight, left, right)), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        y = PRODUCTS[use](WeightSum.of(weight, left, right, C))
        torch.testing.assert_close(y, PRODUCTS[use](dense(weight, left, right)), rtol=1e-4, atol=1e-4)
        columns = left.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as PEFT keeps B: copied here
        other: Any = WeightSum.of(weight, columns, right, C)
        torch.testing.assert_close(PRODUCTS[use](other), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.sum(), dense(weight, left, right).sum(), rtol=1e-4, atol=1e-3)
    lent, made = WeightSum.of(weight, left, right, C), dense(weight, left, right)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = PRODUCTS[use](lent), PRODUCTS[use](made)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-2, atol=0.2)


def test_a_part_taken_without_a_graph_has_none() -> None:
    """As an expert's sum taken under no_grad; one taken with a graph afterwards has its own."""
    weight, left, right = terms()
    lent: Any = WeightSum.of(weight, left, right, C)
    with torch.no_grad():
        without, whole = lent[1], WeightSum.of(weight, left, right, C)
    assert not F.linear(x_q, without).requires_grad and not (x_p @ whole[0]).requires_grad
    F.linear(x_q, lent[1]).sum().backward()
    assert left.grad is not None and left.grad[1].any()


def test_what_has_to_be_summed_is() -> None:
    """A trained or quantised base, a rank above the operators', a comparison that asks for it, tracing."""
    weight, left, right = terms()
    assert WeightSum.of(weight.requires_grad_(), left, right, C) is None
    weight.requires_grad_(False)
    assert WeightSum.of(weight.to(torch.float8_e4m3fn), left, right, C) is None
    assert WeightSum.of(weight, left.double(), right.double(), C) is None
    assert WeightSum.of(weight, torch.zeros(E, P, 513), torch.zeros(E, 513, Q), C) is None
    assert WeightSum.of(weight, left[:, :3], right, C) is None
    with summed():
        assert WeightSum.of(weight, left, right, C) is None
    torch.func.grad(lambda a: [WeightSum.of(weight, a, right, C) is None or pytest.fail(), a.sum()][1])(left)


def test_a_use_that_fails_fails_as_it_did() -> None:
    weight, left, right = terms()
    lent: Any = WeightSum.of(weight, left, right, C)
    uses: list[Callable[[Any], Any]] = [
        lambda t: F.linear(x_p, t[0]),
        lambda t: F.linear(x_q.half(), t[0]),
        lambda t: x_q @ t[0],
        lambda t: t[E],
    ]
    for wrong in uses:
        with pytest.raises((RuntimeError, IndexError)) as theirs:
            wrong(dense(weight, left, right))
        with pytest.raises((RuntimeError, IndexError)) as ours:
            wrong(lent)
        assert str(ours.value) == str(theirs.value)
