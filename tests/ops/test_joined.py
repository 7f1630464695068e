"""A norm or an activation and its projections in one: what each gives alone, and nothing of the product kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft.measure import SavedActivations
from fastpeft.ops import philox
from fastpeft.ops.glu import glu_reference
from fastpeft.ops.glu_linear import glu_linear
from fastpeft.ops.layer_norm import formula as layer_norm_formula
from fastpeft.ops.norm_linear import LayerNorm, RMSNorm, norm_linear
from fastpeft.ops.rms_norm import formula as rms_norm_formula

K, SPLITS, RANKS, SCALING = 24, (40, 16, 8), (5, None, 3), (2.0, 0.0, 0.5)
PRODUCERS = ("rms_norm", "gemma_norm", "layer_norm", "silu_glu", "gelu_tanh")


class Case:
    """A producer with its inputs, three projections of which one has no adapter, and gradients of everything."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rows: tuple[int, ...] = (3, 7),
        adapter: torch.dtype | None = None,
        splits: tuple[int, ...] = SPLITS,
        trained: bool = False,
        ranks: Sequence[int | None] = RANKS,
    ) -> None:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape, device=device, dtype=torch.float64).to(dtype)  # noqa: E731
        self.kind, self.dtype = kind, dtype
        self.inputs = [new(*rows, K).requires_grad_() for _ in range(2 if kind == "silu_glu" else 1)]
        self.parameters = [
            new(K).requires_grad_() for _ in range({"layer_norm": 2}.get(kind, 1 if "norm" in kind else 0))
        ]
        self.weights = [(new(n, K) / K**0.5).requires_grad_(trained) for n in splits]
        self.biases = [None, *(new(n).requires_grad_() for n in splits[1:])]
        rank = [(r, n) for r, n in zip(ranks, splits)]
        self.A = [None if r is None else (new(r, K) / K**0.5).to(adapter or dtype).requires_grad_() for r, _ in rank]
        self.B = [None if r is None else new(n, r).to(adapter or dtype).requires_grad_() for r, n in rank]
        self.dys = [new(*rows, n) for n in splits]
        self.dn = new(*rows, K)

    def leaves(self) -> list[Tensor]:
        found = [*self.inputs, *self.parameters, *self.weights, *self.biases, *self.A, *self.B]
        return [t for t in found if t is not None and t.requires_grad]

    def produced(self, dtype: torch.dtype | None = None) -> Tensor:
        """n by the formula, in the dtype given."""
        dtype = dtype or self.dtype
        inputs = [t.to(dtype) for t in self.inputs]
        parameters = [t.to(dtype) for t in self.parameters]
        if self.kind == "layer_norm":
            return layer_norm_formula(*inputs, *parameters, 1e-5, 0.0, dtype)
        if "norm" in self.kind:
            return rms_norm_formula(*inputs, *parameters, 1e-5, float(self.kind == "gemma_norm"), dtype)
        gate, up = [*inputs, None][:2]
        return glu_reference(gate, up, "silu" if self.kind == "silu_glu" else "gelu_tanh")

    def call(self, p: float = 0.0, **options: Any) -> list[Tensor]:
        torch.manual_seed(1)
        lists = (self.weights, self.biases, self.A, self.B, SCALING, p)
        if "norm" in self.kind:
            kind = LayerNorm if self.kind == "layer_norm" else RMSNorm
            norm = kind(1e-5, float(self.kind == "gemma_norm"), self.dtype)
            n, outputs = norm_linear(norm, self.inputs[0], self.parameters, *lists, **options)
        else:
            gate, up = [*self.inputs, None][:2]
            act = "silu" if self.kind == "silu_glu" else "gelu_tanh"
            n, outputs = glu_linear(gate, up, act, *lists, **options)
        return [n, *outputs]

    def formula(self, p: float = 0.0, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same from PyTorch's operators, in the dtype given."""
        torch.manual_seed(1)
        dtype = dtype or self.dtype
        n = self.produced(dtype)
        seed = philox.draw_seed(n.device) if p else None
        outputs, member = [n], 0
        for w, bias, a, b, c in zip(self.weights, self.biases, self.A, self.B, SCALING):
            y = F.linear(n, w.to(dtype), None if bias is None else bias.to(dtype))
            if a is not None and b is not None:
                wide = dtype if dtype == torch.float64 else a.dtype
                z = n.to(wide)
                if seed is not None:
                    mask = philox.keep_mask(seed, member, n.shape[:-1].numel(), K, p).view(n.shape)
                    z = z * mask * philox.keep_scale(p)
                y = y + (c * F.linear(F.linear(z, a.to(wide)), b.to(wide))).to(dtype)
                member += 1
            outputs.append(y)
        return outputs

    def results(self, outputs: list[Tensor], used: Sequence[int] = (0, 1, 2, 3)) -> list[Tensor | None]:
        """Outputs, then the gradients of every leaf, from those outputs that are used."""
        dys = [self.dn, *self.dys]
        gradients = torch.autograd.grad(
            [outputs[i] for i in used], self.leaves(), [dys[i].to(outputs[i].dtype) for i in used], allow_unused=True
        )
        return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
)
def test_no_further_from_float64_than_pytorch(
    no_worse: Callable[..., None], device: torch.device, kind: str, dtype: torch.dtype, adapter: Any, p: float
) -> None:
    case = Case(kind, device, dtype, (5, 31), adapter)
    ours, theirs = case.results(case.call(p)), case.results(case.formula(p))
    exact = case.results(case.formula(p, torch.float64))
    for mine, other, true in zip(ours, theirs, exact):
        no_worse(mine, other, true.double(), true.double() * 8)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_gradients_and_second_derivatives(device: torch.device, kind: str, trained: bool, p: float) -> None:
    case = Case(kind, device, torch.float64, (2,), splits=(3, 2, 4), trained=trained, ranks=(2, None, 1))
    leaves = case.leaves()

    def call(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(p))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 3), (2, 3)])
@pytest.mark.parametrize("kind", ["rms_norm", "silu_glu"])
def test_some_outputs_unused(device: torch.device, kind: str, used: tuple[int, ...]) -> None:
    case = Case(kind, device)
    for mine, other in zip(case.results(case.call(), used), case.results(case.formula(), used)):
        if mine is None or other is None:  # absent and zero are the same to whoever asked
            assert all(t is None or not t.any() for t in (mine, other))
        else:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("used", [(0,), (0, 2)])
@pytest.mark.parametrize("kind", ["rms_norm", "gemma_norm", "layer_norm"])
def test_a_frozen_norm_whose_adapters_nobody_uses(
    device: torch.device, kind: str, used: tuple[int, ...], dora: bool
) -> None:
    """The second projection has no adapter, or with DoRA none of them is used: the norm's own backward runs."""
    case = Case(kind, device, ranks=(5, 4, 3) if dora else RANKS)
    for parameter in case.parameters:
        parameter.requires_grad_(False)
    if not dora:
        theirs = case.results(case.formula(), used)
        for mine, other in zip(case.results(case.call(), used), theirs):
            assert (mine is None and (other is None or not other.any())) or torch.allclose(mine, other, 1e-4, 1e-4)
        return
    magnitudes = [torch.rand(n, device=device).add_(0.5).requires_grad_() for n in SPLITS]
    (mine,) = torch.autograd.grad(case.call(magnitudes=magnitudes)[0], case.inputs, case.dn)
    (other,) = torch.autograd.grad(case.produced(), case.inputs, case.dn)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["layer_norm", "silu_glu"])
@pytest.mark.parametrize("frozen", ["inputs", "adapters", "all but A"])
def test_only_what_is_asked_for(device: torch.device, kind: str, frozen: str) -> None:
    case = Case(kind, device)
    if frozen == "inputs":
        still = [*case.inputs, *case.parameters]
    elif frozen == "adapters":
        still = [t for t in (*case.A, *case.B) if t is not None]
    else:
        still = [t for t in (*case.inputs, *case.parameters, *case.biases, *case.B) if t is not None]
    for t in still:
        t.requires_grad_(False)
    used = (1, 2, 3) if frozen == "inputs" or frozen == "all but A" else (0, 1, 2, 3)
    used = tuple(i for i, y in enumerate(case.formula()) if i in used and y.requires_grad)
    for mine, other in zip(case.results(case.call(), used), case.results(case.formula(), used)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PRODUCERS)
def test_stacked_weights(device: torch.device, kind: str) -> None:
    case = Case(kind, device, ranks=(4, 4, 4))
    case.biases = [torch.randn(n, device=device) for n in SPLITS]
    stacked = case.call(stacked_weight=torch.cat(case.weights), stacked_bias=torch.cat(case.biases))
    for mine, other in zip(case.results(stacked), case.results(case.formula())):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_the_product_is_not_kept(device: torch.device, kind: str, p: float) -> None:
    """Kept: the inputs, s of two adapters, at most two numbers a row, and the seed."""
    case = Case(kind, device, rows=(8, 16))
    with SavedActivations() as saved:
        outputs = case.call(p)
        parameters = [t for t in (*case.parameters, *case.weights, *case.biases, *case.A, *case.B) if t is not None]
        kept = saved.bytes - sum(t.untyped_storage().nbytes() for t in parameters if t.data_ptr() in saved.storages)
    rows, inputs = 128, len(case.inputs)
    assert kept <= 4 * rows * (inputs * K + 2 * 5 + 2) + 8
    del outputs


def test_retained_graphs_and_checkpoints_give_the_same_bits(device: torch.device) -> None:
    case = Case("rms_norm", device, rows=(4, 40))
    outputs = case.call(0.3)
    first, second = (torch.autograd.grad(outputs[1:], case.leaves(), case.dys, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for reentrant in (False, True):
        torch.manual_seed(1)
        again = checkpoint(lambda x: tuple(case.call(0.3)), case.inputs[0], use_reentrant=reentrant)
        for parameter in case.leaves():
            parameter.grad = None
        torch.autograd.backward(again[1:], case.dys)
        assert all(torch.equal(leaf.grad, g) for leaf, g in zip(case.leaves(), first))


def test_nothing_is_written_to(device: torch.device) -> None:
    case = Case("silu_glu", device)
    tensors = [*case.leaves(), *case.weights, *case.dys, case.dn]
    before = [t.detach().clone() for t in tensors]
    case.results(case.call(0.3))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_empty_batches_and_single_rows(device: torch.device) -> None:
    for kind in ("rms_norm", "silu_glu"):
        for rows in ((0,), (1,), (2, 0), (1, 1, 3)):
            case = Case(kind, device, rows=rows)
            for mine, other in zip(case.results(case.call()), case.results(case.formula())):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_functorch(device: torch.device) -> None:
    case = Case("rms_norm", device)
    whole = case.call()[1]
    x = case.inputs[0]

    def one(row: Tensor) -> Tensor:
        case.inputs[0] = row
        return case.call()[1]

    torch.testing.assert_close(torch.func.vmap(one)(x), whole, rtol=1e-4, atol=1e-4)


def test_errors_name_the_shapes(device: torch.device) -> None:
    case = Case("silu_glu", device)
    case.inputs[1] = case.inputs[1][..., :5]
    with pytest.raises(ValueError, match="gate .* and up .* must have one shape"):
        case.call()
    case = Case("rms_norm", device)
    case.A[0] = torch.randn(5, K + 1, device=device)
    with pytest.raises(ValueError, match="projection 0"):
        case.call()
    case.weights[0] = torch.randn(40, K + 1, device=device)
    with pytest.raises(ValueError, match="norm_linear: x is"):
        case.call()
