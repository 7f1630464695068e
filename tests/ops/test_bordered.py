"""The bordered weight: gradients, and a weight that everybody else sees as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastpeft.ops.bordered import BorderedWeight, lora_linear_bordered


def group(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x = torch.randn(2, 3, 11, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, 11, dtype=dtype) for n in (5, 7)]
    A = [torch.randn(2, 11, dtype=dtype, requires_grad=True) for _ in weights]
    B = [torch.randn(n, 2, dtype=dtype, requires_grad=True) for n in (5, 7)]
    return x, weights, A, B


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_and_second_derivatives(p: float) -> None:
    x, weights, A, B = group()
    bordered = BorderedWeight(torch.cat(weights), 4)

    def call(x: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        return lora_linear_bordered(x, bordered, [A0, A1], [B0, B1], [1.5, 0.5], (5, 7), p)

    assert torch.autograd.gradcheck(call, (x, *A, *B))
    assert torch.autograd.gradgradcheck(call, (x, *A, *B), fast_mode=True)


def test_one_product_forward_and_one_backward() -> None:
    """[x | s] and [dy | c ds] against the formula, from buffers that a producer would have filled."""
    x, weights, A, B = (t for t in group())
    w, flat, c = torch.cat(weights), x.detach().flatten(0, 1), 1.5
    bordered = BorderedWeight(w, 4)
    bordered.fill_rim(A, B, (5, 7))
    s = c * torch.cat([flat @ a.T for a in A], dim=1)
    y = bordered.forward(torch.cat([flat, s], dim=1))
    delta = torch.block_diag(*B) @ torch.cat(A)
    torch.testing.assert_close(y, flat @ (w + c * delta).T)
    dy = torch.randn_like(y)
    ds = torch.cat([part @ b for part, b in zip(dy.split((5, 7), dim=1), B)], dim=1)
    torch.testing.assert_close(bordered.backward(torch.cat([dy, c * ds], dim=1)), dy @ (w + c * delta))


def test_the_weight_stays_an_ordinary_weight(tmp_path: Path) -> None:
    layer = nn.Linear(11, 12, bias=False)
    before = layer.weight.detach().clone()
    bordered = BorderedWeight.take(layer.weight, 4)
    x, _, A, B = group(torch.float32)
    lora_linear_bordered(x, bordered, A, B, [1.0, 1.0], (5, 7))
    assert isinstance(layer.weight, nn.Parameter) and torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == bordered.storage.data_ptr() and layer.weight.stride() == (15, 1)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, before))
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["weight"], before)
    with torch.no_grad():
        layer.load_state_dict({"weight": 2 * before})  # writes into the storage
    assert torch.equal(bordered.weight, 2 * before)
    BorderedWeight.release(layer.weight)
    assert layer.weight.is_contiguous() and torch.equal(layer.weight, 2 * before)
    assert layer.weight.untyped_storage().nbytes() == before.nbytes


def test_the_rim_is_filled_anew_at_each_use() -> None:
    """Two adapters on one weight, switched between a forward and its backward."""
    x, weights, A, B = group()
    bordered = BorderedWeight(torch.cat(weights), 4)
    others = [torch.randn_like(t).requires_grad_() for t in (*A, *B)]
    alone = torch.autograd.grad([y.sum() for y in lora_linear_bordered(x, bordered, A, B, [1.0, 1.0], (5, 7))], x)
    outputs = lora_linear_bordered(x, bordered, A, B, [1.0, 1.0], (5, 7))
    lora_linear_bordered(x, bordered, others[:2], others[2:], [1.0, 1.0], (5, 7))
    assert torch.equal(torch.autograd.grad([y.sum() for y in outputs], x)[0], alone[0])


def test_errors_say_what_was_expected() -> None:
    x, weights, A, B = group()
    bordered = BorderedWeight(torch.cat(weights), 4)
    with pytest.raises(ValueError, match="rim must be at least 1"):
        BorderedWeight(weights[0], 0)
    with pytest.raises(ValueError, match="floating-point matrix"):
        BorderedWeight(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"do not fit a weight \(12, 11\) with a rim of 4"):
        bordered.fill_rim(A[:1], B[:1], (12,))
    with pytest.raises(ValueError, match=r"needs an input \(..., 11\)"):
        lora_linear_bordered(x[..., 1:], bordered, A, B, [1.0, 1.0], (5, 7))
    with pytest.raises(ValueError, match="of its dtype"):
        lora_linear_bordered(x.float(), bordered, A, B, [1.0, 1.0], (5, 7))
