"""LoRA on an embedding: gradients, every instruction set, padding and indices out of range."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops import lora_embedding
from fastpeft.ops.backend import OPS
from fastpeft.ops.lora_embedding import embedding_backward_reference, embedding_reference


def operands(
    vocabulary: int = 30, width: int = 40, r: int = 3, dtype: torch.dtype = torch.float32, **like
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = torch.randint(vocabulary, (2, 17), device=like.get("device"))
    w = torch.randn(vocabulary, width, **like).to(dtype)
    A = torch.randn(r, vocabulary, **like).to(dtype).requires_grad_()
    return indices, w, A, torch.randn(width, r, **like).to(dtype).requires_grad_()


def formula(indices: Tensor, w: Tensor, A: Tensor, B: Tensor, c: float, padding: int | None = None) -> Tensor:
    return F.embedding(indices, w, padding) + c * (F.embedding(indices, A.T, padding) @ B.T)


def test_gradients_and_second_derivatives() -> None:
    indices, w, A, B = operands(7, 5, 2, torch.float64)
    call = lambda A, B: lora_embedding(indices, w, A, B, 1.7)  # noqa: E731
    assert torch.autograd.gradcheck(call, (A, B))
    assert torch.autograd.gradgradcheck(call, (A, B), fast_mode=True)


@pytest.mark.parametrize("padding", [None, 0, 5, -1])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_it_is_the_formula(device: torch.device, padding: int | None, index: torch.dtype) -> None:
    """With padding: the row is still used, its column of A gets no gradient, as F.embedding has it."""
    indices, w, A, B = operands(device=device)
    indices = indices.to(index)
    indices[0, :3] = 29 if padding == -1 else padding or 0
    ours, theirs = lora_embedding(indices, w, A, B, 0.7, padding), formula(indices, w, A, B, 0.7, padding)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for o, t in zip(torch.autograd.grad(ours, (A, B), dy), torch.autograd.grad(theirs, (A, B), dy)):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 120),
    vocabulary=st.integers(1, 60),
    width=st.integers(1, 150),
    r=st.integers(1, 40),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float32),
        ]
    ),
)
def test_every_instruction_set_equals_the_reference(
    isa: str, no_worse: Callable[..., None], seed: int, rows: int, vocabulary: int, width: int, r: int, dtypes: tuple
) -> None:
    torch.manual_seed(seed)
    indices, (dtype, adapter) = torch.randint(vocabulary, (rows,)), dtypes
    w, dy = torch.randn(vocabulary, width).to(dtype), torch.randn(rows, width).to(dtype)
    A, B = torch.randn(r, vocabulary).to(adapter), torch.randn(width, r).to(adapter)
    exact, magnitudes = ([t.double() for t in (w, A, B)], [t.double().abs() for t in (w, A, B)])
    no_worse(
        OPS["auto"].lora_embedding(indices, w, A, B, 0.7, -1),
        *(embedding_reference(indices, *o, 0.7, -1) for o in ((w, A, B), exact, magnitudes)),
    )
    for padding in (-1, 0):
        four = zip(
            OPS["auto"].lora_embedding_backward(dy, indices, A, B, 0.7, padding),
            *(
                embedding_backward_reference(d, indices, a, b, 0.7, padding)
                for d, a, b in ((dy, A, B), (dy.double(), *exact[1:]), (dy.double().abs(), *magnitudes[1:]))
            ),
        )
        for results in four:
            no_worse(*results)


@pytest.mark.parametrize("rows", [3, 400])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, rows: int) -> None:
    indices, dy = torch.randint(20, (rows,)), torch.randn(rows, 90)
    A, B = torch.randn(8, 20), torch.randn(90, 8)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            found.append(OPS["auto"].lora_embedding_backward(dy, indices, A, B, 0.7, -1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    indices, w, A, B = operands(device=device)
    call = lambda A, B: lora_embedding(indices, w, A, B, 0.7).sin()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager, graph = (torch.autograd.grad(function(A, B).sum(), (A, B)) for function in (call, compiled))
    torch.testing.assert_close(eager, graph)


def test_what_is_kept_for_the_backward(device: torch.device) -> None:
    indices, w, A, B = operands(device=device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_embedding(indices, w, A, B, 0.7)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (indices, A, B)}


def test_shapes_and_transforms(device: torch.device) -> None:
    indices, w, A, B = operands(device=device)
    for some in (indices[0, 0], indices[:, :0], indices.t()):
        torch.testing.assert_close(lora_embedding(some, w, A, B, 0.7), formula(some, w, A, B, 0.7))
    batched = torch.vmap(lambda row: lora_embedding(row, w, A, B, 0.7))(indices)
    torch.testing.assert_close(batched, formula(indices, w, A, B, 0.7))
    w.requires_grad_()
    ours, theirs = (f(indices, w, A, B, 0.7).sum() for f in (lora_embedding, formula))
    torch.testing.assert_close(torch.autograd.grad(ours, (w, A, B)), torch.autograd.grad(theirs, (w, A, B)))
    lora_embedding(indices, w.detach(), A, B, 0.7).mul_(2.0).sum().backward()  # the output may be changed in place


def test_errors_say_what_was_expected() -> None:
    indices, w, A, B = operands()
    with pytest.raises(ValueError, match=r"lora_A must be \(r, 30\) and lora_B \(40, r\)"):
        lora_embedding(indices, w, A[:, 1:], B, 1.0)
    for bad in (30, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            lora_embedding(torch.tensor([1, bad]), w, A, B, 1.0)
