"""LoRA on stacked experts, rows sorted by expert: gradients, dtypes, shapes, both forms of the computation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import no_worse
from torch import Tensor

from fastpeft.ops.lora_experts import lora_experts, reference

module = sys.modules["fastpeft.ops.lora_experts"]  # the package may have a function of the same name


def operands(
    counts: list[int], k: int = 24, n: int = 40, r: int = 4, dtype: torch.dtype = torch.float32, behind: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, W, A, B and the offsets; `behind` rows belong to no expert."""
    experts = len(counts)
    x = torch.randn(sum(counts) + behind, k).to(dtype).requires_grad_()
    weight = (torch.randn(experts, n, k) / k**0.5).to(dtype).mT
    A = (torch.randn(experts, r, k) / k**0.5).to(dtype).requires_grad_()
    B = torch.randn(experts, n, r).to(dtype).requires_grad_()
    return x, weight, A, B, torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def results(function: Callable[..., Tensor], x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Any:
    """y, dx, dA, dB for a fixed gradient of the rows that belong to an expert."""
    y = function(x, weight, A, B, 1.7, offsets)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    dy[int(offsets[-1]) :] = 0
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def test_gradients_and_second_derivatives() -> None:
    x, weight, A, B, offsets = operands([3, 0, 2], 5, 4, 2, torch.float64)

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_experts(x, weight, A, B, 1.7, offsets)

    assert torch.autograd.gradcheck(call, (x, A, B))
    assert torch.autograd.gradgradcheck(call, (x, A, B), fast_mode=True)
    A.requires_grad_(False)  # a frozen adapter: nothing is kept of x
    B.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x: call(x, A, B), (x,))
    assert torch.autograd.gradgradcheck(lambda x: call(x, A, B), (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_device", [False, True])
@settings(max_examples=12, deadline=None, derandomize=True)  # of one or two rows PyTorch's sums may happen to be exact
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_values(on_device: bool, dtype: torch.dtype, counts: list[int], r: int, behind: int, transposed: bool) -> None:
    """Both forms, whatever experts get no row, in every dtype, err at most twice as much as PyTorch's own products."""
    torch.manual_seed(0)
    given_operands = operands(counts, 32, 48, r, dtype, behind)
    if transposed:  # kept as (E, K, N)
        given_operands = (given_operands[0], given_operands[1].contiguous(), *given_operands[2:])
    wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in given_operands]
    with pytest.MonkeyPatch.context() as patched:
        if on_device:
            patched.setattr(module, "_on_host", lambda device: False)
        ours = results(lora_experts, *given_operands)
    torchs, exact = results(reference, *given_operands), results(reference, *wide)
    magnitude = results(reference, *(t.abs() if t.is_floating_point() else t for t in wide))
    if on_device:  # rows of nobody may be anything
        ours[0][sum(counts) :] = ours[1][sum(counts) :] = 0
    for mine, other, truth, size in zip(ours, torchs, exact, magnitude):
        no_worse(mine, other, truth, size)
    assert not ours[0][sum(counts) :].any() and not ours[1][sum(counts) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_whichever_product_an_expert_takes(dtype: torch.dtype, transposed: bool) -> None:
    """By its rows: `linear_rows`, the vendor's product or ours."""
    x, weight, *rest = operands([3, 40, 130], 264, 256, 8, dtype)
    weight = weight.contiguous() if transposed else weight
    wide = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in (x, weight, *rest)
    ]
    magnitude = results(reference, *(t.abs() if t.is_floating_point() else t for t in wide))
    found = (results(f, x, weight, *rest) for f in (lora_experts, reference))
    for mine, other, truth, size in zip(*found, results(reference, *wide), magnitude):
        no_worse(mine, other, truth, size)


@pytest.mark.parametrize("counts", [[1, 0, 0, 1], [3, 0, 2, 1]])
def test_factors_as_peft_keeps_them(counts: list[int]) -> None:
    """B expert by expert in its columns: fewer rows than experts, and more, give what a copy of B gives."""
    x, weight, A, B, offsets = operands(counts)
    columns = B.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    ours, theirs = (
        results(lora_experts, x, weight, A, columns, offsets),
        results(lora_experts, x, weight, A, B, offsets),
    )
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)


def test_nothing_as_large_as_the_stack_is_made_or_kept() -> None:
    from fastpeft.measure import LiveMemory, SavedActivations

    x, weight, A, B, offsets = operands([8] * 8, 64, 64, 2)
    with LiveMemory() as memory:
        with SavedActivations() as saved:
            y = lora_experts(x, weight, A, B, 1.0, offsets)
            kept = saved.bytes
        y.sum().backward()
    stack = weight.nbytes
    assert memory.peak < stack
    assert kept <= x.nbytes + A.nbytes + B.nbytes + stack + x.shape[0] * 2 * 4 + offsets.nbytes  # W is the caller's


def test_errors_say_what_is_wrong() -> None:
    x, weight, A, B, offsets = operands([2, 3])
    with pytest.raises(ValueError, match=r"x must be \(M, K\)"):
        lora_experts(x[:, :5], weight, A, B, 1.0, offsets)
    with pytest.raises(ValueError, match=r"lora_A must be \(2, r, 24\)"):
        lora_experts(x, weight, A[:, :, :5], B, 1.0, offsets)
    with pytest.raises(ValueError, match="r from 1 to 512"):
        lora_experts(x, weight, torch.zeros(2, 513, 24), torch.zeros(2, 40, 513), 1.0, offsets)
    with pytest.raises(ValueError, match="offsets must be"):
        lora_experts(x, weight, A, B, 1.0, offsets[:1])
    with pytest.raises(ValueError, match="of one dtype"):
        lora_experts(x.double(), weight, A, B, 1.0, offsets)
    with pytest.raises(ValueError, match="must be frozen"):
        lora_experts(x, weight.detach().requires_grad_(), A, B, 1.0, offsets)
