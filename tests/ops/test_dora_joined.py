"""A norm or an activation and its DoRA projections in one: what each gives alone, and nothing of the product kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.measure import SavedActivations
from fastpeft.ops import philox
from fastpeft.ops.glu import glu_reference
from fastpeft.ops.glu_linear import glu_linear
from fastpeft.ops.layer_norm import formula as layer_norm_formula
from fastpeft.ops.norm_linear import LayerNorm, RMSNorm, norm_linear
from fastpeft.ops.rms_norm import formula as rms_norm_formula
from fastpeft.ops.weight_norm import direct

K, SPLITS, RANKS, SCALING = 24, (40, 16, 8), (5, 2, 3), (2.0, 1.0, 0.5)
PRODUCERS = ("rms_norm", "layer_norm", "silu_glu", "gelu_tanh")


class Case:
    """A producer with its inputs, three projections whose magnitudes have moved, and gradients of everything."""

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype = torch.float32,
        rows: tuple[int, ...] = (3, 7),
        adapter: torch.dtype | None = None,
        splits: tuple[int, ...] = SPLITS,
    ) -> None:
        torch.manual_seed(0)
        new = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)  # noqa: E731
        self.kind, self.dtype = kind, dtype
        self.inputs = [new(*rows, K).requires_grad_() for _ in range(2 if kind == "silu_glu" else 1)]
        count = {"layer_norm": 2, "rms_norm": 1}.get(kind, 0)
        self.parameters = [new(K).requires_grad_() for _ in range(count)]
        self.weights = [new(n, K) / K**0.5 for n in splits]
        self.biases = [None, *(new(n).requires_grad_() for n in splits[1:])]
        self.A = [(new(r, K) / K**0.5).to(adapter or dtype).requires_grad_() for r in RANKS]
        self.B = [(new(n, r) / 3).to(adapter or dtype).requires_grad_() for n, r in zip(splits, RANKS)]
        self.m = [
            (n * torch.empty_like(n).uniform_(0.7, 1.5)).to(adapter or dtype).detach().requires_grad_()
            for n in self.norms(torch.float64)
        ]
        self.dys = [new(*rows, n) for n in splits]
        self.dn = new(*rows, K)

    def norms(self, dtype: torch.dtype) -> list[Tensor]:
        parts = zip(self.weights, self.A, self.B, SCALING)
        return [direct(w.to(dtype), a.to(dtype), b.to(dtype), c).detach() for w, a, b, c in parts]

    def leaves(self) -> list[Tensor]:
        found = [*self.inputs, *self.parameters, *self.biases, *self.A, *self.B, *self.m]
        return [t for t in found if t is not None and t.requires_grad]

    def call(self, p: float = 0.0) -> list[Tensor]:
        torch.manual_seed(1)
        lists = (self.weights, self.biases, self.A, self.B, SCALING, p)
        if "norm" in self.kind:
            norm = (LayerNorm if self.kind == "layer_norm" else RMSNorm)(1e-5, 0.0, self.dtype)
            n, outputs = norm_linear(norm, self.inputs[0], self.parameters, *lists, magnitudes=self.m)
        else:
            gate, up = [*self.inputs, None][:2]
            n, outputs = glu_linear(gate, up, self.kind.removesuffix("_glu"), *lists, magnitudes=self.m)
        return [n, *outputs]

    def formula(self, p: float = 0.0, dtype: torch.dtype | None = None) -> list[Tensor]:
        """PEFT's formula from PyTorch's operators, in the dtype given."""
        torch.manual_seed(1)
        dtype = dtype or self.dtype
        inputs = [t.to(dtype) for t in (*self.inputs, *self.parameters)]
        if self.kind == "layer_norm":
            n = layer_norm_formula(*inputs, 1e-5, 0.0, dtype)
        elif self.kind == "rms_norm":
            n = rms_norm_formula(*inputs, 1e-5, 0.0, dtype)
        else:
            n = glu_reference(*[*inputs, None][:2], self.kind.removesuffix("_glu"))
        seed = philox.draw_seed(n.device) if p else None
        outputs = [n]
        lists = (self.weights, self.biases, self.A, self.B, self.m, self.norms(torch.float64), SCALING)
        for member, (w, bias, a, b, m, norm, c) in enumerate(zip(*lists)):
            wide = dtype if dtype == torch.float64 else a.dtype
            w, bias = w.to(dtype), None if bias is None else bias.to(dtype)
            y, z = F.linear(n, w, bias), n
            base = y if bias is None else y - bias
            if seed is not None:
                mask = philox.keep_mask(seed, member, n.shape[:-1].numel(), K, p).view(n.shape)
                z = n * (mask * philox.keep_scale(p)).to(dtype)
                base = F.linear(z, w)
            gain = m.to(wide) / norm.to(wide)
            rim = F.linear(F.linear(z.to(wide), a.to(wide)), b.to(wide)) * c
            outputs.append((y + (gain - 1) * base + gain * rim).to(dtype))
        return outputs

    def results(self, outputs: list[Tensor], used: Sequence[int] = (0, 1, 2, 3)) -> list[Tensor | None]:
        """Outputs, then the gradients of every leaf, from those outputs that are used."""
        dys = [self.dn, *self.dys]
        gradients = torch.autograd.grad(
            [outputs[i] for i in used], self.leaves(), [dys[i].to(outputs[i].dtype) for i in used], allow_unused=True
        )
        return [*(y.detach() for y in outputs), *gradients]


def assert_close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for mine, other in zip(ours, theirs):
        if mine is None or other is None:  # absent and zero are the same to whoever asked
            assert all(t is None or not t.any() for t in (mine, other))
        else:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
)
def test_no_further_from_float64_than_pytorch(kind: str, dtype: torch.dtype, adapter: Any, p: float) -> None:
    """In the norm, as of `dora_linear`; one rounding of the result is granted, PyTorch may happen to be exact."""
    case = Case(kind, dtype, (5, 31), adapter)
    ours, theirs = case.results(case.call(p)), case.results(case.formula(p))
    exact = case.results(case.formula(p, torch.float64))
    for mine, other, true in zip(ours, theirs, exact):
        assert mine is not None and other is not None and true is not None and mine.dtype is other.dtype
        error, allowed = ((t.double() - true).norm().item() for t in (mine, other))
        assert error <= 2 * allowed + 2 * torch.finfo(mine.dtype).eps * true.double().norm().item()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", PRODUCERS)
def test_gradients_and_second_derivatives(monkeypatch: pytest.MonkeyPatch, kind: str, p: float) -> None:
    case = Case(kind, torch.float64, (2,), splits=(3, 2, 4))
    leaves, norms = case.leaves(), case.norms(torch.float64)  # constants to the gradient, so to a small step too
    by_weight = {w.data_ptr(): norm for w, norm in zip(case.weights, norms)}
    monkeypatch.setattr(
        sys.modules["fastpeft.ops.dora_projections"], "weight_norm", lambda w, *_: by_weight[w.data_ptr()]
    )

    def call(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(p))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 3), (2, 3)])
@pytest.mark.parametrize("kind", ["rms_norm", "silu_glu"])
def test_some_outputs_unused(kind: str, used: tuple[int, ...], p: float) -> None:
    case = Case(kind)
    assert_close(case.results(case.call(p), used), case.results(case.formula(p), used))


@pytest.mark.parametrize("kind", ["layer_norm", "silu_glu"])
@pytest.mark.parametrize("frozen", ["inputs", "adapters", "all but A", "all but m"])
def test_only_what_is_asked_for(kind: str, frozen: str) -> None:
    case = Case(kind)
    still: list[Tensor | None] = {
        "inputs": [*case.inputs, *case.parameters],
        "adapters": [*case.A, *case.B, *case.m],
        "all but A": [*case.inputs, *case.parameters, *case.biases, *case.B, *case.m],
        "all but m": [*case.inputs, *case.parameters, *case.biases, *case.A, *case.B],
    }[frozen]
    for t in still:
        if t is not None:
            t.requires_grad_(False)
    used = (0, 1, 2, 3) if frozen == "adapters" else (1, 2, 3)
    assert_close(case.results(case.call(), used), case.results(case.formula(), used))


@pytest.mark.parametrize("kind", PRODUCERS)
def test_the_product_is_not_kept(kind: str) -> None:
    """Kept: the inputs, three s, at most two numbers a row, the outputs and two numbers for each of their columns."""
    case = Case(kind, rows=(8, 16))
    with SavedActivations() as saved:
        outputs = case.call()
        parameters = [*case.parameters, *case.weights, *case.biases, *case.A, *case.B, *case.m]
        known = {t.data_ptr(): t.untyped_storage().nbytes() for t in parameters if t is not None}
        kept = saved.bytes - sum(size for where, size in known.items() if where in saved.storages)
    rows, columns = 128, sum(SPLITS)
    assert kept <= 4 * rows * (len(case.inputs) * K + 3 * 5 + 2 + columns) + 8 * columns
    del outputs


@pytest.mark.parametrize("kind", ["rms_norm", "silu_glu"])
def test_an_output_that_does_not_tell_its_magnitudes_gradient(kind: str) -> None:
    """One is changed in place, one has a magnitude of zero: then n is made again, and its product."""
    case = Case(kind)
    with torch.no_grad():
        case.m[1][:2] = 0.0

    def results(outputs: list[Tensor]) -> list[Tensor | None]:
        outputs[1].mul_(2.0)
        return case.results(outputs)

    assert_close(results(case.call()), results(case.formula()))


def test_empty_batches_and_single_rows() -> None:
    for kind in ("rms_norm", "silu_glu"):
        for rows in ((0,), (1,), (2, 0), (1, 1, 3)):
            case = Case(kind, rows=rows)
            assert_close(case.results(case.call()), case.results(case.formula()))


def test_nothing_is_written_to() -> None:
    case = Case("silu_glu")
    tensors = [*case.leaves(), *case.weights, *case.dys, case.dn]
    before = [t.detach().clone() for t in tensors]
    case.results(case.call(0.3))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


def test_trained_base_weights() -> None:
    case = Case("rms_norm")
    outputs = []
    for call in (case.call, case.formula):
        for w in case.weights:
            w.requires_grad_()
        y = call()[1]
        outputs.append(torch.autograd.grad(y, case.weights[0], case.dys[0]))
    assert_close(*outputs)


def test_errors_name_the_option() -> None:
    case = Case("rms_norm")
    case.m[1] = torch.ones(3)
    with pytest.raises(ValueError, match="projection 1: magnitude must have 16 elements"):
        case.call()
    case = Case("rms_norm")
    case.A[0] = case.B[0] = None  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="magnitudes: every projection needs"):
        case.call()
