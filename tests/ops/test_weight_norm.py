"""The norms DoRA divides by: a wrong one scales every output of a layer, and a stale one does so unnoticed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.ops.backend import backend
from fastpeft.ops.weight_norm import direct, reference, weight_norm


def exact(weight, A, B, scaling):
    return torch.linalg.vector_norm(weight.double() + scaling * (B.double() @ A.double()), dim=1)


def error(got, want):
    return ((got.double() - want) / want).abs().max().item()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_instruction_set(isa, weight_dtype, transposed):
    torch.manual_seed(0)
    for n, k, r in [(70, 136, 16), (48, 1000, 5), (1, 1, 1), (37, 50, 40), (129, 64, 8)]:
        weight = (torch.randn(k, n).T if transposed else torch.randn(n, k)).to(weight_dtype)
        A, B = torch.randn(r, k) / k**0.5, torch.randn(n, r)
        B[: n // 3] = -(weight[: n // 3].float() @ torch.linalg.pinv(A))  # so that c B A takes A's part of W away
        assert error(weight_norm(weight, A, B, 1.0), exact(weight, A, B, 1.0)) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty(shape):
    n, k = shape
    assert torch.equal(weight_norm(torch.randn(n, k), torch.randn(2, k), torch.randn(n, 2), 1.0), torch.zeros(n))


@pytest.mark.parametrize("size", [0.0, 0.01, 1.0, 100.0])
def test_accuracy_at_full_size(size):
    torch.manual_seed(0)
    k, r = 8192, 384
    weight = torch.randn(48, k) / k**0.5
    A, B = torch.randn(r, k) / k**0.5, torch.randn(48, r) * size
    assert error(weight_norm(weight, A, B, 2.0), exact(weight, A, B, 2.0)) <= 1e-6


@pytest.mark.parametrize("left", [1.0, 0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_accuracy_where_the_adapter_nearly_cancels_the_weight(left, name):
    torch.manual_seed(0)
    k, r = 8192, 384
    A, B = torch.randn(r, k) / k**0.5, torch.randn(48, r)
    weight = left * torch.randn(48, k) * (r / k) ** 0.5 - B @ A
    with backend(name):
        assert error(weight_norm(weight, A, B, 1.0), exact(weight, A, B, 1.0)) <= 1e-6


def test_accuracy_where_the_rows_of_A_are_nearly_one():
    torch.manual_seed(0)
    A = torch.randn(1, 2048) + 0.01 * torch.randn(64, 2048)
    B = torch.randn(48, 64)
    B -= B.mean(1, keepdim=True)  # so that B A is a small difference of large columns
    weight = 1e-2 * torch.randn(48, 2048)
    assert error(weight_norm(weight, A, B, 1.0), exact(weight, A, B, 1.0)) <= 1e-6


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.integers(1, 12),
    transposed=st.booleans(),
    dtypes=st.sampled_from(
        [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2, (torch.float64,) * 2]
    ),
)
def test_any_shape_stride_and_dtype(n, k, r, transposed, dtypes):
    torch.manual_seed(0)
    weight = torch.randn(k, n).T if transposed else torch.randn(n, k)
    weight, A, B = weight.to(dtypes[0]), torch.randn(r, k).to(dtypes[1]), torch.randn(n, r).to(dtypes[1])
    got = weight_norm(weight, A, B, 0.7)
    assert got.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert error(got, exact(weight, A, B, 0.7)) <= 1e-6


def test_it_takes_no_part_in_the_gradient():
    A, B = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert not weight_norm(torch.randn(4, 5, requires_grad=True), A, B, 1.0).requires_grad


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="lora_A must be"):
        weight_norm(torch.randn(4, 5), torch.randn(2, 6), torch.randn(4, 2), 1.0)


class TestNothingStale:
    """Whoever writes to the operands, and however: the norms are those of their values now."""

    def setup_method(self):
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 8, bias=False).requires_grad_(False)
        self.A, self.B = torch.randn(3, 16), torch.randn(8, 3)
        self.check()

    def check(self):
        want = exact(self.layer.weight.detach(), self.A, self.B, 0.5)
        assert error(weight_norm(self.layer.weight, self.A, self.B, 0.5), want) <= 1e-6

    def test_state_dict_loaded_into_the_weight(self):
        self.layer.load_state_dict({"weight": torch.randn(8, 16)})
        self.check()
        self.layer.load_state_dict({"weight": torch.randn(8, 16)}, assign=True)
        self.check()

    def test_storage_freed_and_its_address_used_again(self):
        for _ in range(20):
            self.layer.weight.data = torch.randn(8, 16)
            self.check()

    def test_weight_in_place(self):
        with torch.no_grad():
            self.layer.weight.mul_(2)
        self.check()

    def test_edit_through_data(self):
        # which leaves no trace at all
        for tensor in (self.layer.weight, self.A, self.B):
            tensor.data.mul_(2)
            self.check()

    def test_trained_weight_under_a_fused_optimiser(self):
        # which does not count the tensor's version up
        self.layer.weight.requires_grad_(True)
        self.check()
        optimiser = torch.optim.AdamW([self.layer.weight], lr=0.1, fused=True)
        self.layer.weight.grad = torch.randn(8, 16)
        optimiser.step()
        self.check()

    def test_adapter_under_a_fused_optimiser(self):
        self.A = nn.Parameter(self.A)
        self.check()
        self.A.grad = torch.randn(3, 16)
        torch.optim.AdamW([self.A], lr=0.1, fused=True).step()
        self.A = self.A.detach()
        self.check()

    def test_copies_and_views_of_one_storage(self):
        twin = copy.deepcopy(self.layer)
        twin.weight.data.mul_(3)
        assert error(weight_norm(twin.weight, self.A, self.B, 0.5), exact(twin.weight, self.A, self.B, 0.5)) <= 1e-6
        rows = self.layer.weight.detach()[2:5]
        assert error(weight_norm(rows, self.A, self.B[2:5], 0.5), exact(rows, self.A, self.B[2:5], 0.5)) <= 1e-6
        self.check()

    def test_inference_mode(self):
        with torch.inference_mode():
            self.layer.weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
            self.check()
            self.layer.weight.mul_(2)
            self.check()


def test_memory_stays_below_the_dense_product():
    n = k = 512
    weight, A, B = torch.randn(n, k), torch.randn(8, k), torch.randn(n, 8) * 0.01
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, torch.Tensor) and out.data_ptr() != weight.data_ptr() else 0)
            return out

    with Made():
        reference(weight, A, B, 1.0)
    assert max(made) <= n * 8


def test_compiles_into_one_graph():
    def f(weight, A, B):
        return weight_norm(weight, A, B, 0.5) * 2

    args = torch.randn(8, 16), torch.randn(3, 16), torch.randn(8, 3)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), f(*args))


def test_batched_by_functorch():
    weight, A, B = torch.randn(8, 16), torch.randn(4, 3, 16), torch.randn(4, 8, 3)
    got = torch.func.vmap(lambda a, b: weight_norm(weight, a, b, 0.5))(A, B)
    want = torch.stack([direct(weight, a, b, 0.5) for a, b in zip(A, B)])
    torch.testing.assert_close(got, want)
