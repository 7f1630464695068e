"""LayerNorm: gradients, every instruction set, PyTorch's own, and everything PyTorch does around a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from norm_operands import EPS, compare, doubles, exactly, kept_bytes, magnitudes, norm_cases, results
from torch import Tensor
from transformers.models.cohere.modeling_cohere import CohereLayerNorm

from fastpeft.ops import layer_norm, products
from fastpeft.ops.backend import OPS, available_backends, backend
from fastpeft.ops.layer_norm import formula

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]


def operands(
    rows: tuple[int, ...] = (3, 13), k: int = 70, dtype: torch.dtype = FP32, **like: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight and bias, all of which require gradients; x is far from centred."""
    x, residual = ((1 + 3 * torch.randn(*rows, k, **like)).to(dtype).requires_grad_() for _ in range(2))
    w, b = (torch.randn(k, **like).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, w, b


def eager(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("given", [("weight", "bias"), ("weight",), ("bias",), ()])
def test_gradients_and_second_derivatives(given: tuple[str, ...], residual: bool) -> None:
    x, r, w, b = operands((2, 3), 7, torch.float64)
    names = given + (("residual",) if residual else ())

    def call(x: Tensor, *rest: Tensor) -> Any:
        return layer_norm(x, **{"weight": None, "bias": None, "eps": EPS, "offset": 1.0, **dict(zip(names, rest))})

    inputs = (x, *({"weight": w, "bias": b, "residual": r}[name] for name in names))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_margins_gradients(p: float) -> None:
    """norm and narrow product together, through the two operators that do both."""
    x, _, w, b = (t.detach() for t in operands((5,), 11, torch.float64))
    A, dy, ds = (torch.randn(rows, k, dtype=torch.float64) for rows, k in ((6, 11), (5, 11), (5, 6)))
    seed, scaling = torch.tensor([5]) if p else None, [0.5, 2.0]
    for t in (x, w, b, A):
        t.requires_grad_()
    y = formula(x, w, b, EPS, 1.0, torch.float64)
    s = products.shrink_reference(y, A, scaling, p, seed)
    expected = torch.autograd.grad((y, s), (x, A, w, b), (dy, ds))
    x, w, b, A = (t.detach() for t in (x, w, b, A))
    rest = (A, scaling, p, seed, torch.float64)
    ours = OPS["auto"].layer_norm_shrink(x, w, b, EPS, 1.0, *rest)
    torch.testing.assert_close((ours[0], ours[3]), (y.detach(), s.detach()))
    need = (True, True, True)
    found = OPS["auto"].layer_norm_shrink_backward(dy, ds, x, ours[1], ours[2], w, b, 1.0, *rest, *need)
    torch.testing.assert_close(found, expected)


def forwards(ops: Any, c: dict[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    """What every forward operator returns."""
    norm, out = (c["weight"], c["bias"], EPS, c["offset"]), c["out"]
    return {
        "layer_norm": ops.layer_norm(c["x"], *norm, out),
        "layer_norm_add": ops.layer_norm_add(c["x"], c["residual"], *norm, out),
        "layer_norm_shrink": ops.layer_norm_shrink(c["x"], *norm, c["A"], c["scaling"], c["p"], c["seed"], out),
    }


def backwards(
    ops: Any, c: dict[str, Any], mean: Tensor, rstd: Tensor, out: torch.dtype
) -> dict[str, tuple[Tensor, ...]]:
    """What every backward operator returns; y is rounded to `out`."""
    kept, norm = (c["x"], mean, rstd), (c["weight"], c["bias"], c["offset"])
    shrink = (c["A"], c["scaling"], c["p"], c["seed"], out)
    need = c["weight"] is not None, c["bias"] is not None
    return {
        "plain": ops.layer_norm_backward(c["dy"], *kept, *norm, None, *need),
        "d_h": ops.layer_norm_backward(c["dy"], *kept, *norm, c["d_h"], False, False)[:1],
        "shrink": ops.layer_norm_shrink_backward(c["dy"], c["ds"], *kept, *norm, *shrink, True, *need),
        "no dx": ops.layer_norm_shrink_backward(c["dy"], c["ds"], *kept, *norm, *shrink, False, False, False)[1:2],
    }


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=norm_cases())
def test_operators_equal_the_reference(isa: str, no_worse: Callable[..., None], case: dict) -> None:
    before = {key: t.clone() for key, t in case.items() if isinstance(t, Tensor)}
    wide = exactly(case)
    three = ((OPS["auto"], case), (OPS["reference"], case), (OPS["reference"], wide))
    ours, torchs, exact = (forwards(ops, c) for ops, c in three)
    kept, wide_kept = torchs["layer_norm"][1:], exact["layer_norm"][1:]
    terms = magnitudes(wide, *wide_kept)
    sums = {**wide, "x": wide["x"] + wide["residual"]}
    of_sums = magnitudes(sums, *exact["layer_norm_add"][2:])
    known = {
        "layer_norm": (*terms["y"], wide["x"].abs(), None),
        "layer_norm_add": (*of_sums["y"], None, sums["x"].abs(), None),
        "layer_norm_shrink": (*terms["y"], wide["x"].abs(), None, *terms["s"]),
    }
    for name in ours:
        compare(no_worse, ours[name], torchs[name], exact[name], known[name])
    ours, torchs = (backwards(OPS[name], case, *kept, case["out"]) for name in ("auto", "reference"))
    exact = backwards(OPS["reference"], wide, *wide_kept, torch.float64)
    for name in ours:
        compare(no_worse, ours[name], torchs[name], exact[name], terms[name])
    assert all(torch.equal(t, case[key]) for key, t in before.items()), "an operand was written to"


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_pytorchs(name: str, no_worse: Callable[..., None], dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward; at most twice as far from float64."""
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's kernels")
    tensors = (x, _, w, b) = operands((2, 40), 576, dtype, device=device)
    for some in ((x, w, b), (x, w), (x,)):
        with backend(name):
            ours = results(lambda x, w=None, b=None: layer_norm(x, w, b, EPS), *some)
        compare(no_worse, ours, results(eager, *some), results(eager, *doubles(*some)))
    assert all(t.grad is None for t in tensors)


def test_coheres_and_nemotrons(no_worse: Callable[..., None], device: torch.device) -> None:
    """No bias and one rounding; 1 + weight."""
    x, _, w, b = operands((2, 40), 96, BF16, device=device)
    cohere = CohereLayerNorm(96, EPS).to(device)
    theirs = results(lambda x, w: torch.func.functional_call(cohere, {"weight": w}, (x,)), x, w)
    compare(no_worse, results(lambda x, w: layer_norm(x, w, None, EPS), x, w), theirs, results(eager, *doubles(x, w)))
    theirs = results(lambda x, w, b: eager(x, w + 1, b), x, w, b)
    exact = results(lambda x, w, b: eager(x, w + 1, b), *doubles(x, w, b))
    compare(no_worse, results(lambda x, w, b: layer_norm(x, w, b, EPS, 1.0), x, w, b), theirs, exact)


def test_a_large_mean_costs_no_digits(isa: str, no_worse: Callable[..., None]) -> None:
    """The variance is of centred values, not a difference of squares."""
    x, dy = torch.randn(20, 300) + 1e4, torch.randn(20, 300)
    exact = eager(x.double())
    no_worse(layer_norm(x, None, None, EPS), eager(x), exact)
    mean, rstd = x.mean(1), 1 / (x.double().var(1, unbiased=False) + EPS).sqrt().float()
    dx = OPS["auto"].layer_norm_backward(dy, x, mean, rstd, None, None, 0.0, None, False, False)[0]
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(wide), wide, dy.double())
    narrow = x.clone().requires_grad_()
    no_worse(dx, torch.autograd.grad(eager(narrow), narrow, dy)[0], truth)


def test_dtypes_under_autocast_are_pytorchs(device: torch.device) -> None:
    for dtype in (FP32, BF16):
        x, _, w, b = (t.to(dtype) for t in operands(device=device))
        for enabled in (False, True):
            with torch.autocast(device.type, dtype=BF16, enabled=enabled):
                assert layer_norm(x, w, b, EPS).dtype == eager(x, w, b).dtype


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_residual_is_added_first(no_worse: Callable[..., None], device: torch.device, dtype: torch.dtype) -> None:
    """(y, h) and the gradients, with gradients arriving at both and at one."""
    tensors = operands(dtype=dtype, device=device)

    def theirs(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return eager(h, w, b), h

    fused = lambda x, r, w, b: layer_norm(x, w, b, EPS, residual=r)  # noqa: E731
    assert torch.equal(fused(*tensors)[1], tensors[0] + tensors[1])
    compare(no_worse, results(fused, *tensors), results(theirs, *tensors), results(theirs, *doubles(*tensors)))
    frozen = [*tensors[:2], *(t.detach() for t in tensors[2:])]
    for one in (lambda both: both[0], lambda both: both[1]):
        pair = [lambda *t, f=f, one=one: one(f(*t)) for f in (fused, theirs)]
        found = results(pair[0], *frozen), results(pair[1], *frozen), results(pair[1], *doubles(*frozen))
        compare(no_worse, *found)


@pytest.mark.parametrize("rows", [(0,), (1,), (2, 0), (1, 1), (2, 3, 5), ()])
def test_any_leading_shape_and_strides(device: torch.device, rows: tuple[int, ...]) -> None:
    x, r, w, b = operands(rows, 37, device=device)
    call = lambda x: layer_norm(x, w.detach(), b.detach(), EPS)  # noqa: E731
    for o, t in zip(results(call, x), results(lambda x: eager(x, w.detach(), b.detach()), x)):
        torch.testing.assert_close(o, t)
    y, h = layer_norm(x, w, b, EPS, residual=r)
    assert y.shape == h.shape == x.shape
    if rows:
        torch.testing.assert_close(call(x.transpose(0, -1).contiguous().transpose(0, -1)), call(x))
        torch.testing.assert_close(call(torch.cat([x, x], -1)[..., :37]), call(x))


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_kept_for_the_backward(device: torch.device, residual: bool) -> None:
    """The input (or the sum), mean and rstd."""
    x, r, w, b = operands((2, 64), device=device)
    r = r if residual else None
    kept = kept_bytes(lambda: layer_norm(x, w, b, EPS, residual=r), w, b, *(() if residual else (x,)))
    assert kept == 2 * 128 * 4 + (x.numel() * 4 if residual else 0)


@pytest.mark.parametrize("rows", [1, 40, 700])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    x, dy, ds = torch.randn(rows, 300), torch.randn(rows, 300), torch.randn(rows, 16)
    w, b, A = torch.randn(300), torch.randn(300), torch.randn(16, 300)
    rest = (A, [1.0, 2.0], 0.1, torch.tensor([9]), FP32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            y, mean, rstd, s = OPS["auto"].layer_norm_shrink(x, w, b, EPS, 0.0, *rest)
            kept, need = (x, mean, rstd, w, b, 0.0), (True, True)
            plain = OPS["auto"].layer_norm_backward(dy, *kept, None, *need)
            found.append([y, s, *plain, *OPS["auto"].layer_norm_shrink_backward(dy, ds, *kept, *rest, True, *need)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, c) for again in found[1:] for a, c in zip(found[0], again))


@pytest.mark.parametrize("residual", [True, False])
def test_compiles_without_a_graph_break(device: torch.device, residual: bool) -> None:
    tensors = operands((2, 64), device=device)

    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        if residual:
            y, h = layer_norm(x * 1, w, b, EPS, residual=r)
            return y.sin(), h.cos()
        return layer_norm(x * r, w, b, EPS).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for plain, graph in zip(results(call, *tensors), results(compiled, *tensors)):
        torch.testing.assert_close(plain, graph, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schemas_and_fakes_are_true(namespace: str) -> None:
    x, r, dy, ds = (torch.randn(7, k).bfloat16() for k in (10, 10, 10, 4))
    w, b, A, mean, rstd = torch.randn(10), torch.randn(10).bfloat16(), torch.randn(4, 10), torch.rand(7), torch.rand(7)
    dropout, kept = (A, [1.0, 2.0], 0.1, torch.tensor([3]), BF16), (x, mean, rstd)
    yes, no = (True, True), (False, False)
    calls = {
        "layer_norm": [(x, w, b, EPS, 0.0, FP32), (x, None, None, EPS, 0.0, BF16)],
        "layer_norm_add": [(x, r, w, b, EPS, 1.0, FP32)],
        "layer_norm_backward": [(dy, *kept, w, b, 0.0, r, *yes), (dy, *kept, None, None, 0.0, None, *no)],
        "layer_norm_shrink": [(x, w, b, EPS, 0.0, *dropout)],
        "layer_norm_shrink_backward": [
            (dy, ds, *kept, w, b, 0.0, *dropout, True, *yes),
            (dy, ds, *kept, w, None, 0.0, *dropout, False, *no),
        ],
    }
    for name, some in calls.items():
        for arguments in some:
            operator = getattr(getattr(torch.ops, namespace), name).default
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_transforms_subclasses_and_reuse(device: torch.device) -> None:
    x, r, w, b = operands((64,), device=device)
    whole = eager(x, w, b)
    torch.testing.assert_close(torch.vmap(lambda row: layer_norm(row, w, b, EPS))(x), whole)
    meta = layer_norm(x.to("meta"), w.to("meta"), b.to("meta"), EPS)
    assert meta.is_meta and meta.shape == whole.shape
    y, h = layer_norm(x, w, b, EPS, residual=r)
    first = torch.autograd.grad((y.sum(), h.sin().sum()), (x, r, w, b), retain_graph=True)
    second = torch.autograd.grad((y.sum(), h.sin().sum()), (x, r, w, b))
    assert all(torch.equal(a, c) for a, c in zip(first, second))
    layer_norm(x, w, b, EPS).clamp_(min=0).sum().backward()  # the output may be changed in place
    assert not layer_norm(x.detach(), w.detach(), b.detach(), EPS).requires_grad


def test_errors_say_what_was_expected() -> None:
    x, r, w, b = operands()
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \(70,\) for an input \(3, 13, 70\), got \(69,\)"):
        layer_norm(x, w, b[1:], EPS)
    with pytest.raises(ValueError, match="residual must have the shape and dtype of x"):
        layer_norm(x, w, b, EPS, residual=r[1:])
