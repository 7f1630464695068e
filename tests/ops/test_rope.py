"""Rotary position embeddings: every form and layout against eager code, gradients, and what PyTorch does around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops import rope
from fastpeft.ops.backend import OPS, available_backends, backend

BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]
FORMS = pytest.mark.parametrize(("interleaved", "pairs"), [(False, False), (True, False), (False, True), (True, True)])


def eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, pairs: bool) -> Tensor:
    """As Transformers' models write it."""
    if pairs:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    n = cos.shape[-1]
    turn, rest = x[..., :n], x[..., n:]
    if interleaved:
        half = torch.stack((-turn[..., 1::2], turn[..., ::2]), dim=-1).flatten(-2)
    else:
        half = torch.cat((-turn[..., n // 2 :], turn[..., : n // 2]), dim=-1)
    return torch.cat([(turn * cos) + (half * sin), rest], dim=-1)


@dataclass
class Case:
    """Operands and the two gradients of the results. layout: of q and k in memory."""

    batch: int = 2
    tokens: int = 7
    heads: tuple[int, int] = (3, 1)
    width: int = 16
    columns: int = 16
    interleaved: bool = False
    pairs: bool = False
    dtype: torch.dtype = torch.float32
    table: torch.dtype | None = None
    layout: str = "transposed"
    shared: bool = True  # one table for all sequences
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        self.q, self.k, self.dq, self.dk = (self._heads(h) for h in (*self.heads, *self.heads))
        rows = 1 if self.shared else self.batch
        n = self.columns // 2 if self.pairs else self.columns
        # Unrelated numbers: a table need not be one of a rotation, nor have equal halves.
        self.cos, self.sin = (
            torch.randn(rows, self.tokens, n, device=self.device).to(self.table or self.dtype) for _ in range(2)
        )

    def _heads(self, h: int) -> Tensor:
        b, t, d = self.batch, self.tokens, self.width
        new = lambda *shape: torch.randn(*shape, device=self.device).to(self.dtype)  # noqa: E731
        return {
            "dense": lambda: new(b, h, t, d),
            "transposed": lambda: new(b, t, h * d).view(b, t, h, d).transpose(1, 2),
            "block": lambda: new(b, t, h * d + 24)[..., 8 : h * d + 8].view(b, t, h, d).transpose(1, 2),
            "columns": lambda: new(b, h, d, t).transpose(2, 3),
        }[self.layout]()

    def form(self) -> tuple[bool, bool]:
        return self.interleaved, self.pairs

    def run(self, function: Callable[..., tuple[Tensor, Tensor]], cast: torch.dtype | None = None) -> list[Tensor]:
        """Results and gradients."""
        q, k, cos, sin, dq, dk = (t.to(cast or t.dtype) for t in (self.q, self.k, self.cos, self.sin, self.dq, self.dk))
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = function(q, k, cos, sin, *self.form())
        return [*(t.detach() for t in out), *torch.autograd.grad(out, (q, k), (dq, dk))]


def eager_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *form: bool) -> tuple[Tensor, Tensor]:
    return tuple(eager(x, cos, sin, *form).to(q.dtype) for x in (q, k))


def check(case: Case, no_worse: Callable[..., None]) -> None:
    for ours, theirs, exact in zip(case.run(rope), case.run(eager_both), case.run(eager_both, torch.float64)):
        no_worse(ours, theirs, exact)


@FORMS
def test_gradients_and_second_derivatives(interleaved: bool, pairs: bool) -> None:
    case = Case(1, 3, (2, 1), 6, 4, interleaved, pairs, torch.float64)
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    call = lambda q, k: rope(q, k, case.cos, case.sin, interleaved, pairs)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k))
    assert torch.autograd.gradgradcheck(call, (q, k))


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["dense", "transposed", "block", "columns"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_form_dtype_and_layout(
    no_worse: Callable[..., None],
    device: torch.device,
    name: str,
    layout: str,
    dtype: torch.dtype,
    interleaved: bool,
    pairs: bool,
) -> None:
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's kernels")
    with backend(name):
        case = Case(interleaved=interleaved, pairs=pairs, dtype=dtype, layout=layout, columns=12, device=device)
        check(case, no_worse)
        q, k = rope(case.q, case.k, case.cos, case.sin, interleaved, pairs)
        assert q.stride() == torch.empty_like(case.q).stride() and k.stride() == torch.empty_like(case.k).stride()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 20),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pair_count=st.integers(1, 40),
    rest=st.integers(0, 40),
    interleaved=st.booleans(),
    pairs=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    wide_table=st.booleans(),
    shared=st.booleans(),
    layout=st.sampled_from(("dense", "transposed", "block")),
)
def test_any_shape(
    isa, no_worse, batch, tokens, heads, pair_count, rest, interleaved, pairs, dtype, wide_table, shared, layout
):
    table = torch.float32 if wide_table else dtype
    columns = 2 * pair_count
    case = Case(batch, tokens, heads, columns + rest, columns, interleaved, pairs, dtype, table, layout, shared)
    check(case, no_worse)


def test_queries_alone_keys_alone(device: torch.device) -> None:
    case = Case(device=device)
    q, nothing = rope(case.q.requires_grad_(), None, case.cos, case.sin)
    assert nothing is None
    both = rope(case.q, case.k.requires_grad_(), case.cos, case.sin)
    assert torch.equal(q, both[0])
    (dq,) = torch.autograd.grad(q, case.q, case.dq)
    (dk,) = torch.autograd.grad(both[1], case.k, case.dk, retain_graph=True)  # only k's result is used
    for one, other in zip((dq, dk), torch.autograd.grad(both, (case.q, case.k), (case.dq, case.dk))):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(rope(case.q, None, case.cos, case.sin)[0], q)


def test_only_the_tables_are_kept_and_nothing_is_written_to(device: torch.device) -> None:
    case, kept = Case(device=device), []
    operands = [case.q, case.k, case.cos, case.sin]
    before = [t.clone() for t in operands]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = rope(case.q.requires_grad_(), case.k.requires_grad_(), case.cos, case.sin)
    torch.autograd.backward(out, (case.dq, case.dk))
    assert {t.data_ptr() for t in kept} == {case.cos.data_ptr(), case.sin.data_ptr()}
    assert all(torch.equal(t, b) for t, b in zip(operands, before))
    assert not {t.data_ptr() for t in out} & {case.q.data_ptr(), case.k.data_ptr()}


def test_tables_that_are_trained_get_gradients() -> None:
    case = Case()
    case.cos.requires_grad_()
    ours = torch.autograd.grad(rope(case.q, case.k, case.cos, case.sin)[0].sum(), case.cos)
    theirs = torch.autograd.grad(eager(case.q, case.cos, case.sin, False, False).sum(), case.cos)
    torch.testing.assert_close(ours, theirs)


@FORMS
@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_whole(name: str, interleaved: bool, pairs: bool) -> None:
    case = Case(interleaved=interleaved, pairs=pairs)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    with backend(name):
        for ours, theirs in zip(case.run(compiled), case.run(eager_both)):
            torch.testing.assert_close(ours, theirs)


def test_functional_transforms() -> None:
    case = Case()
    batched = torch.vmap(lambda q, k: rope(q, k, case.cos, case.sin))
    q, k = batched(torch.stack([case.q] * 2), torch.stack([case.k] * 2))
    expected = eager_both(case.q, case.k, case.cos, case.sin, False, False)
    torch.testing.assert_close(q[1], expected[0])
    torch.testing.assert_close(k[1], expected[1])


def test_misuse_is_named() -> None:
    case = Case()
    for error, message, call in (
        (ValueError, "must be \\(B, H, T, D\\)", (case.q[0], None, case.cos, case.sin)),
        (ValueError, "all but the number of heads", (case.q, case.k[:, :, 1:], case.cos, case.sin)),
        (TypeError, "one dtype", (case.q, case.k.bfloat16(), case.cos, case.sin)),
        (ValueError, "cos and sin must be \\(1 or 2, 7, R\\)", (case.q, case.k, case.cos[:, 1:], case.sin[:, 1:])),
        (ValueError, "even number from 2 to 16", (case.q, case.k, case.cos, case.sin, False, True)),
    ):
        with pytest.raises(error, match=message):
            rope(*call)


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schema_and_fake_are_true(namespace: str) -> None:
    case = Case(layout="block")
    for k in (case.k, None):
        operator = getattr(torch.ops, namespace).rope.default
        arguments = (case.q, k, case.cos, case.sin, False, False, True)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    case, threads, results = Case(3, 200, (5, 2), 64, 64), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(OPS["auto"].rope(case.q, case.k, case.cos, case.sin, False, False, False))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
