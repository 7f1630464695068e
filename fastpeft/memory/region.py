"""One call of a layer, of which the backward keeps little and makes the rest again.

Like `torch.utils.checkpoint` without re-entrance: hooks on saved tensors hand autograd a ticket in place of each
tensor, and the first ticket that the backward presents runs the layer a second time to make them all. Unlike there,
the second run does only what those tensors depend on (see `trace`), and what a mode keeps is kept through autograd's
own saved tensors: other hooks (counting, offloading) see it, a later write to it is noticed.

Randomness: the generators' states of the forward are restored for the second run and put back afterwards, so dropout
repeats to the bit and nothing else notices. Autocast is as it was. A backward through a retained graph runs it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import modes
from .offload import Store
from .trace import Changed, Record, Recorder, Replay, storage_key


class _Enough(Exception):
    """All that was asked for has been made again."""


class _Hold(torch.autograd.Function):
    """Keeps tensors as autograd keeps them: its node's `saved_tensors`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing is computed from what only holds tensors")


def _hold(tensors: list[Tensor]) -> Any:
    anchor = torch.empty(0, requires_grad=True)
    return _Hold.apply(anchor, *(t.detach() for t in tensors)).grad_fn


class _Ticket:
    """What autograd holds in place of a saved tensor."""

    __slots__ = ("index", "region")

    def __init__(self, region: Region, index: int) -> None:
        self.region = region
        self.index = index


def run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, store: Store | None) -> Any:
    """fn(*args, **kwargs), keeping for the backward what `mode` keeps. store: where "offload" puts the input."""
    return Region(fn, mode, store).forward(args, kwargs)


class Region:
    """The call, from its forward to the end of its backward."""

    def __init__(self, fn: Callable[..., Any], mode: str, store: Store | None) -> None:
        self._fn = fn
        self._mode = mode
        self._store = store
        self._tickets: list[
            int | None
        ] = []  # for each saved tensor in order: its ticket, or None if it was let through
        self._count = 0
        self._wanted: set[int] = set()
        self._found: dict[int, Tensor] = {}

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, self._spec = tree_flatten((args, kwargs))
        inputs = [t for t in leaves if isinstance(t, Tensor)]
        self._leaves = [None if isinstance(t, Tensor) else t for t in leaves]
        self._slots = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        self._asks = [t.requires_grad for t in inputs]
        self._inputs = {storage_key(t) for t in inputs}
        for t in inputs:
            if t.requires_grad:
                # Its gradient comes when the layer's backward is over. What nobody asked for by then (a node that never
                # runs saved it) would stay to the end of the whole backward, of every layer.
                t.register_hook(_clearing(self._found))
                break
        self._devices = sorted({t.device.index for t in inputs if t.is_cuda})
        self._types = {t.device.type for t in inputs} - {"meta"} or {"cpu"}
        self._random = _random_state(self._devices)
        self._autocast = _autocast_state(self._types)
        recorder = Recorder(modes.candidate if self._mode in ("selective", "mlp") else lambda *_: False)
        self._recorder: Recorder | None = recorder
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack), recorder:
                result = self._fn(*args, **kwargs)
            if self._count:
                self._close(recorder, inputs)
        finally:
            recorder.forget()  # else a cycle through the graph that nothing collects
            self._recorder = None
        return result

    def _close(self, recorder: Recorder, inputs: list[Tensor]) -> None:
        first = next((t for t in inputs if t.is_floating_point()), inputs[0] if inputs else torch.empty(0))
        record = recorder.close(self._wanted, lambda ops: modes.keeps(self._mode, ops, first.numel()))
        if any(record.writes_to(value) for value in recorder.foreign(self._inputs)):
            raise RuntimeError(
                "this layer changes its input in place, so it cannot be computed again: give it checkpoint mode 'none'"
            )
        self._record: Record = record
        offload = self._store.hooks() if self._store is not None else contextlib.nullcontext()
        with torch.enable_grad():
            with offload:
                self._held_inputs = _hold(inputs)
            self._held = _hold(record.kept)
        record.kept = []

    def _pack(self, t: Tensor) -> Any:
        recorder = self._recorder
        assert recorder is not None
        value = recorder.value_of(t)
        if value is None and not recorder.opaque and storage_key(t) not in self._inputs:
            self._tickets.append(None)  # a parameter, or something that lives anyway
            return t
        if value is not None:
            self._wanted.add(value)
        self._tickets.append(self._count)
        self._count += 1
        return _Ticket(self, self._count - 1)

    def _unpack(self, packed: Any) -> Tensor:
        return packed.region.tensor(packed.index) if isinstance(packed, _Ticket) else packed

    def tensor(self, index: int) -> Tensor:
        """The saved tensor of a ticket, made again if need be. It is handed out once."""
        if index not in self._found:
            self._recompute()
        return self._found.pop(index)

    def _recompute(self) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._found.clear)  # type: ignore[attr-defined]
        inputs = [t.detach().requires_grad_(asks) for t, asks in zip(self._held_inputs.saved_tensors, self._asks)]
        try:
            self._second_run(inputs, Replay(self._record, self._held.saved_tensors))
        except Changed:
            # Python took another way (a cache that was empty then): all of it again, without the record.
            self._record.run = None
            self._second_run(inputs, Replay(self._record, ()))

    def _second_run(self, inputs: list[Tensor], replay: Replay) -> None:
        leaves = list(self._leaves)
        for slot, t in zip(self._slots, inputs):
            leaves[slot] = t
        args, kwargs = tree_unflatten(leaves, self._spec)
        self._found.clear()
        seen = 0

        def pack(t: Tensor) -> None:
            nonlocal seen
            if seen >= len(self._tickets):
                raise RuntimeError("the recomputation of this layer keeps other tensors than its forward did")
            ticket = self._tickets[seen]
            seen += 1
            if ticket is not None:
                replay.paused = True
                self._found[ticket] = t.detach()
                replay.paused = False
                if len(self._found) == self._count:
                    raise _Enough

        with contextlib.ExitStack() as stack:
            stack.enter_context(_with_random_state(self._random, self._devices))
            for autocast in self._autocast:
                stack.enter_context(torch.autocast(**autocast))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _never))
            stack.enter_context(replay)
            with contextlib.suppress(_Enough):
                self._fn(*args, **kwargs)
        if len(self._found) < self._count:
            raise RuntimeError(
                f"the recomputation of this layer made {len(self._found)} tensors for its backward, its forward "
                f"{self._count}: its code does not do the same twice; give it checkpoint mode 'none'"
            )


def _clearing(found: dict[int, Tensor]) -> Callable[[Tensor], None]:
    """A hook that empties `found`; it holds nothing else of the region, for its tensor may live long."""

    def clear(_: Tensor) -> None:
        found.clear()

    return clear


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing runs backward through a recomputation")


def _random_state(devices: list[int]) -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]


@contextlib.contextmanager
def _with_random_state(state: tuple[Tensor, list[Tensor]], devices: list[int]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        for device, one in zip(devices, state[1]):
            torch.cuda.set_rng_state(one, device)
        yield


def _autocast_state(types: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted(types)
        if torch.amp.is_autocast_available(kind)
    ]
