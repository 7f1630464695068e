"""A deferred tensor: no use of it can tell that it is not computed yet, except by asking whether it is."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastpeft.measure import SavedActivations
from fastpeft.ops.deferred import Deferred


class Product(Deferred):
    """h W^T. Products with numbers, rows and detach() stay deferred."""

    kept: ClassVar[dict[Callable[..., Any], Any]] = {}
    advice = "do not defer"


def _multiplied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = args
    if isinstance(left, Product) and left.pending and isinstance(right, int | float):
        return left.derive(func, args, kwargs)
    return NotImplemented


def _row(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    product, index = args
    if product.pending and isinstance(index, int):
        return product.derive(func, args, kwargs, product.shape[1:], is_view=True)
    return NotImplemented


Product.kept |= {
    Tensor.mul: _multiplied,
    Tensor.__getitem__: _row,
    Tensor.detach: lambda func, args, kwargs: args[0].derive(func, args, kwargs, is_view=True, detached=True),
}


class Case:
    """h, W and the deferred h W^T, counting how often it is computed."""

    def __init__(self, device: torch.device, frozen: bool = True) -> None:
        self.calls = 0
        self.h = torch.randn(3, 4, 5, device=device, requires_grad=True)
        self.w = nn.Parameter(torch.randn(7, 5, device=device), requires_grad=not frozen)
        self.d: Any = self.make()

    def make(self) -> Any:
        return Product(self.compute, (3, 4, 7), self.h.dtype, self.h.device, (self.h, self.w))

    def compute(self) -> Tensor:
        self.calls += 1
        return nn.functional.linear(self.h, self.w)

    def real(self) -> Tensor:
        return nn.functional.linear(self.h, self.w)


@pytest.fixture
def case(device: torch.device) -> Case:
    return Case(device)


def test_shape_and_kind_are_known_without_computing(case: Case) -> None:
    d, real = case.d, case.real()
    for ask in (
        lambda t: (t.shape, t.size(), t.size(-1), t.dim(), t.ndim, t.numel(), len(t), t.nbytes, t.itemsize),
        lambda t: (t.dtype, t.device, t.layout, t.is_floating_point(), torch.is_floating_point(t), t.is_cuda),
        lambda t: (t.requires_grad, t.is_leaf, t.grad_fn is None, t.stride(), t.is_contiguous(), t.get_device()),
        lambda t: (torch.is_tensor(t), isinstance(t, Tensor), t.is_inference(), t.element_size()),
    ):
        assert ask(d) == ask(real)
    assert d.grad is None and d in {d} and hash(d) == id(d)
    assert case.calls == 0 and d.pending
    with torch.no_grad():
        assert not case.make().requires_grad


USES: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda t: t.argmax(-1),
    "index": lambda t: t[:, -1],
    "function": lambda t: torch.log_softmax(t, -1),
    "list": lambda t: torch.cat([t, t]),
    "right": lambda t: torch.ones_like(t) + t,
    "number": lambda t: 2 - t,
    "matmul": lambda t: t @ torch.ones(7, 2, device=t.device),
    "numpy": lambda t: torch.from_numpy(t.detach().cpu().numpy()),
    "tolist": lambda t: torch.tensor(t.tolist()),
    "iteration": lambda t: torch.stack(list(t)),
    "to": lambda t: t.to(torch.float64),
    "module": lambda t: nn.Softmax(-1)(t),
    "data": lambda t: t.data,
    "out": lambda t: torch.add(t, 1, out=torch.empty(3, 4, 7, device=t.device)) if not t.requires_grad else t + 1,
    "vjp": lambda t: torch.autograd.grad(t.sum(), t)[0],
}


@pytest.mark.parametrize("use", USES)
def test_any_use_is_a_use_of_the_value(case: Case, use: str) -> None:
    ours, real = USES[use](case.d), USES[use](case.real())
    assert type(ours) is Tensor and torch.equal(ours, real)
    assert case.calls == 1 and not case.d.pending
    USES[use](case.d)
    assert case.calls == 1  # once
    assert repr(case.d) == repr(case.d.value()) and f"{case.d[0, 0, 0]:.3f}" == f"{case.real()[0, 0, 0]:.3f}"


def test_it_is_differentiable(device: torch.device) -> None:
    case = Case(device, frozen=False)
    (case.d.softmax(-1) ** 2).sum().backward()
    ours = case.h.grad, case.w.grad
    theirs = torch.autograd.grad((case.real().softmax(-1) ** 2).sum(), (case.h, case.w))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_grad_mode_is_that_of_its_making(case: Case) -> None:
    """As for any tensor: no_grad around the use of it takes nothing from its graph."""
    with torch.no_grad():
        assert not (case.d + 1).requires_grad
        without = case.make()
    (case.d + 1).sum().backward()
    assert case.h.grad is not None and case.calls == 1
    assert not (without + 1).requires_grad and torch.equal(without + 1, case.d + 1)


def test_inference_mode_around_the_first_use(case: Case) -> None:
    with torch.inference_mode():
        case.d.argmax(-1)
    case.d.sum().backward()
    assert case.h.grad is not None


def test_autocast_is_that_of_its_making(device: torch.device) -> None:
    case = Case(device)
    with torch.autocast(device.type, torch.bfloat16):
        d = Product(case.compute, (3, 4, 7), torch.bfloat16, case.h.device, (case.h, case.w))
    assert d.dtype == (d + 1).dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16):
        assert (case.d + 1).dtype == torch.float32


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class _Pass(torch.autograd.Function):
    """As DDP's sink and modules' backward hooks do: the input is the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("function", [_Square, _Pass])
@pytest.mark.parametrize("frozen", [True, False])
def test_functions_of_autograd_take_it(device: torch.device, function: Any, frozen: bool) -> None:
    case = Case(device, frozen)
    result = function.apply(case.d)
    real = function.apply(case.real())
    assert torch.equal(result * 1, real)
    leaves = [case.h] if frozen else [case.h, case.w]
    g = torch.randn_like(real)
    for ours, theirs in zip(torch.autograd.grad(result, leaves, g), torch.autograd.grad(real, leaves, g)):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives_through_a_function_of_autograd(case: Case) -> None:
    def penalty(result: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(result.sum(), case.h, create_graph=True)
        return first.square().sum()

    ours, theirs = (torch.autograd.grad(penalty(_Square.apply(t)), case.h)[0] for t in (case.d, case.real()))
    torch.testing.assert_close(ours, theirs)


def test_copies_and_files_hold_the_value(case: Case) -> None:
    real = case.real().detach()
    with torch.no_grad():
        d = case.make()
    file = io.BytesIO()
    torch.save({"logits": d}, file)
    file.seek(0)
    for found in (
        copy.copy(d),
        copy.deepcopy(d),
        pickle.loads(pickle.dumps(d)),
        torch.load(file, weights_only=True)["logits"],
        d.clone(),
    ):
        assert type(found) is Tensor and torch.equal(found, real)
    with pytest.raises(RuntimeError, match="deepcopy"):  # as for any tensor inside a graph
        copy.deepcopy(case.d)


def test_in_place_changes_are_seen_by_every_later_use(case: Case) -> None:
    with torch.no_grad():
        d = case.make()
        row, doubled = d[0], d * 2  # both deferred: a view and a result of its own
        real = case.real()
        before = real * 2
        for t in (d, real):
            t[0, 0] = -1.0
            t.mul_(3)
    assert case.calls == 1
    assert torch.equal(d.value(), real) and torch.equal(row + 0, real[0]) and torch.equal(doubled + 0, before)
    row.fill_(9.0)
    assert torch.equal(d[0] + 0, torch.full_like(real[0], 9.0))


def test_what_a_subclass_keeps_stays_deferred(case: Case) -> None:
    scaled = (case.d * 2) * 3
    assert type(scaled) is Product and scaled.pending and case.calls == 0
    assert scaled.requires_grad and scaled.shape == case.d.shape
    row = case.d[1]
    assert type(row) is Product and row.shape == (4, 7)
    (scaled.sum() + row.square().sum()).backward()
    real = case.real()
    (theirs,) = torch.autograd.grad((real * 6).sum() + real[1].square().sum(), case.h)
    torch.testing.assert_close(case.h.grad, theirs)
    assert case.calls == 1  # derived values share the one they come from
    assert type(case.d * 2) is Tensor  # there is a value: nothing is gained by deferring


def test_detached(case: Case) -> None:
    d = case.d.detach()
    assert type(d) is Product and not d.requires_grad and d.grad_fn is None and case.calls == 0
    assert torch.equal(d + 0, case.real()) and not (d + 0).requires_grad
    assert (case.d + 0).requires_grad and case.calls == 1


def too_late(d: Any) -> None:
    with pytest.raises(RuntimeError, match=r"too late.*do not defer"):
        d.argmax()
    assert d.shape == (3, 4, 7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_value_asked_for_after_its_weight_was_stepped(device: torch.device, fused: bool) -> None:
    """Never a wrong number: what the weight was is gone. A fused optimizer does not even tell that it wrote."""
    case = Case(device, frozen=False)
    case.w.grad = torch.ones_like(case.w)
    scaled, other = case.d * 2, case.make()
    optimizer = torch.optim.AdamW([case.w], lr=0.1, fused=fused)
    optimizer.step()
    too_late(case.d)
    too_late(scaled)
    torch.testing.assert_close(case.make() + 0, case.real())
    del optimizer
    gc.collect()
    too_late(other)


def test_other_weights_may_be_stepped(device: torch.device) -> None:
    for frozen in (True, False):
        case = Case(device, frozen)
        weight = nn.Parameter(torch.ones(2, device=device))
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer.step()
        assert torch.equal(case.d + 0, case.real())


def test_a_value_asked_for_after_an_operand_was_written_to(case: Case) -> None:
    with torch.no_grad():
        case.w.add_(1)
    too_late(case.d)


def test_the_gradient_of_what_was_passed_by(case: Case) -> None:
    """A result was computed without the value: its gradient would silently be missing."""
    scaled = case.d * 2
    scaled.consume()
    for ask in (
        lambda: case.d.retain_grad(),
        lambda: scaled.register_hook(print),
        lambda: torch.autograd.grad(case.h.sum(), case.d),
    ):
        with pytest.raises(RuntimeError, match="computed without it"):
            ask()
    other = case.make()
    other.retain_grad()
    other.square().sum().backward()
    assert torch.equal(other.grad, 2 * case.real())


def test_it_keeps_its_inputs_only_as_long_as_it_lives(case: Case) -> None:
    with SavedActivations() as saved:
        d = case.make()
        h = case.h * 1
        other = Product(lambda: h * 1, h.shape, h.dtype, h.device, (h,))
    assert saved.bytes >= h.nbytes
    d.sum(), other.sum()
    gone = weakref.ref(other._cell)
    del other, d
    gc.disable()
    try:
        assert gone() is None  # no cycle
    finally:
        gc.enable()
