"""The softmax on a tile in Triton's interpreter (on a GPU with --device cuda), against the reference and float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastpeft.kernels.cross_entropy import cross_entropy_accumulate_, cross_entropy_gradient_

from fastpeft.ops.cross_entropy import accumulate_reference, gradient_reference, new_state


@pytest.mark.parametrize(
    ("dtype", "widths", "scale", "cap"),
    [
        (torch.float32, (64, 64), 1.0, 0.0),
        (torch.float32, (37, 5), 0.7, 4.0),
        (torch.bfloat16, (4133, 16), 1.0, 0.0),
        (torch.float16, (130,), 0.7, 4.0),
    ],
)
def test_equals_the_reference(device, dtype, widths, scale, cap):
    rows, K = 5, 40
    generator = torch.Generator().manual_seed(0)
    tiles = [(torch.randn(rows, n, generator=generator) * 9 * (i + 1)).to(device, dtype) for i, n in enumerate(widths)]
    labels = torch.tensor([0, -1, widths[0] - 1, sum(widths) - 1, 3], device=device)
    found = []
    for accumulate, gradient, cast in (
        (cross_entropy_accumulate_, cross_entropy_gradient_, torch.Tensor.clone),
        (accumulate_reference, gradient_reference, torch.Tensor.clone),
        (accumulate_reference, gradient_reference, torch.Tensor.double),
    ):
        zs, first, outs = [cast(z) for z in tiles], 0, []
        state, silent = new_state(rows, zs[0]), new_state(rows, zs[0])
        acc = torch.ones(rows, K, dtype=state.dtype, device=device)
        for z in zs:
            before = z.clone()
            accumulate(z, labels, first, scale, cap, silent, None)
            assert torch.equal(z, before)
            accumulate(z, labels, first, scale, cap, state, acc)
            gradient(
                before, labels, first, scale, cap, torch.stack([state[0] + 1, state[0] / 9, state[0] / 99, state[0]])
            )
            outs += [z, before]
            first += z.shape[1]
        assert torch.equal(state, silent)
        found.append([*state.unbind(0), acc, *outs])
    for ours, theirs, exact in zip(*found):
        assert ours.dtype == theirs.dtype
        error, allowed = ((t.double() - exact).norm() for t in (ours, theirs))
        # One rounding in the result's dtype, and of a logit, of which the rest is the exponential, in fp32.
        unit = torch.finfo(ours.dtype).eps / 2 + torch.finfo(torch.float32).eps * 36
        assert error <= 2 * allowed + unit * exact.norm()


def test_special_values(device):
    z = torch.randn(3, 20, device=device)
    z[1, 3], z[2, :] = torch.nan, -torch.inf
    state = new_state(3, z)
    cross_entropy_accumulate_(
        z, torch.tensor([1, 1, -1], device=device), 0, 1.0, 0.0, state, torch.zeros(3, 4, device=device)
    )
    assert state[1].isnan().tolist() == [False, True, False] and state[1, 2] == 0 and not z[2].any()


def test_the_whole_operator(device):
    from fastpeft import backend
    from fastpeft.ops import linear_cross_entropy

    h = torch.randn(6, 8, device=device, requires_grad=True)
    W, y = torch.randn(90, 8, device=device), torch.randint(90, (6,), device=device)
    for trained in (False, True):
        W.requires_grad_(trained)
        leaves = [h, W] if trained else [h]
        theirs = torch.nn.functional.cross_entropy(h @ W.T, y)
        with backend("triton"):
            ours = linear_cross_entropy(h, W, y)
            found = torch.autograd.grad(ours, leaves)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves))
