"""The operator for small inputs: the formula on every instruction set, its gradients, and when it steps aside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.ops import lora_linear
from fastpeft.ops import lora_linear_small as small
from fastpeft.ops.backend import OPS, cpu_extension

needs_kernels = pytest.mark.skipif(cpu_extension() is None, reason="fastpeft was installed without its C++ extension")
lora_linear_small = small.lora_linear_small


def operands(lead: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype, bias: bool = True) -> list:
    """x, weight, bias, A and B as a layer has them."""
    x = torch.randn(*lead, k).to(dtype).requires_grad_()
    frozen = (torch.randn(n, k) / k**0.5, torch.randn(n))
    w, b = (Parameter(t.to(dtype), requires_grad=False) for t in frozen)
    A, B = (Parameter(t.to(dtype)) for t in (torch.randn(r, k) / k**0.5, torch.randn(n, r)))
    return [x, w, b if bias else None, A, B]


def results(function: Callable[..., Tensor], values: list, c: float, magnitude: bool = False) -> list[Tensor]:
    """Output and gradients; magnitude: of an output gradient without signs."""
    values = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in values]
    y = function(*values, c)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    dy = dy.abs() if magnitude else dy
    return [y.detach(), *torch.autograd.grad(y, [t for t in values if t is not None and t.requires_grad], dy)]


@needs_kernels
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (70,)]),
    k=st.integers(1, 90),
    n=st.integers(1, 90),
    r=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(
    isa: str, no_worse: Callable[..., None], lead: tuple, k: int, n: int, r: int, dtype: torch.dtype, bias: bool, seed
) -> None:
    # Of a handful of 16-bit numbers PyTorch may have every one exact, and then twice its error is no measure.
    assume(dtype is torch.float32 or n >= 8)
    torch.manual_seed(seed)
    values = operands(lead, k, n, r, dtype, bias)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in values]
    sizes = [None if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in exact]
    ours = results(lambda *a: small._apply(*a), values, 1.7)
    others = (results(small.reference, v, 1.7, v is sizes) for v in (values, exact, sizes))
    for four in zip(ours, *others):
        no_worse(*four)


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 300, 577), (1, 600, 600)], ids=["fp32", "one row"])
def test_the_vendor_computes_a_large_base(no_worse: Callable[..., None], shape: tuple[int, int, int]) -> None:
    values = operands((shape[0],), shape[1], shape[2], 8, torch.float32)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in values]
    ours, theirs, wanted = (
        results(f, v, 0.5) for f, v in ((small._apply, values), (small.reference, values), (small.reference, exact))
    )
    for three in zip(ours, theirs, wanted):
        no_worse(*three)


def test_gradients_and_second_derivatives() -> None:
    x, w, b, A, B = operands((2, 3), 7, 5, 3, torch.float64)

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return small._apply(x, w, b, A, B, 0.7)

    assert torch.autograd.gradcheck(call, (x, A, B))
    assert torch.autograd.gradgradcheck(call, (x, A, B))


@needs_kernels
def test_strides_do_not_matter() -> None:
    x, w, b, A, B = (t.detach() for t in operands((6,), 40, 24, 4, torch.float32))
    wanted = small.reference(x, w, b, A, B, 2.0)
    op = OPS["auto"].lora_linear_small
    padded = torch.cat([w, w], 1)[:, :40]
    for operands_ in (
        (x.t().contiguous().t(), w, b, A, B),
        (x, w.t().contiguous().t(), b, A.t().contiguous().t(), B.t().contiguous().t()),
        (x.expand(2, 6, 40)[1], padded, torch.stack([b, b], 1)[:, 0], A, B),
    ):
        torch.testing.assert_close(op(*operands_, 2.0), wanted)


@needs_kernels
def test_wrong_shapes_are_errors() -> None:
    x, w, b, A, B = (t.detach() for t in operands((6,), 40, 24, 4, torch.float32))
    op = OPS["auto"].lora_linear_small
    for wrong in ((x[:, :39], w, b, A, B), (x, w, b[:3], A, B), (x, w, b, A[:3], B), (x, w, b, A, B[:5])):
        with pytest.raises(RuntimeError):
            op(*wrong, 1.0)


@needs_kernels
def test_what_it_leaves_to_the_general_way() -> None:
    x, w, b, A, B = operands((6,), 40, 24, 4, torch.float32)
    assert lora_linear_small(x, w, b, A, B, 1.0) is not None
    assert lora_linear_small(x, Parameter(w.detach()), b, A, B, 1.0) is None
    assert lora_linear_small(x, w, Parameter(b.detach()), A, B, 1.0) is None
    assert lora_linear_small(x, w, b, Parameter(A.detach(), requires_grad=False), B, 1.0) is None
    assert lora_linear_small(x.to("meta"), w, b, A, B, 1.0) is None
    for i in (1, 3, 4):
        with pytest.raises(RuntimeError, match="meta"):
            moved = [Parameter(t.to("meta"), t.requires_grad) if i == j else t for j, t in enumerate((x, w, b, A, B))]
            lora_linear_small(*moved, 1.0)
    assert lora_linear_small(x.bfloat16(), w, b, A, B, 1.0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear_small(x, w, b, A, B, 1.0) is None
        assert lora_linear(x, w, b, A, B, 1.0).dtype == torch.bfloat16
    with fastpeft.backend("reference"):
        assert lora_linear_small(x, w, b, A, B, 1.0) is None
    with fastpeft.backend("cpu"):
        assert lora_linear_small(x, w, b, A, B, 1.0) is not None
    per_row = torch.func.vmap(lambda row: lora_linear(row, w, b, A, B, 1.0))(x)
    torch.testing.assert_close(per_row, lora_linear(x, w, b, A, B, 1.0))


@needs_kernels
def test_an_unused_gradient_is_not_computed_and_a_frozen_member_gets_none() -> None:
    x, w, b, A, B = operands((6,), 40, 24, 4, torch.float32)
    B.requires_grad_(False)
    y = lora_linear(x.detach(), w, b, A, B, 1.0)
    y.sum().backward()
    assert x.grad is None and B.grad is None and A.grad is not None


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft" or "mm" in func.__name__:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_kernels
def test_a_layer_takes_it() -> None:
    """One operator call instead of three products."""
    model = nn.Sequential(nn.Linear(64, 64))
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(target_modules=["0"]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Called() as called:
            model(torch.randn(2, 4, 64))
        assert called.names == ["fastpeft::lora_linear_small"]


@needs_kernels
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_layer_has_ordinary_operators() -> None:
    """So that what exports a trace (ONNX, Core ML) knows them."""
    layer = fastpeft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), fastpeft.LoraConfig(target_modules=["0"])
    ).base_model.model[0]
    graph = str(torch.jit.trace(layer, torch.randn(2, 64), check_trace=False).inlined_graph)
    assert "fastpeft::" not in graph and "PythonOp" not in graph and "aten::linear" in graph
