"""`dora_linear` and its products: formula, gradients, accuracy, and what is kept for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.ops import dora_linear, dora_linear_group, dora_products, philox
from fastpeft.ops.backend import OPS, backend
from fastpeft.ops.weight_norm import direct

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = ("y", "dx", "dbias", "dA", "dB", "dm")


def operands(M, K, N, r, dtypes=(FP32, FP32), bias=True, transposed=False):
    """x, W, bias, A, B, m of a layer whose magnitudes have moved; dtypes: of the base and of the adapter."""
    base, adapter = dtypes
    x = torch.randn(M, K).to(base)
    weight = (torch.randn(N, K) / K**0.5).to(base)
    if transposed:
        weight = weight.t().contiguous().t()
    A, B = (torch.randn(r, K) / K**0.5).to(adapter), (torch.randn(N, r) * 0.4 / r**0.5).to(adapter)
    m = (direct(weight.float(), A.float(), B.float(), 2.0) * torch.empty(N).uniform_(0.7, 1.5)).to(adapter)
    return [x, weight, torch.randn(N).to(base) if bias else None, A, B, m]


def peft_formula(x, weight, bias, A, B, m, c, mask=None):
    """peft/tuners/lora/dora.py, line by line; mask: what dropout multiplies with."""
    result = F.linear(x, weight, bias)
    norm = torch.linalg.norm(weight.to(A.dtype) + c * (B @ A), dim=1).detach()
    scale = (m / norm).view(1, -1)
    if mask is None:
        base = result if bias is None else result - bias
        z = x
    else:
        z = x * mask.to(x.dtype)
        base = F.linear(z, weight)
    return (result + (scale - 1) * base + scale * F.linear(F.linear(z.to(A.dtype), A), B) * c).to(x.dtype)


def run(f, tensors, dtype=None):
    """Output and gradients for fixed random numbers; dtype: convert everything first."""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype, copy=True) for t in tensors]
    for i in (0, 2, 3, 4, 5):
        if leaves[i] is not None:
            leaves[i].requires_grad_()
    torch.manual_seed(1)
    y = f(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=FP64)
    y.backward(dy.to(tensors[0].dtype).to(y.dtype))
    return _named(y, leaves)


def _named(y, leaves):
    found = [y.detach(), *(None if leaves[i] is None else leaves[i].grad for i in (0, 2, 3, 4, 5))]
    return {name: t for name, t in zip(NAMES, found) if t is not None}


def mask_of(p, M, K):
    """The mask that `dora_linear` draws after torch.manual_seed(1)."""
    torch.manual_seed(1)
    seed = philox.draw_seed(torch.device("cpu"))
    return philox.keep_mask(seed, 0, M, K, p) * philox.keep_scale(p)


def compare(tensors, p=0.0):
    """Ours against PEFT's formula, both against float64; four roundings are granted, PyTorch may happen to be exact."""
    mask = mask_of(p, *tensors[0].shape) if p else None
    exact = run(lambda *t: peft_formula(*t, 2.0, mask), tensors, FP64)
    theirs = run(lambda *t: peft_formula(*t, 2.0, mask), tensors)
    ours = run(lambda *t: dora_linear(*t, 2.0, p), tensors)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == truth.shape
        error, allowed = ((t.double() - truth).norm().item() for t in (ours[name], theirs[name]))
        rounding = 2 * torch.finfo(ours[name].dtype).eps * truth.norm().item()
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_pefts_formula(dtypes, p, bias):
    compare(operands(70, 136, 200, 16, dtypes, bias), p)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
def test_each_instruction_set(isa, p):
    for shape in [(130, 72, 65, 16), (1, 3, 5, 1), (50, 200, 129, 9)]:
        compare(operands(*shape), p)
    compare(operands(40, 33, 31, 5, (BF16, FP32)), p)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
def test_reference(p):
    with backend("reference"):
        compare(operands(20, 33, 31, 5), p)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 60),
    K=st.integers(1, 90),
    N=st.integers(1, 90),
    r=st.integers(1, 20),
    p=st.sampled_from([0.0, 0.1, 0.6]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape(M, K, N, r, p, bias, transposed):
    torch.manual_seed(0)
    compare(operands(M, K, N, r, bias=bias, transposed=transposed), p)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(p, bias):
    tensors = [t if t is None else t.double() for t in operands(5, 7, 6, 3, bias=bias)]
    norm = direct(tensors[1], tensors[3], tensors[4], 2.0)  # a constant to the gradient, as it is to a small step

    def f(x, b, A, B, m):
        torch.manual_seed(1)
        return dora_linear(x, tensors[1], b, A, B, m, 2.0, p)

    inputs = [None if t is None else t.requires_grad_() for i, t in enumerate(tensors) if i != 1]
    with pytest.MonkeyPatch.context() as patched:
        import sys

        patched.setattr(sys.modules["fastpeft.ops.dora_projections"], "weight_norm", lambda *_: norm)
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_group_is_its_members(p):
    members = [operands(33, 40, n, r) for n, r in ((24, 4), (16, 8), (9, 4))]
    x, dys = members[0][0], [torch.randn(3, 11, n) for n in (24, 16, 9)]

    def group(*tensors):
        lists = [[m[i] for m in members] for i in range(1, 6)]
        it = iter(tensors[1:])
        for part in (2, 3, 4):
            lists[part] = [next(it) for _ in members]
        torch.manual_seed(1)
        return dora_linear_group(tensors[0], *lists, (2.0, 1.0, 0.5), p)

    leaves = [
        t.detach().clone().requires_grad_() for t in (x.view(3, 11, 40), *(m[i] for i in (3, 4, 5) for m in members))
    ]
    outputs = group(*leaves)
    found = torch.autograd.grad(outputs, leaves, dys)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    torch.manual_seed(1)
    seed = philox.draw_seed(x.device) if p else None
    total = 0
    for g, (m, c, dy) in enumerate(zip(members, (2.0, 1.0, 0.5), dys)):
        mask = (philox.keep_mask(seed, g, 33, 40, p) * philox.keep_scale(p)).view(3, 11, 40) if p else None
        y = peft_formula(exact[0], m[1].double(), m[2].double(), *(exact[1 + 3 * i + g] for i in range(3)), c, mask)
        torch.testing.assert_close(outputs[g].double(), y, rtol=1e-5, atol=1e-5)
        total = total + (y * dy.double()).sum()
    for got, want in zip(found, torch.autograd.grad(total, exact)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    # an output that is not used has no part in anything
    y = group(*leaves)[1]
    assert all(t is None for t in torch.autograd.grad(y, leaves, dys[1], allow_unused=True)[1:8:3])


def kept_bytes(f, *own):
    """Bytes kept for the backward, storages once, without the tensors named."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        y = f()
    ours = {t.untyped_storage().data_ptr() for t in own if t is not None}
    return y, sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in ours)


def test_keeps_nothing_large_but_input_and_output():
    tensors = operands(64, 48, 80, 4)
    leaves = [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    y, kept = kept_bytes(lambda: dora_linear(*leaves, 2.0), *leaves)
    assert kept == 4 * (64 * 80 + 64 * 4 + 2 * 80)  # the output, S, and two vectors
    frozen = [t.detach() for t in tensors[1:]]
    _, kept = kept_bytes(lambda: dora_linear(leaves[0], *frozen, 2.0), *leaves)
    assert kept == 4 * 2 * 80
    tensors[5].requires_grad_(False)
    _, kept = kept_bytes(lambda: dora_linear(*leaves, 2.0), *leaves)
    assert kept == 4 * (64 * 4 + 2 * 80)
    del y


def test_output_may_be_changed_in_place():
    """Models clamp queries; the gradient of m must not be made of what was written there."""
    tensors = operands(20, 12, 16, 4)
    exact = run(lambda *t: peft_formula(*t, 2.0).clamp(-0.5, 0.5), tensors, FP64)
    ours = run(lambda *t: dora_linear(*t, 2.0).clamp_(-0.5, 0.5), tensors)
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name].double(), truth, rtol=1e-4, atol=1e-5)


def test_inputs_and_gradients_are_not_written_to():
    for p in (0.0, 0.1, 0.5):
        tensors = operands(20, 12, 16, 4)
        leaves = [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
        before = [t.detach().clone() for t in leaves]
        y = dora_linear(*leaves, 2.0, p)
        dy = torch.randn(y.shape)
        copy = dy.clone()
        first = torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4, 5)], dy, retain_graph=True)
        again = torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4, 5)], dy)
        assert torch.equal(dy, copy) and all(torch.equal(a, b) for a, b in zip(leaves, before))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_magnitude_of_zero():
    tensors = operands(20, 12, 16, 4)
    tensors[5][3] = 0
    compare(tensors)
    compare(tensors, 0.1)


def test_starts_as_the_base_layer_to_the_bit():
    for dtype in (FP32, BF16):
        x, weight, bias, A, B, _ = operands(20, 48, 32, 4, (dtype, dtype))
        B = torch.zeros_like(B)
        m = direct(weight.float(), A.float(), B.float(), 2.0).to(dtype)
        with backend("reference"):
            norm = OPS["reference"].weight_norm(weight, A, B, 2.0).to(dtype)
        assert torch.equal(dora_linear(x, weight, bias, A, B, norm, 2.0), F.linear(x, weight, bias)) or not torch.equal(
            m, norm
        )


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast(p):
    tensors = operands(40, 24, 32, 4)
    leaves = [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        y = dora_linear(*leaves, 2.0, p)
    assert y.dtype is BF16
    y.float().sum().backward()
    mask = mask_of(p, 40, 24) if p else None
    want = peft_formula(*(t.detach() for t in tensors), 2.0, mask)
    assert ((y - want).norm() / want.norm()).item() < 1e-2
    assert all(leaves[i].grad.dtype is FP32 for i in (0, 3, 4, 5))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiles_into_one_graph(p):
    tensors = operands(40, 24, 32, 4)
    leaves = [t.requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    compiled = torch.compile(lambda *t: dora_linear(*t, 2.0, p), fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, lambda *t: dora_linear(*t, 2.0, p)):
        torch.manual_seed(1)
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), [leaves[i] for i in (0, 3, 4, 5)])])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_batched_by_functorch():
    tensors = operands(6, 12, 16, 4)
    many = torch.stack([tensors[3], 2 * tensors[3]])
    got = torch.func.vmap(lambda A: dora_linear(*tensors[:3], A, *tensors[4:], 2.0))(many)
    want = torch.stack([dora_linear(*tensors[:3], A, *tensors[4:], 2.0) for A in many])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 8, 0)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_empty(shape, p):
    M, K, N = shape
    run(lambda *t: dora_linear(*t, 2.0, p), operands(M, K, N, 2))


def test_arguments_that_do_not_fit():
    x, weight, bias, A, B, m = operands(4, 6, 8, 2)
    with pytest.raises(ValueError, match="magnitude must have 8 elements"):
        dora_linear(x, weight, bias, A, B, m[:3], 1.0)
    with pytest.raises(ValueError, match="lora_A must be"):
        dora_linear(x, weight, bias, A[:, :3], B, m, 1.0)
    with pytest.raises(ValueError, match="one entry a projection"):
        dora_linear_group(x, [weight], [bias], [A], [B], [], [1.0])


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_gathered_product_is_the_second_product(isa, p):
    x, weight, bias, A, B, _ = operands(600, 70, 130, 5)  # more rows than one piece
    gain, seed = torch.randn(130), torch.tensor([5])
    s = x @ A.T
    ours, theirs = x @ weight.T, (x @ weight.T).double()
    t = OPS["auto"].dora_drop_(ours, x, weight, s, B, gain, bias, p, seed, 3)
    want = dora_products.drop_reference(
        theirs, x.double(), weight.double(), s.double(), B.double(), gain.double(), bias.double(), p, seed, 3
    )
    torch.testing.assert_close(t.double(), want, rtol=1e-5, atol=2e-5 / (1 - p))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-5 / (1 - p))
    dx, dy = torch.randn(600, 70), torch.randn(600, 130)
    exact = dx.double()
    OPS["auto"].dora_drop_backward_(dx, dy, weight, gain, p, seed, 3)
    dora_products.drop_backward_reference(exact, dy.double(), weight.double(), gain.double(), p, seed, 3)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-5, atol=1e-4)


def test_gathered_products_have_the_same_bits_on_any_number_of_threads():
    """Of more panels of outputs than parts they are added up in; masks too are listed by several threads."""
    x, weight, bias, A, B, _ = operands(520, 150, 1300, 5)
    gain, seed, s, dy, dx = torch.randn(1300), torch.tensor([5]), x @ A.T, torch.randn(520, 1300), torch.randn(520, 150)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, d = torch.ones(520, 1300), dx.clone()
            t = OPS["auto"].dora_drop_(y, x, weight, s, B, gain, bias, 0.05, seed, 3)
            OPS["auto"].dora_drop_backward_(d, dy, weight, gain, 0.05, seed, 3)
            results.append((y, t, d))
    finally:
        torch.set_num_threads(before)
    exact = dx.double()
    dora_products.drop_backward_reference(exact, dy.double(), weight.double(), gain.double(), 0.05, seed, 3)
    torch.testing.assert_close(results[0][2].double(), exact, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
