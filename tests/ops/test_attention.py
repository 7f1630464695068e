"""Attention for training: results and gradients against float64, and when PyTorch's own runs instead."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from called import Called
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import no_worse
from torch.autograd import gradcheck, gradgradcheck

from fastpeft.ops import attention, decisions
from fastpeft.ops.attention import _Attention, backward_reference, formula, ours, reference
from fastpeft.ops.backend import OPS, backend, cpu_extension

pytestmark = pytest.mark.usefixtures("one_thread")
needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
LAYOUTS = ("by tokens", "dense", "slice", "columns", "expanded")


@pytest.fixture
def from_16_tokens(monkeypatch):
    """As on a processor on which ours was measured to be faster."""
    monkeypatch.setattr(decisions, "attention_tokens", lambda: 16)


@dataclass
class Case:
    """Operands and a gradient of the result. heads: of q, and of k and v. layout: of each in memory."""

    tokens: int = 20
    keys: int = 20
    heads: tuple[int, int] = (3, 1)
    width: int = 32
    causal: bool = True
    batch: int = 2
    scale: float = 0.0  # 0: one over the root of the width
    layout: str = "by tokens"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        self.scale = self.scale or self.width**-0.5
        (h, g), t, s = self.heads, self.tokens, self.keys
        self.q, self.k, self.v, self.dout = (self._heads(*size) for size in ((h, t), (g, s), (g, s), (h, t)))

    def _heads(self, h, n):
        b, d = self.batch, self.width
        new = lambda *shape: torch.randn(*shape).to(self.dtype)  # noqa: E731
        return {
            "by tokens": lambda: new(b, n, h, d).transpose(1, 2),
            "dense": lambda: new(b, h, n, d),
            "slice": lambda: new(b, n, h * d + 24)[..., 7 : h * d + 7].view(b, n, h, d).transpose(1, 2),
            "columns": lambda: new(b, h, d, n).transpose(2, 3),
            "expanded": lambda: new(1, 1, n, d).expand(b, h, n, d),
        }[self.layout]()

    def ours(self):
        """o, the logarithms, dq, dk, dv."""
        q, k, v, causal, scale = self.q, self.k, self.v, self.causal, self.scale
        out, log_sum = OPS["auto"].attention(q, k, v, causal, scale)
        return out, log_sum, *OPS["auto"].attention_backward(self.dout, q, k, v, out, log_sum, causal, scale)

    def exact(self):
        leaves = [t.detach().double().requires_grad_() for t in (self.q, self.k, self.v)]
        out, log_sum = formula(*leaves, self.causal, self.scale)
        return out.detach(), log_sum.detach(), *torch.autograd.grad(out, leaves, self.dout.double())

    def torchs(self):
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        out = pytorchs(*leaves, self.causal, self.scale)
        with torch.no_grad():
            log_sum = formula(self.q, self.k, self.v, self.causal, self.scale)[1]
        return out.detach(), log_sum, *torch.autograd.grad(out, leaves, self.dout)

    def magnitudes(self, of_logits=False):
        """The sums of each result's magnitudes, in the order of ours().

        of_logits: a rounding of the logits, carried through the exponential, counts too.
        """
        q, k, v, dout = (t.double() for t in (self.q, self.k, self.v, self.dout))
        group = self.heads[0] // self.heads[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        logits = self.scale * q @ k.transpose(2, 3)
        sizes = self.scale * q.abs() @ k.abs().transpose(2, 3)
        if self.causal:
            unseen = ~torch.ones(logits.shape[2:], dtype=torch.bool).tril()
            logits, sizes = logits.masked_fill(unseen, -math.inf), sizes.masked_fill(unseen, 0.0)
        p = logits.softmax(-1)
        wide = p * (1 + sizes + (p * sizes).sum(-1, keepdim=True)) if of_logits else p
        dp, dot = dout @ v.transpose(2, 3), (dout * (p @ v)).sum(-1, keepdim=True)
        dp_sizes, dot_sizes = dout.abs() @ v.abs().transpose(2, 3), (dout * (p @ v)).abs().sum(-1, keepdim=True)
        ds = p * (dp_sizes + dot_sizes) + (wide - p) * (dp - dot).abs()
        dk, dv = self.scale * ds.transpose(2, 3) @ q.abs(), wide.transpose(2, 3) @ dout.abs()
        return wide @ v.abs(), sizes, self.scale * ds @ k.abs(), *(t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))

    def check(self, of_logits=False):
        for found in zip(self.ours(), self.torchs(), self.exact(), self.magnitudes(of_logits)):
            no_worse(*found)


def pytorchs(q, k, v, causal, scale=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def same_bits_on_any_number_of_threads(case):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(case.ours())
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
def test_gradients_and_second_derivatives(heads, causal):
    case = Case(3, 4, heads, 2, causal, dtype=torch.float64, batch=1)
    operands = [t.requires_grad_() for t in (case.q, case.k, case.v)]

    def call(q, k, v):
        return _Attention.apply(q, k, v, causal, 0.7)

    assert gradcheck(call, operands)
    assert gradgradcheck(call, operands)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (7, 7)])
def test_the_reference_is_the_formula(shape, causal):
    case = Case(*shape, (6, 2), 5, causal, dtype=torch.float64)
    for found, exact in zip(case.ours(), case.exact()):  # float64 falls back to the reference
        torch.testing.assert_close(found, exact)
    out, log_sum = reference(case.q, case.k, case.v, causal, case.scale)
    grads = backward_reference(case.dout, case.q, case.k, case.v, out, log_sum, causal, case.scale)
    assert all(torch.equal(a, b) for a, b in zip(case.ours(), (out, log_sum, *grads)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (9, 1), (6, 2)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (49, 49), (97, 61), (61, 97)])
def test_each_instruction_set(isa, shape, heads, causal):
    Case(*shape, heads, 48, causal).check()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(131, 257), (257, 131), (300, 300), (250, 300), (33, 700), (523, 523)])
def test_several_blocks_of_keys(isa, shape, causal):
    Case(*shape, (2, 1), 32, causal, batch=1).check()


@pytest.mark.parametrize("causal", [False, True])
def test_every_width(isa, causal):
    for width in range(16, 129, 16):
        Case(50, 70, (3, 1), width, causal, batch=1).check()


@pytest.mark.parametrize("causal", [False, True])
def test_norm_of_the_error_of_wide_heads(isa, causal):
    for width in (144, 192, 240, 256):
        case = Case(50, 70, (3, 1), width, causal, batch=1)
        for found, torchs, exact in zip(case.ours(), case.torchs(), case.exact()):
            assert (found.double() - exact).norm() <= 2 * (torchs.double() - exact).norm()


@pytest.mark.parametrize("causal", [False, True])
def test_largest_error_of_wide_heads(isa, causal):
    for width in (144, 192, 240, 256):
        for seed in range(5):
            torch.manual_seed(seed)
            Case(50, 70, (3, 1), width, causal, batch=1).check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(isa, layout):
    case = Case(70, 70, (4, 2), 32, layout=layout)
    before = [t.clone() for t in (case.q, case.k, case.v, case.dout)]
    case.check()
    assert all(torch.equal(t, b) for t, b in zip((case.q, case.k, case.v, case.dout), before))


@needs_extension
@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(16, 120), keys=st.integers(16, 560), group=st.integers(1, 5), kv_heads=st.integers(1, 3),
    width=st.sampled_from((16, 32, 64, 80, 128)), causal=st.booleans(), batch=st.integers(1, 2),
    scale=st.sampled_from((0.0, 0.01, 0.5)), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(tokens, keys, group, kv_heads, width, causal, batch, scale, layout, seed):
    torch.manual_seed(seed)
    Case(tokens, keys, (group * kv_heads, kv_heads), width, causal, batch, scale, layout).check()


@needs_extension
@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(1, 20), keys=st.integers(1, 20), group=st.integers(1, 5), kv_heads=st.integers(1, 3),
    width=st.sampled_from((16, 48, 64, 128)), causal=st.booleans(), scale=st.sampled_from((0.0, 0.5, 3.0)),
    layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99),
)  # fmt: skip
def test_few_queries_or_keys(tokens, keys, group, kv_heads, width, causal, scale, layout, seed):
    """PyTorch is exact where a query sees one key. Ours has the rounding of that key's logit."""
    torch.manual_seed(seed)
    case = Case(tokens, keys, (group * kv_heads, kv_heads), width, causal, 1, scale, layout)
    case.check(of_logits=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [60, 600])
def test_logits_far_beyond_what_exp_can_take(isa, tokens, causal):
    case = Case(tokens, tokens, (2, 1), 64, causal, batch=1, scale=50.0)
    case.check()
    assert all(t.isfinite().all() for t in case.ours())


@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_logit_is_in_a_later_block(isa, causal):
    """What earlier blocks of keys gave is scaled down by the difference: by little, and to nothing."""
    for factor in (2.0, 40.0):
        case = Case(560, 560, (2, 1), 32, causal, batch=1)
        case.k = torch.cat([case.k[:, :, :256], case.k[:, :, 256:512] * factor, case.k[:, :, 512:] * factor**2], dim=2)
        case.check()
        logits = case.scale * case.q @ case.k.transpose(2, 3)
        assert (logits[:, :, -1].argmax(-1) >= 256).all()


@pytest.mark.parametrize("causal", [False, True])
def test_equal_logits_are_a_mean(isa, causal):
    case = Case(300, 300, (2, 1), 32, causal, batch=1)
    case.q = torch.zeros_like(case.q)
    case.check()
    seen = torch.arange(1, 301) if causal else torch.full((300,), 300)
    torch.testing.assert_close(case.ours()[1], seen.float().log().expand(1, 2, 300))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", [1, 17, 299])
def test_a_query_that_is_not_finite_spoils_its_own_row(isa, row, causal, bad):
    case = Case(300, 300, (2, 1), 32, causal, batch=1)
    case.k[..., 0].abs_()  # the infinite logits are all +inf
    clean = case.ours()
    case.q = case.q.clone()
    case.q[0, 1, row, 0] = bad
    found = case.ours()
    others = torch.arange(300) != row
    for got, was in zip((found[0], found[1], found[2]), (clean[0], clean[1], clean[2])):
        assert torch.equal(got[0, 0], was[0, 0]) and torch.equal(got[0, 1, others], was[0, 1, others])
    assert torch.equal(found[0].isnan(), case.torchs()[0].isnan())
    assert found[0][0, 1, row].isnan().all() and found[2][0, 1, row].isnan().all()
    seen = row + 1 if causal else 300
    for gradient in (found[3], found[4]):
        assert gradient[0, 0, :seen].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_or_value_that_is_not_finite_spoils_the_rows_that_see_it(isa, bad, causal):
    for key, name in itertools.product((0, 20, 270), "kv"):
        case = Case(300, 300, (2, 1), 32, causal, batch=1)
        case.q[..., 0].abs_()
        clean = case.ours()[0]
        getattr(case, name)[0, 0, key, 0] = bad
        out = case.ours()[0]
        first = key if causal else 0
        spoilt = out if name == "k" else out[..., 0]  # a value is in its own column only
        assert not spoilt[:, :, first:].isfinite().any()
        if name == "k":
            assert torch.equal(out[:, :, :first], clean[:, :, :first])
        else:
            assert torch.equal(out[..., 1:], clean[..., 1:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(1, 9, 3), (2, 4, 2), (1, 15, 5), (4, 18, 6), (1, 7, 1)])
def test_the_bits_do_not_depend_on_the_number_of_threads(isa, size, causal):
    """Cut by heads of k and v or, where those do not go round, by heads of q."""
    batch, *heads = size
    assert same_bits_on_any_number_of_threads(Case(70, 300, tuple(heads), 16, causal, batch))


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
@pytest.mark.parametrize("layout", ["by tokens", "columns"])
def test_schema_and_fake_are_true(namespace, layout):
    case, operators = Case(5, 7, (4, 2), 16, layout=layout), getattr(torch.ops, namespace)
    arguments = (case.q, case.k, case.v)
    torch.library.opcheck(operators.attention.default, (*arguments, True, 0.3))
    out, log_sum = operators.attention(*arguments, True, 0.3)
    torch.library.opcheck(operators.attention_backward.default, (case.dout, *arguments, out, log_sum, True, 0.3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_results_lie_by_tokens(name, layout):
    case = Case(5, 7, (4, 2), 16, layout=layout)
    out, log_sum = OPS[name].attention(case.q, case.k, case.v, True, 0.3)
    grads = OPS[name].attention_backward(case.dout, case.q, case.k, case.v, out, log_sum, True, 0.3)
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads)) and log_sum.is_contiguous()


@needs_extension
def test_shapes_that_the_kernel_refuses():
    q, k = torch.randn(1, 3, 5, 32), torch.randn(1, 1, 5, 32)
    for operands in (
        (q, k, k[:, :, 1:]),
        (q, k[..., 16:], k[..., 16:]),
        (q[:, :2], q, q),
        (q[..., :20], k[..., :20], k[..., :20]),
        (q, k[:, :, :0], k[:, :, :0]),
        (q[:, :0], k, k),
        (q[0], k, k),
    ):
        with pytest.raises(RuntimeError):
            OPS["auto"].attention(*operands, True, 0.3)
    with pytest.raises(RuntimeError, match="scale positive"):
        OPS["auto"].attention(q, k, k, True, -1.0)
    out, log_sum = OPS["auto"].attention(q, k, k, True, 0.3)
    for dout, logs in ((out[:, :, 1:], log_sum), (out, log_sum[:, :, 1:])):
        with pytest.raises(RuntimeError):
            OPS["auto"].attention_backward(dout, q, k, k, out, logs, True, 0.3)


@needs_extension
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_training_step(from_16_tokens, causal, scale):
    case = Case(33, 40, (6, 2), 32, causal, scale=scale or 0.0)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    with Called() as called:
        out = attention(*leaves, causal, scale)
        grads = torch.autograd.grad(out, leaves, case.dout)
    assert [n for n in called.names if n.startswith("fastpeft::")] == [
        "fastpeft::attention",
        "fastpeft::attention_backward",
    ]
    for got, same in zip((out, *grads), (case.ours()[0], *case.ours()[2:])):
        assert torch.equal(got, same)
    summed = torch.autograd.grad(attention(*leaves, causal, scale).sum(), leaves)  # a gradient whose strides are 0
    case.dout = torch.ones_like(case.dout)
    assert all(torch.equal(a, b) for a, b in zip(summed, case.ours()[2:]))


@needs_extension
def test_what_is_kept_for_the_backward(from_16_tokens):
    case, kept = Case(33, 40), []
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attention(*leaves, True)
    *operands, log_sum = kept
    assert {t.data_ptr() for t in operands} == {t.data_ptr() for t in (*leaves, out)} and len(operands) == 4
    assert log_sum.shape == (2, 3, 33) and log_sum.dtype is torch.float32


@needs_extension
def test_some_of_the_operands_are_trained(from_16_tokens):
    case = Case(33, 40)
    whole = case.ours()[2:]
    for trained in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(yes) for t, yes in zip((case.q, case.k, case.v), trained)]
        out = attention(*leaves, True)
        assert out.requires_grad == any(trained)
        needed = [(t, g) for t, g in zip(leaves, whole) if t.requires_grad]
        if not needed:
            continue
        for create_graph in (False, True):
            found = torch.autograd.grad(
                out, [t for t, _ in needed], case.dout, retain_graph=True, create_graph=create_graph
            )
            for got, (_, wanted) in zip(found, needed):
                torch.testing.assert_close(got, wanted)


@needs_extension
def test_second_derivatives_of_the_public_function(from_16_tokens):
    case = Case(33, 40, (4, 2), 32)

    def second(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
        first = torch.autograd.grad(function(*leaves), leaves, case.dout.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    plain = lambda q, k, v: formula(q, k, v, True, case.scale)[0]  # noqa: E731
    found = second(lambda q, k, v: attention(q, k, v, True), torch.float32)
    for got, theirs, exact in zip(found, second(plain, torch.float32), second(plain, torch.float64)):
        no_worse(got, theirs, exact)


@needs_extension
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_nothing_is_recorded(from_16_tokens, mode):
    case = Case(33, 40)
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    with mode(), Called() as called:
        out = attention(*leaves, True)
    assert called.names[0] == "fastpeft::attention" and not out.requires_grad
    assert torch.equal(out, case.ours()[0])


def is_pytorchs(q, k, v, causal=True, scale=None):
    """Whether the call is PyTorch's, and that it has PyTorch's result."""
    with Called() as called:
        out = attention(q, k, v, causal, scale)
    torch.testing.assert_close(out, pytorchs(q, k, v, causal, scale), equal_nan=True)
    return not any(name.startswith("fastpeft") for name in called.names)


@needs_extension
def test_calls_that_are_pytorchs(from_16_tokens, monkeypatch):
    case = Case(16, 20)
    q, k, v = case.q, case.k, case.v
    assert not is_pytorchs(q, k, v)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert is_pytorchs(*(t.to(dtype) for t in (q, k, v)))
    assert is_pytorchs(q[:, :, :15], k, v)
    assert is_pytorchs(q[..., :20], k[..., :20], v[..., :20])
    assert is_pytorchs(*(torch.randn(1, 2, 16, 272) for _ in range(3)))
    assert is_pytorchs(q, k, v, scale=-0.5)
    assert is_pytorchs(q, k, v, scale=0.0)
    assert is_pytorchs(q[:0], k[:0], v[:0])
    assert is_pytorchs(q, k[:, :, :0], v[:, :, :0], causal=False)
    for one in range(3):
        assert not ours(*(t.double() if i == one else t for i, t in enumerate((q, k, v))), case.scale)
    assert not ours(q[:, :0], k, v, case.scale)
    assert not ours(*(t.to("meta") for t in (q, k, v)), case.scale)
    with backend("reference"):
        assert is_pytorchs(q, k, v)
    with backend("cpu"):
        assert not is_pytorchs(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_pytorchs(q, k, v)
    torch.set_float32_matmul_precision("high")
    try:
        assert is_pytorchs(q, k, v)
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(decisions, "attention_tokens", lambda: math.inf)
    assert is_pytorchs(q, k, v)


@needs_extension
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms(from_16_tokens):
    case = Case(17, 20)
    q, k, v = case.q, case.k, case.v
    with Called() as called:
        mapped = torch.vmap(lambda q: attention(q, k, v, True))(torch.stack([q, 2 * q]))
        gradient = torch.func.grad(lambda q: attention(q, k, v, True).square().sum())(q)
    assert not any(name.startswith("fastpeft") for name in called.names)
    torch.testing.assert_close(mapped[1], pytorchs(2 * q, k, v, True))
    leaf = q.detach().requires_grad_()
    torch.testing.assert_close(gradient, *torch.autograd.grad(pytorchs(leaf, k, v, True).square().sum(), leaf))


@needs_extension
def test_under_torch_compile_it_is_pytorchs():
    """With the table as it is, which must not be read while a graph is traced."""
    decisions.forget()
    case = Case(40, 40)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, True), fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    results = []
    for function in (compiled, lambda q, k, v: pytorchs(q, k, v, True)):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, case.dout)))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted)


def test_shapes_that_do_not_fit_are_named():
    q, k = torch.randn(2, 6, 20, 32), torch.randn(2, 2, 20, 32)
    for message, operands in (
        (r"q must be \(B, H, T, D\), .* got \(6, 20, 32\), \(2, 2, 20, 32\)", (q[0], k, k)),
        (r"k and v alike \(B, G, S, D\)", (q, k, k[:, :, 1:])),
        (r"k and v alike", (q, k[0], k[0])),
        ("the same B and D", (q, k[:1], k[:1])),
        ("the same B and D", (q, k[..., :16], k[..., :16])),
        ("a multiple of k's heads", (q[:, :5], k, k)),
        ("a multiple of k's heads", (q, k[:, :0], k[:, :0])),
    ):
        with pytest.raises(ValueError, match="attention: .*" + message):
            attention(*operands, True)


@pytest.fixture
def tokens_by_table(monkeypatch):
    """What the table of decisions says where `attention.cpu.float32` is the entry given."""
    table = decisions.load()[0]

    def ask(tokens, processors):
        changed = {**table, "attention": {"cpu": {"float32": {"tokens": tokens, "processors": processors}}}}
        monkeypatch.setattr(decisions, "load", lambda: (changed, "a test"))
        decisions.attention_tokens.cache_clear()
        return decisions.attention_tokens()

    yield ask
    decisions.attention_tokens.cache_clear()


@needs_extension
def test_by_the_table_of_decisions(tokens_by_table):
    case, maker = Case(20, 20), cpu_extension().maker()
    assert tokens_by_table(None, None) == math.inf
    assert tokens_by_table(5, ["none of them"]) == math.inf and is_pytorchs(case.q, case.k, case.v)
    if cpu_extension().isa() != "scalar":
        assert tokens_by_table(21, None) == 21 and is_pytorchs(case.q, case.k, case.v)
        assert tokens_by_table(20, [maker]) == 20 and not is_pytorchs(case.q, case.k, case.v)


@needs_extension
def test_without_vector_kernels_it_is_pytorchs(tokens_by_table):
    extension = cpu_extension()
    before = extension.isa()
    extension.select_isa("scalar")
    try:
        assert tokens_by_table(5, None) == math.inf
    finally:
        extension.select_isa(before)


@pytest.mark.parametrize(
    "entry", [None, {"tokens": 16}, {"tokens": "many", "processors": None}, {"tokens": 16, "processors": "amd"}]
)
def test_a_table_whose_entry_cannot_be_used_is_named(entry, assert_named_unusable):
    assert_named_unusable({**decisions.load()[0], "attention": {"cpu": {"float32": entry}}})
