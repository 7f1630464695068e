"""One tiny forward, watched: which projections are handed the very same tensor by the same caller.

The forward runs in eval mode with everything put back afterwards: training flags, buffers, the random state. Autograd
is on, for it also tells which outputs the model's own code keeps for a backward; nothing is ever run backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Buffers above this many bytes (a quantised weight kept as a buffer) are not copied to be put back.
BUFFER_BYTES = 1 << 24


@dataclass
class Call:
    """One call of a watched module."""

    module: nn.Module
    caller: nn.Module
    x: Tensor
    frame: int  # which call of the caller
    out: Tensor | None = None


@dataclass
class Observation:
    """Sets of modules with one input, in the order in which they were called, and what the forward returned."""

    shared: list[SharedInput]
    result: list[Tensor]


@dataclass
class SharedInput:
    """Modules that one call of `caller` handed the same tensor."""

    caller: nn.Module
    modules: list[nn.Module]
    kept: list[bool]  # is each one's output kept for the backward by the code that uses it?


def observe(
    watched: Iterable[nn.Module], target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Observation:
    """Run `target(*args, **kwargs)` once and tell which of the `watched` modules share an input.

    Raises whatever the forward raises, with everything put back.
    """
    wanted = set(watched)
    calls: list[Call] = []
    stack: list[tuple[nn.Module, int]] = []
    pending: list[Call | None] = []
    count = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal count
        call = None
        if module in wanted and stack and len(inputs) == 1 and not keywords and type(inputs[0]) is Tensor:
            caller, frame = stack[-1]
            call = Call(module, caller, inputs[0], frame)
            calls.append(call)
        count += 1
        stack.append((module, count))
        pending.append(call)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()
        call = pending.pop()
        if call is not None and isinstance(output, Tensor):
            call.out = output

    saved: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor without storage
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor.detach()  # the tensor itself would close a cycle around a node that saves its own result

    handles = []
    try:
        for module in target.modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            result = run_quietly(target, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(_shared(calls, saved), result)


def run_quietly(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating tensors of `target(*args, **kwargs)`, run in eval mode with everything put back."""
    with untouched(target), torch.enable_grad():
        return detached(target(*args, **kwargs))


def _shared(calls: list[Call], saved: set[int]) -> list[SharedInput]:
    sets: dict[tuple[int, int], list[Call]] = {}
    for call in calls:
        sets.setdefault((call.frame, id(call.x)), []).append(call)
    shared: list[SharedInput] = []
    seen: set[nn.Module] = set()
    for members in sets.values():
        unique = {call.module: call for call in members if call.module not in seen}
        if len(unique) > 1:
            seen.update(unique)
            kept = [c.out is not None and c.out.untyped_storage().data_ptr() in saved for c in unique.values()]
            shared.append(SharedInput(members[0].caller, list(unique), kept))
    return shared


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode within; training flags, buffers and the random state of CPU and GPU as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    buffers = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.numel() * buffer.element_size() <= BUFFER_BYTES and not buffer.is_meta:
                buffers.append((module, name, buffer, buffer.clone()))
    devices = {p.device for p in model.parameters() if p.is_cuda}
    cpu, gpu = torch.get_rng_state(), [(device, torch.cuda.get_rng_state(device)) for device in devices]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
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
