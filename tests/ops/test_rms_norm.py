"""RMSNorm: gradients, every instruction set, the models' own norms, and everything PyTorch does around a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from norm_operands import EPS, compare, doubles, exactly, kept_bytes, magnitudes, norm_cases, results
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastpeft.ops import philox, products, rms_norm
from fastpeft.ops.backend import OPS, available_backends, backend
from fastpeft.ops.rms_norm import formula

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]


def operands(
    rows: tuple[int, ...] = (3, 13),
    k: int = 70,
    dtype: torch.dtype = FP32,
    parameter: torch.dtype | None = None,
    **like: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and weight, all of which require gradients."""
    x, residual = ((3 * torch.randn(*rows, k, **like)).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, torch.randn(k, **like).to(parameter or dtype).requires_grad_()


def models_own(kind: type[torch.nn.Module], weight: Tensor) -> torch.nn.Module:
    norm = kind(weight.shape[0], EPS)
    norm.weight = torch.nn.Parameter(weight.detach())
    return norm


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_gradients_and_second_derivatives(residual: bool, weight: bool) -> None:
    x, r, w = operands((2, 3), 7, torch.float64)
    names = [name for name, given in (("residual", residual), ("weight", weight)) if given]

    def call(x: Tensor, *rest: Tensor) -> Any:
        return rms_norm(x, **{"weight": None, "eps": EPS, "offset": 1.0, **dict(zip(names, rest))})

    inputs = (x, *(t for t, given in ((r, residual), (w, weight)) if given))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_margins_gradients(p: float) -> None:
    """norm and narrow product together, through the two operators that do both."""
    x, _, w = (t.detach() for t in operands((5,), 11, torch.float64))
    A, dy, ds = (torch.randn(rows, k, dtype=torch.float64) for rows, k in ((6, 11), (5, 11), (5, 6)))
    seed, scaling = torch.tensor([5]) if philox.threshold(p) else None, [0.5, 2.0]
    for t in (x, w, A):
        t.requires_grad_()
    y = formula(x, w, EPS, 1.0, torch.float64)
    s = products.shrink_reference(y, A, scaling, p, seed)
    expected = torch.autograd.grad((y, s), (x, A, w), (dy, ds))
    ours = OPS["auto"].rms_norm_shrink(x.detach(), w.detach(), EPS, 1.0, A.detach(), scaling, p, seed, torch.float64)
    torch.testing.assert_close((ours[0], ours[2]), (y.detach(), s.detach()))
    found = OPS["auto"].rms_norm_shrink_backward(
        dy, ds, x.detach(), ours[1], w.detach(), 1.0, A.detach(), scaling, p, seed, torch.float64, True, True
    )
    torch.testing.assert_close(found, expected)


def forwards(ops: Any, c: dict[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    """What every forward operator returns."""
    norm, out = (c["weight"], EPS, c["offset"]), c["out"]
    shrink = ops.rms_norm_shrink(c["x"], *norm, c["A"], c["scaling"], c["p"], c["seed"], out)
    return {
        "rms_norm": ops.rms_norm(c["x"], *norm, out),
        "rms_norm_add": ops.rms_norm_add(c["x"], c["residual"], *norm, out),
        "rms_norm_shrink": shrink,
    }


def backwards(ops: Any, c: dict[str, Any], rstd: Tensor, out: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """What every backward operator returns; y is rounded to `out`."""
    dropout, weight, offset = (c["scaling"], c["p"], c["seed"]), c["weight"], c["offset"]
    need = weight is not None
    return {
        "plain": ops.rms_norm_backward(c["dy"], c["x"], rstd, weight, offset, None, need),
        "d_h": ops.rms_norm_backward(c["dy"], c["x"], rstd, weight, offset, c["d_h"], False)[:1],
        "shrink": ops.rms_norm_shrink_backward(
            c["dy"], c["ds"], c["x"], rstd, weight, offset, c["A"], *dropout, out, True, need
        ),
        "no dx": ops.rms_norm_shrink_backward(
            c["dy"], c["ds"], c["x"], rstd, weight, offset, c["A"], *dropout, out, False, False
        )[1:2],
    }


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=norm_cases())
def test_operators_equal_the_reference(isa: str, no_worse: Callable[..., None], case: dict) -> None:
    before = {key: t.clone() for key, t in case.items() if isinstance(t, Tensor)}
    wide = exactly(case)
    ours, torchs, exact = (
        forwards(ops, c) for ops, c in ((OPS["auto"], case), (OPS["reference"], case), (OPS["reference"], wide))
    )
    rstd, wide_rstd = torchs["rms_norm"][1], exact["rms_norm"][1]
    terms = magnitudes(wide | {"bias": None}, torch.zeros_like(wide_rstd), wide_rstd)
    for name in ours:
        s = terms["s"] if name == "rms_norm_shrink" else ()
        known = (*terms["y"], None, *s) if name != "rms_norm_add" else None
        compare(no_worse, ours[name], torchs[name], exact[name], known)
    ours, torchs = (backwards(OPS[name], case, rstd, case["out"]) for name in ("auto", "reference"))
    exact = backwards(OPS["reference"], wide, wide_rstd, torch.float64)
    for name in ours:
        compare(no_worse, ours[name], torchs[name], exact[name], terms[name])
    assert all(torch.equal(t, case[key]) for key, t in before.items()), "an operand was written to"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm])
def test_the_models_own_norms(
    name: str, no_worse: Callable[..., None], kind: type, dtype: torch.dtype, device: torch.device
) -> None:
    """Forward and backward; in 16 bit at most twice as far from float64 as they are."""
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's kernels")
    x, _, w = operands((2, 40), 576, dtype, device=device)
    theirs = models_own(kind, w).to(device)
    offset = 1.0 if kind is GemmaRMSNorm else 0.0
    with backend(name):
        ours = results(lambda x, w: rms_norm(x, w, EPS, offset), x, w)
    eager = results(lambda x, w: torch.func.functional_call(theirs, {"weight": w}, (x,)), x, w)
    exact = results(lambda x, w: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (w + offset), *doubles(x, w))
    compare(no_worse, ours, eager, exact)


def test_dtypes_follow_the_models(device: torch.device) -> None:
    """fp32 weights over bf16 activations, with and without autocast: Llama's promotes, Gemma's keeps x's."""
    x, _, w = operands(dtype=BF16, parameter=FP32, device=device)
    for autocast in (False, True):
        with torch.autocast(device.type, dtype=BF16, enabled=autocast):
            llama, gemma = models_own(LlamaRMSNorm, w).to(device)(x), models_own(GemmaRMSNorm, w).to(device)(x)
            assert rms_norm(x, w, EPS).dtype == llama.dtype == FP32
            y = rms_norm(x, w, EPS, 1.0, out_dtype=x.dtype)
            assert y.dtype == gemma.dtype == BF16
            dx, dw = torch.autograd.grad(y.float().sum(), (x, w))
            assert dx.dtype == BF16 and dw.dtype == FP32


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_residual_is_added_first(no_worse: Callable[..., None], device: torch.device, dtype: torch.dtype) -> None:
    """(y, h) and the gradients, with gradients arriving at both, at one, and where only one operand wants one."""
    x, r, w = operands(dtype=dtype, device=device)

    def eager(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        f = h if h.dtype == torch.float64 else h.float()
        return (w * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + EPS)).to(h.dtype)), h

    fused = lambda x, r, w: rms_norm(x, w, EPS, residual=r)  # noqa: E731
    y, h = fused(x, r, w)
    assert torch.equal(h, x + r)
    compare(no_worse, results(fused, x, r, w), results(eager, x, r, w), results(eager, *doubles(x, r, w)))
    frozen = (x, r, w.detach())
    for one in (lambda both: both[0], lambda both: both[1]):
        pair = [lambda *t, f=f, one=one: one(f(*t)) for f in (fused, eager)]
        found = results(pair[0], *frozen), results(pair[1], *frozen), results(pair[1], *doubles(*frozen))
        compare(no_worse, *found)
    (dr,) = torch.autograd.grad(fused(x.detach(), r, w.detach())[0].sum(), r)
    torch.testing.assert_close(dr, torch.autograd.grad(eager(x, r, w)[0].sum(), r)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [(0,), (1,), (2, 0), (1, 1), (2, 3, 5), ()])
def test_any_leading_shape(device: torch.device, rows: tuple[int, ...]) -> None:
    x, r, w = operands(rows, 37, device=device)
    norm = models_own(LlamaRMSNorm, w).to(device)
    ours = results(lambda x: rms_norm(x, w.detach(), EPS), x)
    for o, t in zip(ours, results(norm, x)):
        torch.testing.assert_close(o, t)
    y, h = rms_norm(x, w, EPS, residual=r)
    assert y.shape == h.shape == x.shape


def test_any_strides(device: torch.device) -> None:
    """A transposed input, a head of a wider projection, an expanded output gradient, a weight that is a column."""
    x, _, w = operands((40,), device=device)
    expected = rms_norm(x, w, EPS)
    wider = torch.cat([x, x], dim=1)[:, :70]
    for same in (x.t().contiguous().t(), wider, x[:, None].expand(-1, 3, -1)[:, 1], x.flip(0).flip(0)):
        torch.testing.assert_close(rms_norm(same, w, EPS), expected)
    column = w.detach()[:, None].repeat(1, 3)[:, 0]
    torch.testing.assert_close(rms_norm(x, column, EPS), expected)
    (ours,) = torch.autograd.grad(expected.sum(), x)
    (theirs,) = torch.autograd.grad(models_own(LlamaRMSNorm, w).to(device)(x).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_kept_for_the_backward(device: torch.device, residual: bool) -> None:
    """The input (or the sum) and rstd."""
    x, r, w = operands((2, 64), device=device)
    r = r if residual else None
    kept = kept_bytes(lambda: rms_norm(x, w, EPS, residual=r), w, *(() if residual else (x,)))
    assert kept == 128 * 4 + (x.numel() * 4 if residual else 0)


def test_a_frozen_weight_gets_no_gradient_and_no_graph_is_made_for_nothing(device: torch.device) -> None:
    x, r, w = operands(device=device)
    assert not rms_norm(x.detach(), w.detach(), EPS).requires_grad
    with torch.no_grad():
        y, h = rms_norm(x, w, EPS, residual=r)
        assert not y.requires_grad and torch.equal(h, x + r)
    torch.testing.assert_close(y, rms_norm(x, w, EPS, residual=r)[0])
    (dw,) = torch.autograd.grad(rms_norm(x.detach(), w, EPS).sum(), w)  # the first norm of a model
    (expected,) = torch.autograd.grad(models_own(LlamaRMSNorm, w).to(device)(x).sum(), x, retain_graph=True)
    assert dw.shape == w.shape and expected.shape == x.shape


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    x, dy, ds = torch.randn(rows, 300), torch.randn(rows, 300), torch.randn(rows, 16)
    w, A, seed, threads, found = torch.randn(300), torch.randn(16, 300), torch.tensor([9]), torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            rest = (A, [1.0, 2.0], 0.1, seed, FP32)
            y, rstd, s = OPS["auto"].rms_norm_shrink(x, w, EPS, 0.0, *rest)
            found.append(
                [
                    *(y, rstd, s),
                    *OPS["auto"].rms_norm_backward(dy, x, rstd, w, 0.0, None, True),
                    *OPS["auto"].rms_norm_shrink_backward(dy, ds, x, rstd, w, 0.0, *rest, True, True),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))


def test_s_is_of_the_rounded_output(isa: str) -> None:
    """Whoever reads y afterwards must see what s was made of."""
    x, w, A = torch.randn(50, 130).bfloat16(), torch.randn(130).bfloat16(), torch.randn(4, 130)
    y, rstd, s = OPS["auto"].rms_norm_shrink(x, w, EPS, 0.0, A, [1.0], 0.0, None, BF16)
    plain, plain_rstd = OPS["auto"].rms_norm(x, w, EPS, 0.0, BF16)
    assert torch.equal(y, plain) and torch.equal(rstd, plain_rstd)
    torch.testing.assert_close(s, y.float() @ A.T)


@pytest.mark.parametrize("residual", [True, False])
def test_compiles_without_a_graph_break(device: torch.device, residual: bool) -> None:
    x, r, w = operands((2, 64), device=device)

    def call(x: Tensor, r: Tensor, w: Tensor) -> Any:
        if residual:
            y, h = rms_norm(x * 1, w, EPS, residual=r)
            return y.sin(), h.cos()
        return rms_norm(x * r, w, EPS).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(results(call, x, r, w), results(compiled, x, r, w)):
        torch.testing.assert_close(eager, graph, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schemas_and_fakes_are_true(namespace: str) -> None:
    x, r, dy, ds = (torch.randn(7, k).bfloat16() for k in (10, 10, 10, 4))
    w, A, rstd, seed = torch.randn(10), torch.randn(4, 10), torch.rand(7), torch.tensor([3])
    dropout = (A, [1.0, 2.0], 0.1, seed, BF16)
    calls = {
        "rms_norm": [(x, w, EPS, 0.0, FP32), (x, None, EPS, 0.0, BF16)],
        "rms_norm_add": [(x, r, w, EPS, 1.0, FP32)],
        "rms_norm_backward": [(dy, x, rstd, w, 0.0, r, True), (dy, x, rstd, None, 0.0, None, False)],
        "rms_norm_shrink": [(x, w, EPS, 0.0, *dropout)],
        "rms_norm_shrink_backward": [
            (dy, ds, x, rstd, w, 0.0, *dropout, *need) for need in ((True, True), (False, False))
        ],
    }
    for name, some in calls.items():
        for arguments in some:
            operator = getattr(getattr(torch.ops, namespace), name).default
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_graph_may_be_used_twice_and_nothing_is_written_to(device: torch.device) -> None:
    x, r, w = operands((64,), device=device)
    before = [t.detach().clone() for t in (x, r, w)]
    y, h = rms_norm(x, w, EPS, residual=r)
    first = torch.autograd.grad((y.sum(), h.sin().sum()), (x, r, w), retain_graph=True)
    second = torch.autograd.grad((y.sum(), h.sin().sum()), (x, r, w))
    assert all(torch.equal(a, c) for a, c in zip(first, second))
    assert all(torch.equal(a, c) for a, c in zip(before, (x, r, w)))


def test_the_output_may_be_changed_in_place(device: torch.device) -> None:
    x, _, w = operands(device=device)
    rms_norm(x, w, EPS).clamp_(min=0).sum().backward()
    assert x.grad is not None and w.grad is not None


def test_transforms_and_subclasses(device: torch.device) -> None:
    x, _, w = (t.detach() for t in operands((64,), device=device))
    whole = models_own(LlamaRMSNorm, w).to(device)(x)
    torch.testing.assert_close(torch.vmap(lambda row: rms_norm(row, w, EPS))(x), whole)
    assert torch.func.grad(lambda w: rms_norm(x, w, EPS).sum())(w).shape == w.shape

    class Marked(Tensor):
        """A subclass that every operator passes on."""

    marked = rms_norm(x.as_subclass(Marked), w, EPS)
    assert type(marked) is Marked
    torch.testing.assert_close(marked.as_subclass(Tensor), whole)
    meta = rms_norm(x.to("meta"), w.to("meta"), EPS)
    assert meta.is_meta and meta.shape == whole.shape


def test_errors_say_what_was_expected() -> None:
    x, r, w = operands()
    with pytest.raises(ValueError, match=r"weight must be \(70,\) for an input \(3, 13, 70\), got \(69,\)"):
        rms_norm(x, w[1:], EPS)
    with pytest.raises(ValueError, match="residual must have the shape and dtype of x"):
        rms_norm(x, w, EPS, residual=r.double())
    with pytest.raises(ValueError, match="out_dtype must be a floating dtype, got torch.int64"):
        rms_norm(x, w, EPS, out_dtype=torch.int64)
    with pytest.raises(ValueError, match="have a dimension to normalise"):
        rms_norm(torch.zeros(()), None, EPS)
