"""When the members of a group may share one product, and when each must compute alone."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from patch_models import all_groups, lora
from torch import Tensor, nn

from fastpeft import patch
from fastpeft.patch import forwards as forwards_module
from fastpeft.patch import group as group_module


class Projections(nn.Module):
    """Attention-like code whose behaviour between the projections can be changed; every tensor is kept to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=False) for n in (64, 32, 32))
        self.step: Any = lambda x: (self.q(x), self.k(x), self.v(x))

    def forward(self, x: Tensor) -> Any:
        return self.step(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), Projections()

    def forward(self, x: Tensor) -> Any:
        return self.attention(self.norm(x))


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    model = lora(Model(), target_modules=["q", "k", "v"]).base_model.model.to(device)
    patch(model, example_inputs=torch.randn(1, 3, 64, device=device))
    assert len(all_groups(model)) == 1
    return model


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(2, 40, 64, device=device)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each call of the operators computed."""
    seen: list[int] = []
    group, alone = group_module.lora_linear_group, forwards_module.lora_linear

    def counted_group(x: Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(weights))
        return group(x, weights, *args, **kwargs)

    def counted_alone(*args: Any) -> Tensor:
        seen.append(1)
        return alone(*args)

    monkeypatch.setattr(group_module, "lora_linear_group", counted_group)
    monkeypatch.setattr(forwards_module, "lora_linear", counted_alone)
    return seen


def originals(model: Any, x: Tensor) -> list[Tensor]:
    a = model.attention
    return [m.forward.original(x) for m in (a.q, a.k, a.v)]


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_product_for_one_input(model: Any, x: Tensor, products: list[int]) -> None:
    assert_close(model.attention(x), originals(model, x))
    assert products == [3]


def test_any_order_of_calls(model: Any, x: Tensor, products: list[int]) -> None:
    a = model.attention
    a.step = lambda x: (a.v(x), a.q(x), a.k(x))
    v, q, k = model.attention(x)
    assert_close((q, k, v), originals(model, x))
    assert products == [3]


def test_another_tensor_is_computed_alone(model: Any, x: Tensor, products: list[int]) -> None:
    a, other = model.attention, torch.randn_like(x)
    a.step = lambda x: (a.q(x), a.k(other), a.v(x.clone()))
    q, k, v = model.attention(x)
    assert_close((q, k, v), (originals(model, x)[0], originals(model, other)[1], originals(model, x)[2]))
    assert products == [3, 1, 1]


def test_input_written_to_between_two_projections(model: Any, x: Tensor) -> None:
    a = model.attention
    a.step = lambda x: (a.q(x), a.k(x.mul_(2)), a.v(x))
    with torch.no_grad():
        q, k, v = model.attention(x.clone())
    assert_close((q, k, v), (originals(model, x)[0], originals(model, 2 * x)[1], originals(model, 2 * x)[2]))


def test_input_data_replaced_between_two_projections(model: Any, x: Tensor) -> None:
    a = model.attention

    def step(y: Tensor) -> Any:
        q = a.q(y)
        y.data = 2 * x
        return q, a.k(y), a.v(y)

    a.step = step
    with torch.no_grad():
        q, k, v = model.attention(x.clone())
    assert_close((q, k, v), (originals(model, x)[0], originals(model, 2 * x)[1], originals(model, 2 * x)[2]))


def test_grad_mode_and_autocast_changed_between_two_projections(model: Any, x: Tensor, device: torch.device) -> None:
    a = model.attention

    def step(x: Tensor) -> Any:
        with torch.no_grad():
            q = a.q(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            k = a.k(x)
        return q, k, a.v(x)

    a.step = step
    q, k, v = model.attention(x)
    assert not q.requires_grad and k.requires_grad and v.requires_grad
    assert k.dtype == torch.bfloat16 and v.dtype == torch.float32
    v.sum().backward()
    assert a.v.lora_A["default"].weight.grad is not None


def test_a_module_called_twice_with_one_input(model: Any, x: Tensor) -> None:
    a = model.attention
    a.step = lambda x: (a.q(x), a.q(x), a.k(x), a.v(x), a.k(x))
    q, q2, k, v, k2 = model.attention(x)
    assert_close((q, k, v), originals(model, x))
    assert_close((q2, k2), originals(model, x)[:2])


def test_chunks_within_one_call_of_the_parent(model: Any, x: Tensor, products: list[int]) -> None:
    a = model.attention
    a.step = lambda x: [(a.q(c), a.k(c), a.v(c)) for c in x.repeat(1, 2, 1).chunk(2, dim=1)]
    for triple in model.attention(x):
        assert_close(triple, originals(model, x))
    assert products == [3, 3]


def test_nothing_is_kept_after_the_call(model: Any, x: Tensor) -> None:
    a, group = model.attention, all_groups(model)[0]
    kept: list[Any] = []

    def step(x: Tensor) -> None:
        a.q(x)  # the others never ask for their part
        kept.extend(weakref.ref(part) for part in group.entry.outs if part is not None)

    a.step = step
    model.attention(x)
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)
    assert group.entry is None and group.owner is None


def test_parts_are_handed_over_not_kept(model: Any, x: Tensor) -> None:
    a, group = model.attention, all_groups(model)[0]

    def step(x: Tensor) -> int:
        a.q(x)
        ref = weakref.ref(a.k(x))
        a.v(x)
        gc.collect()
        assert group.entry is None
        return ref() is None

    a.step = step
    with torch.no_grad():
        assert model.attention(x)


def test_exception_leaves_nothing_behind(model: Any, x: Tensor) -> None:
    a, group = model.attention, all_groups(model)[0]

    def fail(x: Tensor) -> None:
        a.q(x)
        raise KeyError("in the middle")

    a.step = fail
    with pytest.raises(KeyError):
        model.attention(x)
    assert group.entry is None and group.owner is None
    a.step = lambda x: (a.q(x), a.k(x), a.v(x))
    assert_close(model.attention(x), originals(model, x))


def test_wrong_input_raises_what_the_original_raises(model: Any, x: Tensor) -> None:
    for bad in (x[..., :5], x.double(), "text"):
        with pytest.raises(Exception) as theirs:
            model.attention.q.forward.original(bad)
        with pytest.raises(type(theirs.value)):
            model.attention(bad)


def test_outside_the_parent_every_projection_stands_alone(model: Any, x: Tensor) -> None:
    a = model.attention
    x.requires_grad_()
    a.q(x).sum().backward()  # each has a graph of its own, as it has unpatched
    a.k(x).sum().backward()
    a.v(x).sum().backward()
    assert all(m.lora_A["default"].weight.grad is not None for m in (a.q, a.k, a.v))


def test_part_of_the_outputs_used(model: Any, x: Tensor) -> None:
    """Gradients where only one output reaches the loss: zero, or absent, for the others' adapters."""
    x.requires_grad_()
    _, k, _ = model.attention(x)
    k.square().sum().backward()
    ours = x.grad.clone()
    x.grad = None
    originals(model, x)[1].square().sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-4)


def test_outputs_may_be_changed_in_place(model: Any, x: Tensor) -> None:
    for scale in (1.0, 0.0):
        q, k, v = model.attention(x)
        q.mul_(scale)
        k.add_(1.0)
        assert_close((q, k, v), [y * s + c for y, s, c in zip(originals(model, x), (scale, 1, 1), (0, 1, 0))])
        (q.sum() + k.sum()).backward()


def test_inference_mode(model: Any, x: Tensor) -> None:
    with torch.inference_mode():
        assert_close(model.attention(x + 0), originals(model, x))


def test_recursion_of_the_parent(model: Any, x: Tensor) -> None:
    a, depth = model.attention, []

    def step(x: Tensor) -> Any:
        q = a.q(x)
        if not depth:
            depth.append(1)
            inner = model.attention(x)
            assert_close(inner, originals(model, x))
        return q, a.k(x), a.v(x)

    a.step = step
    assert_close(model.attention(x), originals(model, x))


def test_threads_do_not_take_each_others_parts(model: Any) -> None:
    inputs = [torch.full((2, 40, 64), float(i)) + torch.randn(64) for i in range(4)]
    inputs = [x.to(next(model.parameters()).device) for x in inputs]
    expected = [originals(model, x) for x in inputs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(30):
                assert_close(model.attention(inputs[i]), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_hooks_on_members_still_run(model: Any, x: Tensor, products: list[int]) -> None:
    a = model.attention
    expected = originals(model, x)
    seen: list[str] = []
    handle = a.k.register_forward_hook(lambda m, i, out: seen.append("after") or out + 1)
    assert_close(model.attention(x), [expected[0], expected[1] + 1, expected[2]])
    handle.remove()
    handle = a.k.register_forward_pre_hook(lambda m, i: seen.append("before") or (i[0] * 2,))
    assert_close(model.attention(x), [expected[0], originals(model, 2 * x)[1], expected[2]])
    handle.remove()
    handle = a.v.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    sum(y.sum() for y in model.attention(x.requires_grad_())).backward()
    handle.remove()
    products.clear()
    inner = a.q.base_layer.register_forward_hook(lambda m, i, out: seen.append("inside"))
    model.attention(x)
    inner.remove()
    assert seen == ["after", "before", "backward", "inside"]
    assert 3 not in products
    model.attention(x)
    assert products[-1] == 3


def test_replaced_forward_inside_the_layer_is_called(model: Any, x: Tensor) -> None:
    base = model.attention.q.base_layer
    base.forward = lambda x: torch.zeros(*x.shape[:-1], 64, device=x.device)
    a = model.attention
    expected = originals(model, x)
    assert_close(a(x), expected)


def test_small_inputs_and_empty_ones(model: Any, device: torch.device) -> None:
    for shape in ((64,), (1, 64), (0, 64), (1, 1, 64), (2, 0, 64), (3, 1, 2, 64)):
        x = torch.randn(shape, device=device)
        ours, theirs = model.attention(x), originals(model, x)
        assert [y.shape for y in ours] == [y.shape for y in theirs]
        assert_close(ours, theirs)


def test_strided_inputs(model: Any, device: torch.device) -> None:
    x = torch.randn(40, 128, 3, device=device).transpose(0, 2)[:, 10:74].transpose(1, 2)
    assert not x.is_contiguous()
    assert_close(model.attention(x), originals(model, x))


def test_functorch_transforms(model: Any, x: Tensor) -> None:
    vmapped = torch.func.vmap(lambda row: model.attention(row)[0], randomness="error")(x)
    torch.testing.assert_close(vmapped, originals(model, x)[0], rtol=1e-5, atol=1e-5)
    _, tangent = torch.func.jvp(lambda y: model.attention(y)[1], (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda y: model.attention.k.forward.original(y), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


def test_double_backward(model: Any, x: Tensor) -> None:
    def penalty(outputs: Any, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        return h

    x.requires_grad_()
    torch.testing.assert_close(penalty(model.attention(x), x), penalty(originals(model, x), x), rtol=1e-3, atol=1e-3)
