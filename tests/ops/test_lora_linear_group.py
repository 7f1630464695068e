"""Groups of projections of one input: the members' own results, whatever they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft.ops import lora_linear, lora_linear_group, philox
from fastpeft.ops.bordered import BorderedWeight

SPLITS, RANKS, SCALING = (40, 16, 24), (5, 3, 8), (2.0, 0.5, 1.0)


class Group:
    """Three projections of width 90; `ranks` has None where there is no adapter."""

    def __init__(
        self, device: torch.device, ranks: tuple = RANKS, dtype: torch.dtype = torch.float32, rows: tuple = (2, 32)
    ):
        new = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
        self.x = new(*rows, 90).requires_grad_()
        self.weights = [new(n, 90) / 9 for n in SPLITS]
        self.biases = [new(n) for n in SPLITS]
        self.A = [None if r is None else (new(r, 90) / 9).requires_grad_() for r in ranks]
        self.B = [None if r is None else new(n, r).requires_grad_() for n, r in zip(SPLITS, ranks)]
        self.dy = [new(*rows, n) for n in SPLITS]

    def call(self, p: float = 0.0, **options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return lora_linear_group(self.x, self.weights, self.biases, self.A, self.B, SCALING, p, **options)

    def formula(self, p: float = 0.0) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        seed = philox.draw_seed(self.x.device) if p else None
        outputs, member = [], 0
        for w, bias, a, b, c in zip(self.weights, self.biases, self.A, self.B, SCALING):
            y = F.linear(self.x, w, bias)
            if a is not None:
                z = self.x
                if seed is not None:
                    mask = philox.keep_mask(seed, member, self.x.shape[:-1].numel(), 90, p).view(self.x.shape)
                    z = z * mask * philox.keep_scale(p)
                y = y + c * F.linear(F.linear(z, a), b)
                member += 1
            outputs.append(y)
        return tuple(outputs)

    def results(self, outputs: tuple[Tensor, ...], unused: int | None = None) -> list[Tensor | None]:
        leaves = [t for t in (self.x, *self.biases, *self.A, *self.B) if t is not None and t.requires_grad]
        used = [i for i in range(3) if i != unused]
        gradients = torch.autograd.grad(
            [outputs[i] for i in used], leaves, [self.dy[i] for i in used], allow_unused=unused is not None
        )
        return [*(y.detach() for y in outputs), *gradients]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for o, t in zip(ours, theirs):
        assert (o is None) == (t is None)
        if o is not None:
            torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("ranks", [RANKS, (4, None, 4), (None, 7, None), (None, None, None), (6, 6, 6)])
def test_members_are_what_they_are_alone(device: torch.device, ranks: tuple, stacked: bool, p: float) -> None:
    group = Group(device, ranks, rows=(2, 40))
    group.biases[1] = None
    weight = torch.cat(group.weights) if stacked else None
    same(group.results(group.call(p, stacked_weight=weight)), group.results(group.formula(p)))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("stacked", [True, False])
def test_gradients_and_second_derivatives(fused_always: None, device: torch.device, stacked: bool, p: float) -> None:
    group = Group(device, (2, None, 1), torch.float64, (3,))
    weights, stacked_weight = [w[:4] for w in group.weights], torch.cat([w[:4] for w in group.weights])
    inputs = (
        group.x,
        group.biases[0][:4].requires_grad_(),
        group.A[0],
        group.B[0][:4].detach().requires_grad_(),
        group.A[2],
    )

    def call(x: Tensor, bias: Tensor, A0: Tensor, B0: Tensor, A2: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return lora_linear_group(
            x,
            weights,
            [bias, None, group.biases[2][:4]],
            [A0, None, A2],
            [B0, None, group.B[2][:4]],
            SCALING,
            p,
            stacked_weight=stacked_weight if stacked else None,
        )

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_stacked_bias(device: torch.device) -> None:
    group = Group(device)
    bias = torch.cat(group.biases).requires_grad_()
    outputs = group.call(stacked_weight=torch.cat(group.weights), stacked_bias=bias)
    same(group.results(outputs)[:3], group.results(group.formula())[:3])
    (gradient,) = torch.autograd.grad(
        group.call(stacked_weight=torch.cat(group.weights), stacked_bias=bias), bias, group.dy
    )
    torch.testing.assert_close(gradient, torch.cat([dy.flatten(0, 1).sum(0) for dy in group.dy]))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_output_that_is_not_used(device: torch.device, unused: int, stacked: bool) -> None:
    group = Group(device)
    weight = torch.cat(group.weights) if stacked else None
    ours = group.results(group.call(0.2, stacked_weight=weight), unused)
    same(ours, group.results(group.formula(0.2), unused))


@pytest.mark.parametrize("stacked", [True, False])
def test_an_output_may_be_changed_in_place(device: torch.device, stacked: bool) -> None:
    """As models that clamp their queries do; the other members keep their values."""
    group = Group(device)
    outputs = group.call(stacked_weight=torch.cat(group.weights) if stacked else None)
    expected = group.formula()
    outputs[0].clamp_(-0.5, 0.5)
    torch.testing.assert_close(outputs[1], expected[1], rtol=1e-4, atol=1e-4)
    same(group.results(outputs), group.results((expected[0].clamp(-0.5, 0.5), *expected[1:])))


@pytest.mark.parametrize("stacked", [True, False])
def test_low_precision_is_no_worse_than_pytorchs(
    no_worse: Callable[..., None], device: torch.device, stacked: bool
) -> None:
    group = Group(device, dtype=torch.bfloat16)
    ours = group.results(group.call(0.1, stacked_weight=torch.cat(group.weights) if stacked else None))
    theirs = group.results(group.formula(0.1))
    for name in ("weights", "biases", "A", "B", "dy"):
        doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in getattr(group, name)]
        setattr(group, name, doubles)
    group.x = group.x.detach().double().requires_grad_()
    for o, t, e in zip(ours, theirs, group.results(group.formula(0.1))):
        no_worse(o, t, e)


@pytest.mark.parametrize("stacked", [True, False])
def test_autocast(device: torch.device, stacked: bool) -> None:
    group = Group(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = group.call(0.1, stacked_weight=torch.cat(group.weights) if stacked else None)
        theirs = group.formula(0.1)
    group.dy = [dy.bfloat16() for dy in group.dy]
    for o, t in zip(group.results(ours), group.results(theirs)):
        assert o.dtype == t.dtype
        torch.testing.assert_close(o, t, rtol=0.05, atol=0.02 * t.abs().max().item())


@pytest.mark.parametrize("stacked", [True, False])
def test_compiles_without_a_graph_break(device: torch.device, stacked: bool) -> None:
    group = Group(device, (4, None, 4))
    weight = torch.cat(group.weights) if stacked else None

    def call(x: Tensor) -> tuple[Tensor, ...]:
        outputs = lora_linear_group(x, group.weights, group.biases, group.A, group.B, SCALING, stacked_weight=weight)
        return tuple(y.mul_(2.0) for y in outputs)

    ours = torch.compile(call, fullgraph=True, backend="aot_eager")(group.x)
    same(group.results(ours), group.results(tuple(y * 2.0 for y in group.formula())))


@pytest.mark.slow
def test_compiles_with_inductor(device: torch.device) -> None:
    group = Group(device)
    weight = torch.cat(group.weights)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_group(x, group.weights, group.biases, group.A, group.B, SCALING, stacked_weight=weight)

    same(group.results(torch.compile(call, fullgraph=True)(group.x)), group.results(group.formula()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_masks(device: torch.device, use_reentrant: bool) -> None:
    group = Group(device)
    body = lambda x: sum(y.sin().sum() for y in group.call(0.3))  # noqa: E731
    found = []
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=use_reentrant)):
        for leaf in (group.x, *group.A, *group.B):
            leaf.grad = None
        run(group.x).backward()
        found.append([leaf.grad for leaf in (group.x, *group.A, *group.B)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_what_is_kept_for_the_backward(device: torch.device) -> None:
    """One x and one s for the group, the seed, no stacked copy of an adapter."""
    group = Group(device)
    weight = torch.cat(group.weights)
    owned = {t.untyped_storage().data_ptr() for t in (weight, *group.weights, *group.A, *group.B)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = group.call(0.3, stacked_weight=weight)
    assert sum(kept.values()) == group.x.numel() * 4 + 64 * 3 * max(RANKS) * 4 + 8 and outputs[0].grad_fn is not None


def test_small_groups_equal_large_ones(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    group = Group(device, rows=(3,))
    small = group.results(group.call())
    monkeypatch.setattr(sys.modules["fastpeft.ops.lora_linear_group"], "NATIVE_ELEMENTS", -1)
    same(small, group.results(group.call()))


def test_a_group_of_one_is_lora_linear(device: torch.device) -> None:
    group = Group(device)
    one = [part[:1] for part in (group.weights, group.biases, group.A, group.B, SCALING)]
    torch.manual_seed(1)
    (ours,) = lora_linear_group(group.x, *one, 0.2)
    torch.manual_seed(1)
    alone = lora_linear(group.x, *(part[0] for part in one), 0.2)
    torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_fused_form_equals_the_plain_one(device: torch.device, p: float) -> None:
    group = Group(device, (4, 4, 4))
    weight = torch.cat(group.weights)
    same(
        group.results(group.call(p, stacked_weight=weight, form="fused")),
        group.results(group.call(p, stacked_weight=weight, form="plain")),
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_bordered_form_equals_the_plain_one(device: torch.device, p: float) -> None:
    group = Group(device, (4, 4, 4))
    bordered = BorderedWeight(torch.cat(group.weights), 12)
    ours = group.results(group.call(p, stacked_weight=bordered, form="bordered"))
    same(ours, group.results(group.call(p, stacked_weight=bordered, form="plain")))
    same(ours, group.results(group.formula(p)))


def test_errors_say_what_was_expected(device: torch.device) -> None:
    group = Group(device)
    weight = torch.cat(group.weights)
    with pytest.raises(ValueError, match="form must be one of auto, plain, fused, bordered, got 'best'"):
        group.call(form="best")
    with pytest.raises(ValueError, match="needs stacked_weight to be a BorderedWeight"):
        group.call(stacked_weight=weight, form="bordered")
    with pytest.raises(ValueError, match=r"stacked_weight must be \(80, 90\), got \(79, 90\)"):
        group.call(stacked_weight=weight[1:])
    group.B[1] = None
    with pytest.raises(ValueError, match="projection 1: lora_A and lora_B must both be given"):
        group.call()
    group.B[1] = torch.zeros(16, 4, device=device)
    with pytest.raises(ValueError, match=r"projection 1: .*lora_A must be \(r, 90\) and lora_B \(16, r\)"):
        group.call()
    with pytest.raises(ValueError, match="one entry a projection"):
        lora_linear_group(group.x, group.weights, group.biases, group.A[:2], group.B, SCALING)
