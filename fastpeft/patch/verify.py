"""A planned replacement against the modules it replaces: once, on random numbers, forward and backward.

Both sides are compared with the same formula in float64. Ours may err at most twice as much as the original does: the
original's error is what this dtype can do. Outputs and input gradients are compared so on a sample of their columns
(converting a large weight to float64 would take longer than everything else) and with each other on all of them. The
adapter's weights are random for the comparison (a fresh B is zero and would hide everything) and dropout is off; the
parameters, flags and the random state are as before afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..ops.lora_linear import NATIVE_ELEMENTS
from ..ops.weight_norm import weight_norm
from .forwards import LoraForward, PlainForward
from .group import Group
from .producers import ActivationForward, ProducerForward
from .reading import Operands, as_dense, dense_weight, input_dtype
from .tolerance import FACTOR, FORMULA, distance

ROWS = 33  # odd, and more than a tile
COLUMNS = 96  # of outputs and of the input's gradient that are computed in float64
Member = LoraForward | PlainForward


def verify_alone(member: LoraForward) -> str | None:
    """Why this layer's replacement may not be used, or None if it agrees."""
    return _verify([member], lambda x: _none_if_refused(member.alone(x)))


def verify_group(group: Group) -> str | None:
    """Why this group may not be used, or None if it agrees: with its base weights apart and, if stacked, together."""
    wanted = group.one_product
    try:
        for one_product in ("never", "always") if group.stack is not None else ("never",):
            group.one_product = one_product
            reason = _verify(group.members, group.compute)
            if reason is not None:
                return reason
    finally:
        group.one_product = wanted
    return None


# How far a joined operator may be from the producer and the projections that it consists of. All of these have been
# compared with float64 already; this is to show that they were put together rightly, whose error would be of order 1.
JOINED = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def verify_joined(group: Group, producer: ProducerForward) -> str | None:
    """Why this producer and the group may not be one operator, or None if together they give what each gives alone."""
    members = group.members
    with _comparable(members), torch.autocast(_device(members).type, enabled=False):
        operands = [member.operands() for member in members]
        if any(found is None for found in operands):
            return "a layer could not be read"
        weight = operands[0][0]  # type: ignore[index]
        dtype, device, width = input_dtype(weight, operands[0][2]), weight.device, weight.shape[1]  # type: ignore[index]
        bound = max(JOINED[t] for t in (dtype, getattr(weight, "compute_dtype", None)) if t is not None)
        generator = torch.Generator(device).manual_seed(0)
        rows = max(ROWS, NATIVE_ELEMENTS // width + 1)
        shapes = [width] * (2 if isinstance(producer, ActivationForward) and producer.gated else 1)
        shapes += [found[0].shape[0] for found in operands]  # type: ignore[index]
        random = [torch.randn(1, rows, n, generator=generator, dtype=dtype, device=device) for n in shapes]
        inputs, dys = random[: -len(members)], random[-len(members) :]
        leaves = [t for t in producer.module._parameters.values() if t is not None and t.requires_grad]
        leaves += [t for found in operands for t in found if isinstance(t, Tensor) and t.is_leaf and t.requires_grad]  # type: ignore[union-attr]
        leaves += [m for m in (member.magnitude for member in members) if m is not None]

        def apart(x: Tensor, *up: Tensor) -> list[Tensor]:
            n = producer.original(x)
            for factor in up:
                n = n * factor
            return [member.original(n) for member in members]

        def together(x: Tensor, *up: Tensor) -> list[Tensor] | None:
            before, producer.group = producer.group, group
            try:
                n = producer.fused(x)
                for factor in up:
                    n = None if n is None else n * factor
                taken = [None if n is None else group.take(i, n) for i in range(len(members))]
            finally:
                producer.group = before
            return None if any(y is None for y in taken) else taken  # type: ignore[return-value]

        try:
            theirs, ours = (_run_inputs(inputs, dys, leaves, f) for f in (apart, together))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return f"it failed when tried: {type(error).__name__}: {error}"
        if ours is None or theirs is None:
            return "its conditions do not hold"
        for mine, other in zip(ours, theirs):
            if mine.dtype != other.dtype or not distance(mine, other) <= max(bound, JOINED[other.dtype]):
                return f"joined and apart differ by {distance(mine, other):.1e}"
    return None


def _device(members: Sequence[Member]) -> torch.device:
    module: Any = members[0].module
    return module.weight.device


def _run_inputs(
    inputs: Sequence[Tensor], dys: Sequence[Tensor], leaves: Sequence[Tensor], f: Callable[..., Sequence[Tensor] | None]
) -> list[Tensor] | None:
    """Outputs, then the gradients of the inputs and of the leaves."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outs = f(*inputs)
        if outs is None:
            return None
        gradients = torch.autograd.grad(list(outs), [*inputs, *leaves], dys)
    return [*(y.detach() for y in outs), *gradients]


def _none_if_refused(y: Tensor | None) -> tuple[Tensor, ...] | None:
    return None if y is None else (y,)


def _verify(members: Sequence[Member], replacement: Callable[[Tensor], Sequence[Tensor] | None]) -> str | None:
    with _comparable(members), torch.autocast(_device(members).type, enabled=False):
        operands = [m.current() if isinstance(m, LoraForward) else m.operands() for m in members]
        if any(found is None for found in operands):
            return "the layer could not be read"
        return _compare(members, [found for found in operands if found is not None], replacement)


def _compare(
    members: Sequence[Member], operands: list[Operands], replacement: Callable[[Tensor], Sequence[Tensor] | None]
) -> str | None:
    weight = operands[0][0]
    generator = torch.Generator(weight.device).manual_seed(0)
    dtype, device, width = input_dtype(weight, operands[0][2]), weight.device, weight.shape[1]
    rows = max(ROWS, NATIVE_ELEMENTS // width + 1)  # enough for the operators proper
    x = torch.randn(1, rows, width, generator=generator, dtype=dtype, device=device)
    dys = [torch.randn(1, rows, o[0].shape[0], generator=generator, dtype=dtype, device=device) for o in operands]
    magnitudes = [m.magnitude for m in members]
    adapters = [t for o, m in zip(operands, magnitudes) for t in (*o[2:4], m) if t is not None]
    try:
        theirs = _run_inputs([x], dys, adapters, lambda x: [member.original(x) for member in members])
        ours = _run_inputs([x], dys, adapters, replacement)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"it failed when tried: {type(error).__name__}: {error}"
    if ours is None or theirs is None:
        return "its conditions do not hold"
    names = ["output"] * len(members) + ["gradient of the input"] + ["gradient of an adapter weight"] * len(adapters)
    bound = max(FORMULA[t] for t in (dtype, getattr(weight, "compute_dtype", None)) if t is not None)
    for name, mine, other, (columns, truth) in zip(names, ours, theirs, _exact(x, dys, operands, magnitudes)):
        reason = _judge(mine, other, columns, truth, bound)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _judge(mine: Tensor, other: Tensor, columns: Tensor | slice, truth: Tensor, bound: float) -> str | None:
    """Why `mine` may not stand for `other`. truth: some columns of both, in float64.

    bound: how far from it `other` may be and still be the formula, in the dtype that the base product is made in.
    """
    if mine.dtype != other.dtype or mine.shape != other.shape:
        return f"{mine.dtype} {tuple(mine.shape)} instead of {other.dtype} {tuple(other.shape)}"
    error, theirs = distance(mine[..., columns], truth), distance(other[..., columns], truth)
    if not theirs <= max(bound, FORMULA[other.dtype]):
        return f"the original is not a linear layer with LoRA: relative distance {theirs:.1e}"
    allowed = max(FACTOR * theirs, torch.finfo(other.dtype).eps / 4)
    if not error <= allowed:
        return f"relative error {error:.1e} against float64, the original's is {theirs:.1e}"
    apart = distance(mine, other)
    if not apart <= 1.5 * (allowed + theirs):  # what two such errors can add up to; the sample may flatter either
        return f"relative distance {apart:.1e} from the original, whose error is {theirs:.1e}"
    return None


def _exact(
    x: Tensor, dys: list[Tensor], operands: list[Operands], magnitudes: list[Tensor | None]
) -> list[tuple[Any, Tensor]]:
    """The same in float64, by the formulas written out: (columns, their values) of each; all columns for A and B.

    DoRA's norms, in which a float64 copy of the weight would be needed, are right to 1e-7 and not to the last bit.
    """
    x64 = x.double()
    inputs = _sample(x.shape[-1], x)
    d_adapters: list[tuple[Any, Tensor]] = []
    outs, dx = [], torch.zeros_like(x64[..., inputs])
    for (weight, bias, lora_A, lora_B, scaling, _), m, dy in zip(operands, magnitudes, dys):
        W, dy64, outputs = as_dense(weight, torch.float32).detach(), dy.double(), _sample(weight.shape[0], x)
        y, gain, norm = x64 @ W[outputs].double().T, None, None
        if m is not None and lora_A is not None and lora_B is not None:
            norm = weight_norm(W, lora_A, lora_B, scaling).double()
            gain = m.detach().double().flatten() / norm
        d_sum = dy64 if gain is None else dy64 * gain
        dx += d_sum @ W[:, inputs].double()
        d_magnitude: list[tuple[Any, Tensor]] = []
        if lora_A is not None and lora_B is not None:
            A, B = lora_A.detach().double(), lora_B.detach().double()
            s = x64 @ A.T * scaling
            ds = d_sum @ B * scaling
            y = y + s @ B[outputs].T
            dx += ds @ A[:, inputs]
            d_adapters += [(slice(None), (ds.mT @ x64).sum(0)), (slice(None), (d_sum.mT @ s).sum(0))]
            if gain is not None and norm is not None:
                d_magnitude = [(outputs, (dy64[..., outputs] * y).sum((0, 1)) / norm[outputs])]
                y = y * gain[outputs]
        d_adapters += d_magnitude
        if bias is not None:
            y = y + bias.detach()[outputs].double()
        outs.append((outputs, y))
    return [*outs, (inputs, dx), *d_adapters]


def _sample(n: int, like: Tensor) -> Tensor:
    """Up to COLUMNS indices below n, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, COLUMNS), device=like.device).round().long()


@contextlib.contextmanager
def _comparable(members: Sequence[Member]) -> Iterator[None]:
    """Adapters on, dropout off, A and B random and trainable; put back whatever happens."""
    undo: list[Callable[[], None]] = []
    try:
        for member in members:
            if isinstance(member, LoraForward):
                _prepare(member, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _prepare(member: LoraForward, undo: list[Callable[[], None]]) -> None:
    reading, state = member.reading, member.module.__dict__

    def restore_disabled(before: bool = state["_disable_adapters"]) -> None:
        state["_disable_adapters"] = before

    undo.append(restore_disabled)
    state["_disable_adapters"] = False
    if reading.name is None:
        return
    K, r = reading.A.in_features, reading.A.out_features
    _replace(reading.A, K**-0.5, undo)
    weight = dense_weight(reading)
    _replace(reading.B, _size_of_B(weight, reading.scaling[reading.name], K, r), undo)
    if reading.dora:
        _move_magnitude(reading.magnitude_module, undo)
        # In training peft makes a product of its own for dropout(x) even where nothing is dropped, over 4 bits in
        # another dtype than the base product's.
        _evaluate(member.module, undo)
    _evaluate(reading.dropout, undo)


def _evaluate(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Switch one module to evaluation, not those inside it."""
    before = module.training

    def restore() -> None:
        module.training = before

    undo.append(restore)
    module.training = False


def _move_magnitude(part: Any, undo: list[Callable[[], None]]) -> None:
    """Trainable magnitudes of other sizes in place of the module's own."""
    weight = part._parameters["weight"]

    def restore() -> None:
        part._parameters["weight"] = weight

    undo.append(restore)
    generator = torch.Generator(weight.device).manual_seed(weight.numel())
    factor = torch.rand(weight.shape, generator=generator, device=weight.device) + 0.8
    part._parameters["weight"] = Parameter((weight.detach() * factor).to(weight.dtype))


def _size_of_B(weight: Tensor, scaling: float, K: int, r: int) -> float:
    """The standard deviation with which the adapter adds as much as the base gives, so that neither hides the other."""
    size = weight[:COLUMNS].detach().float().square().mean().sqrt().item() * K**0.5 / abs(scaling or 1.0)
    return (size or 1.0) * r**-0.5


def _replace(part: nn.Module, size: float, undo: list[Callable[[], None]]) -> None:
    """A random trainable weight of this standard deviation in place of the module's own."""
    weight = part._parameters["weight"]
    assert weight is not None
    generator = torch.Generator(weight.device).manual_seed(weight.shape[0])
    noise = torch.randn(weight.shape, generator=generator, device=weight.device) * size

    def restore() -> None:
        part._parameters["weight"] = weight

    undo.append(restore)
    part._parameters["weight"] = Parameter(noise.to(weight.dtype))
