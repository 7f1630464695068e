"""One tiny forward, watched: which modules make a tensor, and which projections are handed the very same tensor.

The forward runs with everything put back afterwards: training flags, buffers, the random state. Autograd
is on, for it also tells which outputs the model's own code keeps for a backward; nothing is ever run backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..measure import LiveMemory

# Buffers above this many bytes (a quantised weight kept as a buffer) are not copied to be put back.
BUFFER_BYTES = 1 << 24

_MULTIPLY = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)

# The calls that one is within, outermost first: each module and which call of the forward it was.
Path = tuple[tuple[nn.Module, int], ...]


@dataclass
class Call:
    """One call of a watched module."""

    module: nn.Module
    path: Path
    x: Tensor
    out: Tensor | None = None

    @property
    def caller(self) -> nn.Module:
        return self.path[-1][0]


@dataclass
class SharedInput:
    """Modules that one call of `caller` handed the same tensor."""

    caller: nn.Module
    modules: list[nn.Module]
    kept: list[bool]  # is each one's output kept for the backward by the code that uses it?


@dataclass
class Product:
    """A tensor that `source` made, by itself or (gated) multiplied by another one, and the modules that were handed it.

    between: the modules through which the tensor travelled, from below the innermost call that contains them all: those
    around the source, and those around each consumer.
    """

    source: nn.Module
    x: Tensor
    gated: bool
    consumers: list[nn.Module]
    kept: list[bool]
    between: list[nn.Module] = field(default_factory=list)


@dataclass
class Observation:
    """What the forward did with the watched modules, in the order of their calls, and what it returned."""

    shared: list[SharedInput]
    products: list[Product]
    result: list[Tensor]


def observe(
    watched: Iterable[nn.Module],
    target: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: Iterable[nn.Module] = (),
    training: bool = False,
) -> Observation:
    """Run `target(*args, **kwargs)` once and tell which of the `watched` modules share an input, and who made it.

    sources: modules whose output is to be followed. training: run it in training mode, where dropout comes between
    what is one tensor in evaluation. Raises whatever the forward raises, with everything put back.
    """
    wanted, makers = set(watched), set(sources)
    calls: list[Call] = []
    stack: list[tuple[nn.Module, int]] = []
    pending: list[Call | None] = []
    count = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal count
        call = None
        watched_one = stack and (module in wanted or module in makers)
        if watched_one and len(inputs) == 1 and not keywords and type(inputs[0]) is Tensor:
            call = Call(module, tuple(stack), inputs[0])
            if module in wanted:
                calls.append(call)
        count += 1
        stack.append((module, count))
        pending.append(call)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()
        call = pending.pop()
        if call is not None and type(output) is Tensor:
            call.out = output
            if module in makers:
                products.follow(call)

    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor without storage
            saved.add(_memory(tensor))
        return tensor.detach()  # the tensor itself would close a cycle around a node that saves its own result

    handles = []
    products = _Products()
    try:
        for module in target.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
            products if makers else contextlib.nullcontext(),
        ):
            result = run_quietly(target, args, kwargs, training)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(_shared(calls, saved), _products(calls, products, saved), result)


class _Products(TorchFunctionMode):
    """Notes which tensor is a followed one times another of its shape; holds what it notes, so that ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, tuple[Call, bool]] = {}
        self.tensors: list[Tensor] = []

    def follow(self, call: Call) -> None:
        """The call's output is followed from now on."""
        assert call.out is not None
        if call.out.shape == call.x.shape and call.out is not call.x:
            self.makers[id(call.out)] = (call, False)
            self.tensors.append(call.out)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MULTIPLY and len(args) == 2 and not kwargs:
            for a, b in (args, args[::-1]):
                found = self.makers.get(id(a))
                if found is not None and not found[1] and type(b) is Tensor and b.shape == a.shape:
                    self.makers[id(result)] = (found[0], True)
                    self.tensors.append(result)
                    break
        return result


def _products(calls: list[Call], products: _Products, saved: set[int]) -> list[Product]:
    consumers: dict[tuple[nn.Module, bool], list[Call]] = {}
    makers: dict[tuple[nn.Module, bool], Call] = {}
    for call, gated in products.makers.values():
        makers.setdefault((call.module, gated), call)
    seen: set[nn.Module] = set()
    for call in calls:
        found = products.makers.get(id(call.x))
        if found is None or call.module in seen:
            continue
        key = (found[0].module, found[1])
        if makers[key] is found[0]:  # of a module called several times, the first call tells
            seen.add(call.module)
            consumers.setdefault(key, []).append(call)
    result = []
    for key, maker in makers.items():
        used = consumers.get(key, [])
        paths = [maker.path, *(call.path for call in used)]
        common = _common(paths)
        between = {module: None for path in paths for module, _ in path[common:]}
        kept = [call.out is not None and _memory(call.out) in saved for call in used]
        result.append(Product(key[0], maker.x, key[1], [call.module for call in used], kept, list(between)))
    return result


def _common(paths: list[Path]) -> int:
    """How many calls all paths have in common."""
    depth = 0
    while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return depth


def run_quietly(
    target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = False
) -> list[Tensor]:
    """The floating tensors of `target(*args, **kwargs)`, run in eval (or training) mode with everything put back."""
    meta = any(p.is_meta for p in target.parameters())
    with untouched(target, training), torch.enable_grad(), LiveMemory() if meta else contextlib.nullcontext():
        return detached(target(*args, **kwargs))


def _memory(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor, on the meta device too, where there is no address."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def _shared(calls: list[Call], saved: set[int]) -> list[SharedInput]:
    sets: dict[tuple[int, int], list[Call]] = {}
    for call in calls:
        sets.setdefault((call.path[-1][1], id(call.x)), []).append(call)
    shared: list[SharedInput] = []
    seen: set[nn.Module] = set()
    for members in sets.values():
        unique = {call.module: call for call in members if call.module not in seen}
        if len(unique) > 1:
            seen.update(unique)
            kept = [c.out is not None and _memory(c.out) in saved for c in unique.values()]
            shared.append(SharedInput(members[0].caller, list(unique), kept))
    return shared


@contextlib.contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Eval (or training) mode within; flags, buffers and the random state of CPU and GPU as they were afterwards."""
    changed = [module for module in model.modules() if module.training is not training]
    buffers = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.numel() * buffer.element_size() <= BUFFER_BYTES and not buffer.is_meta:
                buffers.append((module, name, buffer, buffer.clone()))
    devices = {p.device for p in model.parameters() if p.is_cuda}
    cpu, gpu = torch.get_rng_state(), [(device, torch.cuda.get_rng_state(device)) for device in devices]
    try:
        for module in changed:
            module.training = training
        yield
    finally:
        for module in changed:
            module.training = not training
        for module, name, buffer, value in buffers:
            with torch.no_grad():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            module._buffers[name] = buffer
        torch.set_rng_state(cpu)
        for device, state in gpu:
            torch.cuda.set_rng_state(state, device)


def detached(result: Any) -> list[Tensor]:
    """Every floating tensor in a model's output, in order, without its graph."""
    if isinstance(result, Tensor):
        return [result.detach().clone()] if result.is_floating_point() else []
    if isinstance(result, dict):
        return [t for value in result.values() for t in detached(value)]
    if isinstance(result, tuple | list):
        return [t for value in result for t in detached(value)]
    return []
