"""Linear cross-entropy: the formula and its gradients in every combination, never all logits, in every precision."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.measure import SavedActivations
from fastpeft.ops import cross_entropy_sweep, linear_cross_entropy
from fastpeft.ops.cross_entropy import new_state
from fastpeft.ops.cross_entropy_sweep import tile_shape

# hidden, weight, labels, bias, lora_A, lora_B
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles either way, the last ones narrower, even for gradcheck's inputs."""
    monkeypatch.setattr(
        cross_entropy_sweep, "tile_shape", lambda rows, columns, device: (min(rows, 4), min(columns, 5))
    )


def operands(
    dtype: torch.dtype = torch.float64, M: int = 7, K: int = 5, V: int = 13, r: int = 2, device: Any = None
) -> Operands:
    h, W, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (V, K), (V,)))
    A, B = (torch.randn(*shape, device=device).to(dtype) for shape in ((r, K), (V, r)))
    y = torch.randint(V, (M,), device=device)
    y[M // 2 :: 5] = -100
    return h.requires_grad_(), W, y, b, A, B


def eager(
    h: Tensor,
    W: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    c: float = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    **options: Any,
) -> Tensor:
    """As Transformers has it: logits in the model's dtype, the loss of them in fp32."""
    z = F.linear(h, W, b)
    if A is not None and B is not None:
        z = (z + F.linear(F.linear(h.to(A.dtype), A), B) * c).to(z.dtype)
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    x = z if z.dtype == torch.float64 else z.float()
    loss = F.cross_entropy(x, y, **options)
    assert z_loss == 0.0
    return loss


OPTIONS = [
    {"logit_scale": scale, "softcap": cap, "label_smoothing": smoothing, "z_loss": z}
    for scale, cap, smoothing, z in itertools.product((1.0, 0.7), (None, 2.0), (0.0, 0.1), (0.0, 0.02))
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 2, 4, 15)], ids=str)
def test_gradients(options: dict[str, Any]) -> None:
    h, W, y, b, A, B = operands(M=5, K=3, V=6)
    options = options | {"reduction": "none"}
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, W, y, b, **options), (h,), fast_mode=True)
    for t in (W, b, A, B):
        t.requires_grad_()
    seed = torch.tensor([5])
    call = lambda h, W, b, A, B: linear_cross_entropy(h, W, y, b, A, B, 1.5, 0.3, seed=seed, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, (h, W, b, A, B), fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("trained", [t for t in itertools.product((False, True), repeat=5) if sum(t) != 2])
def test_any_subset_of_gradients(trained: tuple[bool, ...]) -> None:
    h, W, y, b, A, B = operands()
    differentiable = (h, W, b, A, B)
    for t, wanted in zip(differentiable, trained):
        t.requires_grad_(wanted)
    leaves = [t for t in differentiable if t.requires_grad]
    ours, theirs = linear_cross_entropy(h, W, y, b, A, B, 1.5), eager(h, W, y, b, A, B, 1.5)
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad == bool(leaves)
    if leaves:
        for o, t in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
            torch.testing.assert_close(o, t)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [o for o in OPTIONS if not o["z_loss"]], ids=str)
def test_it_is_pytorchs_cross_entropy(device: torch.device, options: dict[str, Any]) -> None:
    h, W, y, b, *_ = operands(device=device)
    for reduction in ("mean", "sum", "none"):
        ours = linear_cross_entropy(h, W, y, b, reduction=reduction, **options)
        torch.testing.assert_close(ours, eager(h, W, y, b, reduction=reduction, **options))


def test_z_loss_is_palms(device: torch.device) -> None:
    h, W, y, *_ = operands(device=device)
    extra = linear_cross_entropy(h, W, y, z_loss=0.3, reduction="none") - linear_cross_entropy(
        h, W, y, reduction="none"
    )
    expected = torch.where(y >= 0, 0.3 * torch.logsumexp(h @ W.T, 1).square(), 0.0)
    torch.testing.assert_close(extra, expected)


def test_second_derivatives() -> None:
    h, W, y, b, A, B = operands()
    check = torch.autograd.gradgradcheck
    assert check(lambda h: linear_cross_entropy(h, W, y, softcap=2.0), (h,), fast_mode=True)
    for t in (W, b, A, B):
        t.requires_grad_()
    seed = torch.tensor([5])
    call = lambda h, W, b, A, B: linear_cross_entropy(h, W, y, b, A, B, 1.5, 0.3, seed=seed)  # noqa: E731
    assert check(call, (h, W, b, A, B), fast_mode=True)


def test_functorch(device: torch.device) -> None:
    h, W, y, b, *_ = operands(device=device)
    ours, theirs = (torch.func.grad(lambda h, f=f: f(h, W, y, b))(h) for f in (linear_cross_entropy, eager))
    torch.testing.assert_close(ours, theirs)
    each = torch.vmap(lambda h, y: linear_cross_entropy(h.unsqueeze(0), W, y.unsqueeze(0), reduction="sum"))(h, y)
    torch.testing.assert_close(each, eager(h, W, y, reduction="none"))


def test_labels_items_and_shapes(device: torch.device) -> None:
    """As Transformers' causal loss has it: a batch, labels of the next token, the items of a larger batch."""
    h, W = torch.randn(3, 4, 5, device=device), torch.randn(9, 5, device=device)
    y = torch.randint(9, (3, 4), device=device)
    y[1, 2] = 7
    logits = h @ W.T
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=7, reduction="none")
    ours = linear_cross_entropy(h, W, y, ignore_index=7, shift=True, reduction="none")
    assert ours.shape == y.shape and not ours[:, -1].any()
    torch.testing.assert_close(ours[:, :-1].flatten(), shifted)
    for items in (5, 5.0, torch.tensor(5)):
        mean = linear_cross_entropy(h, W, y, ignore_index=7, shift=True, num_items_in_batch=items)
        torch.testing.assert_close(mean, shifted.sum() / 5)
    torch.testing.assert_close(linear_cross_entropy(h, W, y.int()), F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    vector = linear_cross_entropy(h[0, 0], W, y[0, 0], reduction="none")
    torch.testing.assert_close(vector, F.cross_entropy(logits[0, 0], y[0, 0]))


def test_nothing_to_learn_from(device: torch.device) -> None:
    h, W, y, *_ = operands(torch.float32, device=device)
    none = torch.full_like(y, -100)
    loss = linear_cross_entropy(h, W, none)
    assert loss.isnan() and F.cross_entropy(h @ W.T, none).isnan()
    total = linear_cross_entropy(h, W, none, reduction="sum")
    assert total == 0 and not torch.autograd.grad(total, h)[0].any()
    empty = linear_cross_entropy(h[:0], W, y[:0], reduction="sum")
    assert empty == 0 and torch.autograd.grad(empty, h)[0].shape == h.shape


def test_one_column_and_forbidden_columns(device: torch.device) -> None:
    h, W, y, b, *_ = operands(torch.float32, device=device)
    one = linear_cross_entropy(h, W[:1], torch.zeros_like(y))
    assert one == 0 and not torch.autograd.grad(one, h)[0].any()
    b[:7] = -torch.inf  # a padded vocabulary; a whole tile of it
    y = y.clamp_min(8)
    ours, theirs = linear_cross_entropy(h, W, y, b), eager(h, W, y, b)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, h), torch.autograd.grad(theirs, h))
    assert linear_cross_entropy(h, W, torch.zeros_like(y), b) == torch.inf
    W[3] = torch.nan
    assert linear_cross_entropy(h, W, y).isnan()


DTYPES = [(t, t) for t in (torch.float32, torch.bfloat16, torch.float16)] + [(torch.bfloat16, torch.float32)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    M=st.integers(8, 40),
    K=st.integers(2, 70),
    V=st.integers(2, 600),
    dtypes=st.sampled_from(DTYPES),
    how=st.sampled_from(["frozen", "trained", "adapter"]),
    options=st.sampled_from([{}, {"softcap": 5.0}, {"logit_scale": 0.3}, {"label_smoothing": 0.1}]),
    size=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_no_further_from_float64_than_pytorch(
    isa: str, seed: int, M: int, K: int, V: int, dtypes: Any, how: str, options: dict[str, Any], size: float
) -> None:
    """size: of the logits; at 4 many rows are all but certain of some column."""
    torch.manual_seed(seed)
    dtype, adapter = dtypes
    h, W, y, b, A, B = operands(dtype, M, K, V)
    with torch.no_grad():
        W *= size * K**-0.5
        A, B = (A * K**-0.5).to(adapter), B.to(adapter)
    y[0] = V - 1
    leaves = {"frozen": [h], "trained": [h, W, b], "adapter": [h, A, B]}[how]
    given = [h, W, y, b, A, B] if how == "adapter" else [h, W, y, b]
    for t in leaves:
        t.requires_grad_()

    def results(f: Callable[..., Tensor], given: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        losses = f(*given, reduction="none", **options)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    double = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given]
    z = (
        F.linear(double[0], *double[1:4:2])
        if how != "adapter"
        else F.linear(double[0], double[1] + double[5] @ double[4])
    )
    logit_error = torch.finfo(dtype).eps / 2 * z.abs().max()
    exact = results(eager, double, [d for d, t in zip(double, given) if any(t is leaf for leaf in leaves)])
    for o, t, e in zip(results(linear_cross_entropy, given, leaves), results(eager, given, leaves), exact):
        assert o.dtype == t.dtype and o.shape == e.shape
        error, allowed = ((x.double() - e).norm() for x in (o, t))
        # PyTorch may happen to be exact: one rounding is granted, of the result and of the logits that it depends on.
        unit = torch.finfo(o.dtype).eps / 2 * e.norm() + logit_error * e.norm().clamp_min(1.0)
        assert error <= 2 * allowed + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_certain(isa: str, dtype: torch.dtype) -> None:
    """p_y = 1 to the last digit: loss and gradient are small numbers, not zero and not noise."""
    torch.manual_seed(0)
    h = torch.randn(6, 32).to(dtype).requires_grad_()
    W = torch.randn(900, 32).to(dtype) * 0.05
    y = torch.arange(6) * 149
    with torch.no_grad():
        W[y] = (h * 18 / h.float().square().sum(1, keepdim=True)).to(dtype)  # logits of 18 among others near 0
    losses, results = [], []
    for f, t in ((linear_cross_entropy, h), (eager, h), (eager, h.detach().double().requires_grad_())):
        loss = f(t, W.to(t.dtype), y, reduction="sum")
        losses.append(loss.item())
        results.append(torch.autograd.grad(loss, t)[0].double())
    assert 1e-6 < losses[2] < 1e-3
    assert abs(losses[0] - losses[2]) <= 2 * abs(losses[1] - losses[2])
    assert (results[0] - results[2]).norm() <= 2 * (results[1] - results[2]).norm() + 2**-9 * results[2].norm()


def test_autocast(device: torch.device) -> None:
    h, W, y, b, A, B = operands(torch.float32, 40, 64, 500, device=device)
    leaves = [t.requires_grad_() for t in (h, W, b, A, B)]
    found: dict[str, list[Tensor]] = {}
    for name, f, cast in (("exact", eager, False), ("theirs", eager, True), ("ours", linear_cross_entropy, True)):
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            losses = f(h, W, y, b, A, B, 0.7, reduction="none")
            frozen = f(h, W.detach(), y, reduction="none")
        found[name] = [losses, frozen, *torch.autograd.grad(losses.sum(), leaves)]
        found[name] += torch.autograd.grad(frozen.sum(), h)
    for ours, theirs, exact in zip(found["ours"], found["theirs"], found["exact"]):
        assert ours.dtype == theirs.dtype
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6


def test_retained_graphs_and_accumulation(device: torch.device) -> None:
    for trained in (False, True):
        h, W, y, *_ = operands(torch.float32, device=device)
        W.requires_grad_(trained)
        for f in (linear_cross_entropy, eager):
            loss = f(h, W, y)
            loss.backward(retain_graph=True)
            (3 * loss).backward()
            f(h, W, y, reduction="sum").backward()
        torch.testing.assert_close(
            h.grad, 2 * torch.autograd.grad(4 * eager(h, W, y) + eager(h, W, y, reduction="sum"), h)[0]
        )


def test_a_dropout_mask_may_be_drawn_before(device: torch.device) -> None:
    h, W, y, b, A, B = operands(torch.float32, 20, 30, 40, device=device)
    torch.manual_seed(3)
    drawn = linear_cross_entropy(h, W, y, b, A, B, 2.0, 0.5)
    torch.manual_seed(3)
    from fastpeft.ops import lora_linear
    from fastpeft.ops.philox import draw_seed

    seed = draw_seed(h.device)
    assert torch.equal(linear_cross_entropy(h, W, y, b, A, B, 2.0, 0.5, seed=seed), drawn)
    torch.manual_seed(3)
    logits = lora_linear(h, W, b, A, B, 2.0, 0.5)
    torch.testing.assert_close(drawn, F.cross_entropy(logits, y))
    assert not torch.allclose(drawn, linear_cross_entropy(h, W, y, b, A, B, 2.0))


def test_nothing_as_wide_as_the_vocabulary_is_kept_or_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    M, K, V = 256, 8, 20000
    h, W, y = torch.randn(M, K, requires_grad=True), torch.randn(V, K), torch.randint(V, (M,))
    rows, columns = tile_shape(M, V, "cpu")
    assert rows == M and columns <= V // 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != W.untyped_storage().data_ptr():
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with SavedActivations() as saved:
        loss = linear_cross_entropy(h, W, y)
    assert saved.bytes <= 3 * M * K * 4 + W.nbytes + 8 * M * 8
    del loss
    sweep = sys.modules["fastpeft.ops.cross_entropy_sweep"]
    with Watch():
        sweep.forward_reference(h.detach(), W, None, None, None, y, 1.0, 0.0, True, "auto")
        sweep.backward_reference(
            h.detach(), W, None, None, None, y, torch.zeros(4, M), 1.0, 0.0, [True] + [False] * 4, "auto"
        )
    assert 0 < largest <= M * columns * 4


def test_tiles_depend_on_shapes_alone() -> None:
    for rows, columns in ((1, 49152), (512, 49152), (4096, 128256), (100000, 50257), (0, 10), (8, 3)):
        for device in ("cpu", "cuda"):
            m, n = tile_shape(rows, columns, device)
            assert m <= rows and n <= columns and m * n <= 1 << 26
            assert (m, n) == tile_shape(rows, columns, device)


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    h, W, y, b, A, B = operands(torch.float32, 30, 40, 600, device=device)
    for t in (A, B):
        t.requires_grad_()
    torch._dynamo.reset()
    for arguments, leaves in (((h, W, y), [h]), ((h, W, y, b, A, B, 2.0), [h, A, B])):
        plain = linear_cross_entropy(*arguments)
        compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(*arguments)
        torch.testing.assert_close(compiled, plain)
        for c, p in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves)):
            torch.testing.assert_close(c, p)
    torch._dynamo.reset()


@pytest.mark.parametrize("namespace", ["fastpeft", "fastpeft_reference"])
def test_schemas_and_fakes_are_true(namespace: str) -> None:
    h, W, y, b, A, B = (t.detach() for t in operands(torch.float32))
    y = y.clamp_min(-1)
    s = h @ A.T
    calls: dict[str, tuple[Any, ...]] = {
        "cross_entropy_accumulate_": (h @ W.T, y, 3, 0.5, 2.0, new_state(7, h), torch.zeros(7, 5)),
        "cross_entropy_gradient_": (h @ W.T, y, 3, 0.5, 2.0, torch.randn(4, 7)),
        "linear_cross_entropy": (h, W, b, s, B, y, 0.5, 2.0, True, "auto"),
        "linear_cross_entropy_backward": (h, W, b, s, B, y, torch.randn(4, 7), 0.5, 2.0, [True] * 5, "auto"),
    }
    for name, arguments in calls.items():
        operator = getattr(getattr(torch.ops, namespace), name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    h, W, y, b, A, B = operands(torch.float32)
    for call, message in (
        (lambda: linear_cross_entropy(h, W[:, :3], y), r"\(V, K\)"),
        (lambda: linear_cross_entropy(h, W, y[:3]), "labels must be"),
        (lambda: linear_cross_entropy(h, W, y.float()), "indices"),
        (lambda: linear_cross_entropy(h, W, y, b[:2]), "bias"),
        (lambda: linear_cross_entropy(h, W, y, b, A), "go together"),
        (lambda: linear_cross_entropy(h, W, y, b, A, B[:3]), "lora_B"),
        (lambda: linear_cross_entropy(h, W, y, b, A, B, dropout_p=2.0), "dropout_p"),
        (lambda: linear_cross_entropy(h, W, y, reduction="most"), "reduction"),
        (lambda: linear_cross_entropy(h, W, y, label_smoothing=1.5), "label_smoothing"),
        (lambda: linear_cross_entropy(h, W, y, softcap=-1.0), "softcap"),
        (lambda: linear_cross_entropy(h, W, y, num_items_in_batch=3, reduction="sum"), "num_items_in_batch"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for label in (13, -1):
        y[0] = label
        with pytest.raises(IndexError, match="out of range"):
            linear_cross_entropy(h, W, y)
