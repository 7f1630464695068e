"""LoRA on a linear layer: gradients, dtypes, shapes, and everything PyTorch does around a layer."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft.ops import lora_linear, philox
from fastpeft.ops.backend import available_backends, backend

BACKENDS = [name for name in ("reference", "cpu") if name in available_backends()]


def operands(
    rows: tuple[int, ...] = (40,), k: int = 130, n: int = 70, r: int = 6, dtype: torch.dtype = torch.float32, **like
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, W, bias, A and B; x and the adapter require gradients."""
    adapter = like.pop("adapter", dtype)
    x = torch.randn(*rows, k, **like).to(dtype).requires_grad_()
    w, b = (torch.randn(n, k, **like) / k**0.5).to(dtype), torch.randn(n, **like).to(dtype)
    A = (torch.randn(r, k, **like) / k**0.5).to(adapter).requires_grad_()
    return x, w, b, A, torch.randn(n, r, **like).to(adapter).requires_grad_()


def formula(
    x: Tensor, w: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: float, seed: Tensor | None, p: float
) -> Tensor:
    """The definition, in ordinary operators, with the mask given by its seed."""
    z = x
    if seed is not None:
        mask = philox.keep_mask(seed, 0, x.shape[:-1].numel(), x.shape[-1], p).view(x.shape)
        z = x * mask * philox.keep_scale(p)
    return (F.linear(x, w, b) + c * F.linear(F.linear(z.to(A.dtype), A), B)).to(x.dtype)


def results(function: Callable[..., Tensor], x: Tensor, *rest: Tensor | None) -> list[Tensor]:
    """The output and the gradients of all operands that require one, for a fixed output gradient."""
    torch.manual_seed(1)
    y = function(x, *rest)
    dy = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(2)).to(y.dtype)
    wanted = [t for t in (x, *rest) if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def seed_after(manual_seed: int, device: torch.device) -> Tensor:
    torch.manual_seed(manual_seed)
    return philox.draw_seed(device)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_and_second_derivatives(fused_always: None, p: float, bias: bool) -> None:
    x, w, b, A, B = operands((2, 3), 11, 5, 3, torch.float64)

    def call(x: Tensor, A: Tensor, B: Tensor, *b: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lora_linear(x, w, b[0] if b else None, A, B, 1.7, p)

    inputs = (x, A, B, b.requires_grad_()) if bias else (x, A, B)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_dtype(
    name: str, no_worse: Callable[..., None], device: torch.device, dtype: torch.dtype, adapter: torch.dtype, p: float
) -> None:
    if name == "cpu" and device.type != "cpu":
        pytest.skip("the CPU's kernels")
    tensors = operands((3, 21), dtype=dtype, adapter=adapter, device=device)
    seed = seed_after(1, device) if p else None
    with backend(name):
        ours = results(lambda x, w, b, A, B: lora_linear(x, w, b, A, B, 2.0, p), *tensors)
    theirs = results(lambda x, w, b, A, B: formula(x, w, b, A, B, 2.0, seed, p), *tensors)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    dy = torch.randn(3, 21, 70, device=device, generator=torch.Generator(device).manual_seed(2)).to(dtype).double()
    y = formula(*doubles, 2.0, seed, p)
    exact = [y.detach(), *torch.autograd.grad(y, [t for t in doubles if t.requires_grad], dy)]
    for o, t, e in zip(ours, theirs, exact):
        no_worse(o, t, e)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 0), (1, 1), (2, 3, 5), ()])
def test_any_leading_shape(fused_always: None, device: torch.device, rows: tuple[int, ...], p: float) -> None:
    tensors = operands(rows, 37, 19, 3, device=device)
    ours = results(lambda x, w, b, A, B: lora_linear(x, w, b, A, B, 2.0, p), *tensors)
    seed = seed_after(1, device) if p else None
    theirs = results(lambda x, w, b, A, B: formula(x, w, b, A, B, 2.0, seed, p), *tensors)
    for o, t in zip(ours, theirs):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-5)


def test_any_strides(fused_always: None, device: torch.device) -> None:
    """A transposed input, a block of a wider one, a transposed weight (Conv1D's), an expanded output gradient."""
    x, w, b, A, B = operands((40,), device=device)
    expected = lora_linear(x, w, b, A, B, 2.0)
    wider = torch.cat([x, x], dim=1)[:, :130]
    for same in (x.t().contiguous().t(), wider, x[:, None].expand(-1, 3, -1)[:, 1], x.flip(0).flip(0)):
        torch.testing.assert_close(lora_linear(same, w, b, A, B, 2.0), expected)
    torch.testing.assert_close(lora_linear(x, w.t().contiguous().t(), b, A, B, 2.0), expected)
    ours = torch.autograd.grad(expected.sum(), (x, A, B))
    for o, t in zip(ours, torch.autograd.grad(formula(x, w, b, A, B, 2.0, None, 0.0).sum(), (x, A, B))):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-4)


def test_small_inputs_equal_large_ones(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    tensors = operands((2, 5), device=device)
    call = lambda x, w, b, A, B: lora_linear(x, w, b, A, B, 2.0)  # noqa: E731
    small = results(call, *tensors)
    monkeypatch.setattr(sys.modules["fastpeft.ops.lora_linear"], "NATIVE_ELEMENTS", -1)
    for s, t in zip(small, results(call, *tensors)):
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_differentiated(device: torch.device) -> None:
    x, w, b, A, B = operands((64,), device=device)
    y = lora_linear(x.detach(), w, b, A, B, 2.0, 0.1)  # the first layer of a model
    y.sum().backward()
    assert A.grad is not None and B.grad is not None
    frozen_A, frozen_B = A.detach(), B.detach()
    torch.manual_seed(4)
    (through,) = torch.autograd.grad(lora_linear(x, w, b, frozen_A, frozen_B, 2.0, 0.1).sum(), x)
    torch.manual_seed(4)
    (expected,) = torch.autograd.grad(lora_linear(x, w, b, A, B, 2.0, 0.1).sum(), x)
    torch.testing.assert_close(through, expected)
    assert not lora_linear(x.detach(), w, b, frozen_A, frozen_B, 2.0).requires_grad


def test_trainable_base_weights_get_gradients(device: torch.device) -> None:
    x, w, b, A, B = operands((64,), device=device)
    w.requires_grad_(), b.requires_grad_()
    ours = results(lambda *args: lora_linear(*args, 2.0), x, w, b, A, B)
    for o, t in zip(ours, results(lambda *args: formula(*args, 2.0, None, 0.0), x, w, b, A, B)):
        torch.testing.assert_close(o, t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_without_a_graph_break(device: torch.device, p: float) -> None:
    tensors = operands((2, 64), device=device)
    call = lambda x, w, b, A, B: lora_linear(x * 1, w, b, A, B, 2.0, p)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(results(call, *tensors), results(compiled, *tensors)):
        torch.testing.assert_close(eager, graph, rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_linear_does(no_worse: Callable[..., None], device: torch.device) -> None:
    tensors = operands((50,), device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = results(lambda *t: lora_linear(*t, 2.0), *tensors)
        theirs = results(lambda x, w, b, A, B: F.linear(x, w, b) + 2.0 * F.linear(F.linear(x, A), B), *tensors)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    dy = torch.randn(50, 70, device=device, generator=torch.Generator(device).manual_seed(2)).bfloat16().double()
    y = formula(*doubles, 2.0, None, 0.0)
    exact = [y.detach(), *torch.autograd.grad(y, [t for t in doubles if t.requires_grad], dy)]
    assert ours[0].dtype == torch.bfloat16
    for o, t, e in zip(ours, theirs, exact):
        no_worse(o, t, e)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_mask(device: torch.device, use_reentrant: bool) -> None:
    x, w, b, A, B = operands((64,), device=device)
    call = lambda x: lora_linear(x, w, b, A, B, 2.0, 0.3).sin()  # noqa: E731
    found = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=use_reentrant)):
        x.grad = A.grad = B.grad = None
        torch.manual_seed(6)
        run(x).sum().backward()
        found.append([x.grad, A.grad, B.grad])
    assert all(torch.equal(a, c) for a, c in zip(*found))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_same_bits_every_time(device: torch.device, p: float) -> None:
    tensors = operands((300,), device=device)
    call = lambda *t: lora_linear(*t, 2.0, p)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(results(call, *tensors), results(call, *tensors)))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_kept_for_the_backward(device: torch.device, p: float) -> None:
    """x, s and eight bytes of seed: no mask, no dropped-out input, no copy of a parameter."""
    x, w, b, A, B = operands((2, 64), device=device)
    owned = {t.untyped_storage().data_ptr() for t in (w, b, A, B)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in owned:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(x, w, b, A, B, 2.0, p)
    assert sum(kept.values()) == x.numel() * 4 + 128 * 6 * 4 + (8 if p else 0)
    assert x.untyped_storage().data_ptr() in kept and y.grad_fn is not None


def test_a_graph_may_be_used_twice_and_nothing_is_written_to(device: torch.device) -> None:
    x, w, b, A, B = operands((64,), device=device)
    before = [t.detach().clone() for t in (x, w, b, A, B)]
    y = lora_linear(x, w, b, A, B, 2.0, 0.2)
    first = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, A, B))
    assert all(torch.equal(a, c) for a, c in zip(first, second))
    assert all(torch.equal(a, c) for a, c in zip(before, (x, w, b, A, B)))


def test_the_output_may_be_changed_in_place(device: torch.device) -> None:
    x, w, b, A, B = operands((2, 64), device=device)
    y = lora_linear(x, w, b, A, B, 2.0, 0.1)
    y.clamp_(min=0).sum().backward()
    assert x.grad is not None


def test_transforms_and_subclasses(device: torch.device) -> None:
    x, w, b, A, B = (t.detach() for t in operands((64,), device=device))
    whole = formula(x, w, b, A, B, 2.0, None, 0.0)
    batched = torch.vmap(lambda row: lora_linear(row, w, b, A, B, 2.0))(x.view(4, 16, -1))
    torch.testing.assert_close(batched.view(64, -1), whole, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda A: lora_linear(x, w, b, A, B, 2.0, 0.1).sum())(A)
    assert gradient.shape == A.shape

    class Marked(Tensor):
        """A subclass that every operator passes on."""

    marked = lora_linear(x.as_subclass(Marked), w, b, A, B, 2.0)
    assert type(marked) is Marked
    torch.testing.assert_close(marked.as_subclass(Tensor), whole, rtol=1e-4, atol=1e-4)
    meta = lora_linear(*(t.to("meta") for t in (x, w, b, A, B)), 2.0, 0.1)
    assert meta.is_meta and meta.shape == whole.shape


def test_errors_say_what_was_expected() -> None:
    x, w, b, A, B = operands((64,))
    with pytest.raises(ValueError, match=r"lora_A must be \(r, 130\) and lora_B \(70, r\)"):
        lora_linear(x, w, b, A[:, 1:], B, 2.0)
    with pytest.raises(ValueError, match=r"rank must be from 1 to 512, got 513"):
        lora_linear(x, w, b, torch.zeros(513, 130), torch.zeros(70, 513), 2.0)
    with pytest.raises(ValueError, match=r"dropout_p must be between 0 and 1, got 1.5"):
        lora_linear(x, w, b, A, B, 2.0, 1.5)
    with pytest.raises(ValueError, match=r"needs an input \(..., 130\), got \(64, 129\)"):
        lora_linear(x[:, 1:], w, b, A, B, 2.0)
