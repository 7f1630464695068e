"""Tensors whose value is computed when somebody asks for it.

A `Deferred` stands for the result of a computation that may turn out not to be needed as it is: the logits that only
go into the loss, an activation that is only multiplied by something. It has the shape, dtype, device and place in the
graph of that result. A subclass names in `kept` the functions that it takes without a value (a scaling that it only
notes, the loss that it computes in another way); any other use computes the value, once, and goes on with it, an
ordinary tensor with an ordinary graph.

Three doors lead to the value:

* every function of torch in Python comes through `__torch_function__`;
* what C++ does below autograd (an `autograd.Function` that takes the tensor, DDP's reducer) comes through
  `__torch_dispatch__`; its gradient arrives at `_Edge`, which hands it to the value's graph;
* copying and pickling are functions of torch: what is copied or written is the value.

The computation runs as it would have run at once: in the grad and autocast mode of its time, from operands that must
not have changed since. Where they have, there is no right value any more, and a RuntimeError says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Deferred(Tensor):
    """The result of `compute()`, a tensor of this shape, dtype and device, not computed yet.

    inputs: the tensors that `compute` reads, trainable parameters included: gradients go to them, and they must be as
    they are until the value has been computed. None of them may be an inference tensor.
    """

    # What a subclass does without the value: handler(func, args, kwargs), which may return NotImplemented.
    kept: ClassVar[dict[Callable[..., Any], Handler]] = {}
    # What the user may do about it, in the errors raised.
    advice: ClassVar[str] = "call fastpeft.unpatch(model)"

    _cell: _Cell

    @staticmethod
    def __new__(
        cls,
        compute: Callable[..., Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        inputs: Sequence[Tensor],
        *,
        _parent: _Cell | None = None,
        _is_view: bool = False,
    ) -> Any:
        cell = _Cell(cls, compute, device.type, tuple(inputs), _parent, _is_view)

        def make() -> Any:
            made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
            made._cell = cell
            return made

        return _Edge.apply(cell, make, *cell.inputs) if cell.grad else make()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def value(self) -> Tensor:
        """The result itself, an ordinary tensor; computed at the first call.

        Raises RuntimeError if something it is computed from has changed since.
        """
        return self._cell.value()

    @property
    def pending(self) -> bool:
        """The value has not been computed, neither this one's nor that of one it derives from."""
        return self._cell.pending()

    def derive(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        is_view: bool = False,
        detached: bool = False,
    ) -> Any:
        """`func(*args, **kwargs)`, with this tensor among args, deferred in its turn.

        is_view: it shares this one's memory. detached: it has no graph.
        """

        def compute(source: Tensor) -> Any:
            return func(*(source if arg is self else arg for arg in args), **kwargs)

        with torch._C.DisableTorchFunctionSubclass():
            shape = self.shape if shape is None else shape
            dtype, device = dtype or self.dtype, self.device
        cell = self._cell
        with torch.set_grad_enabled(cell.grad and not detached and torch.is_grad_enabled()):
            return type(self)(compute, shape, dtype, device, cell.inputs, _parent=cell, _is_view=is_view)

    def check(self) -> None:
        """Raises RuntimeError if something the value is computed from has changed since."""
        cell = self._cell
        while cell.parent is not None:
            cell = cell.parent
        cell._check()

    def consume(self) -> None:
        """Note that a result was computed without the value, which therefore is not in that result's graph."""
        cell: _Cell | None = self._cell
        while cell is not None:
            cell.consumed, cell = True, cell.parent

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IDENTITY or (func in _METADATA and _all_pending(args)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _GRAD and args[0].pending:
            return None
        for kind in types:
            handler = kind.kept.get(func) if issubclass(kind, Deferred) else None
            if handler is not None:
                result = handler(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        if func is Tensor.register_hook and _only_waits(*args, **kwargs):
            return args[0]._cell.hooks.append(args[1])
        if func in _ASK_FOR_A_GRADIENT:
            tree_map_only(Deferred, _refuse_if_consumed, (args, kwargs))
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        below = _Cell.below_and_written if func._schema.is_mutable else _Cell.below
        args, kwargs = tree_map_only(Deferred, lambda t: below(t._cell), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Cell:
    """What is known about one deferred value: apart from the tensor, so that the graph may hold it without a cycle."""

    def __init__(
        self,
        kind: type[Deferred],
        compute: Callable[..., Tensor],
        device: str,
        inputs: tuple[Tensor, ...],
        parent: _Cell | None,
        is_view: bool,
    ) -> None:
        self.kind, self.compute, self.device, self.inputs = kind, compute, device, inputs
        self.parent, self.is_view = parent, is_view
        self.grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        self.autocast = _autocast(device)
        self.versions = [t._version for t in inputs] if parent is None else []
        self.trained = parent is None and any(t.requires_grad and t.is_leaf for t in inputs)
        self.steps = _STEPS.now() if self.trained else 0
        self.consumed = False
        self.hooks: list[Any] = []  # for the value, if it is computed
        self._value: Tensor | None = None
        self._version = 0  # of the value, when it was computed
        self._below: Tensor | None = None

    def pending(self) -> bool:
        return self._value is None and (self.parent is None or self.parent.pending())

    def value(self) -> Tensor:
        if self._value is None:
            with self._as_it_would_have_run():
                self._value = self._run(_Cell.value)
            for hook in self.hooks if self._value.requires_grad else ():
                self._value.register_hook(hook)
            self._version = self._value._version
        return self._value

    def below(self) -> Tensor:
        """The value for code below autograd, where no graph can be made."""
        if self._value is not None:
            return self._value.detach()
        if self._below is None:
            with torch.no_grad(), self._autocast():
                self._below = self._run(_Cell.below)
            if not self.grad:
                self._value, self._version = self._below, self._below._version
        return self._below

    def below_and_written(self) -> Tensor:
        if self.grad and self._value is None:
            raise RuntimeError(
                f"a {self.kind.__name__} tensor of fastpeft is written to from C++, where its graph cannot be made; "
                f"use its .value(), or {self.kind.advice}"
            )
        return self.below()

    def _run(self, kind: Callable[[_Cell], Tensor]) -> Tensor:
        if self.parent is None:
            self._check()
            return self.compute()
        return self.compute(self.parent._source(kind, self.is_view))

    def _source(self, kind: Callable[[_Cell], Tensor], for_view: bool) -> Tensor:
        """The value that something else is computed from: as it is for a view, as it was for a result of its own."""
        value = kind(self)
        if for_view or self._value is None or self._value._version == self._version:
            return value
        return self._run(kind)

    def _check(self) -> None:
        changed = [t._version for t in self.inputs] != self.versions
        if changed or (self.trained and _STEPS.since(self.steps, self.inputs)):
            what = "an operand was written to" if changed else "an optimizer has stepped"
            raise RuntimeError(
                f"a {self.kind.__name__} tensor of fastpeft is asked for its value too late: {what} since the forward "
                f"that returned it. Use the value before that (for example call .clone() on it); or {self.kind.advice}"
            )

    @contextlib.contextmanager
    def _as_it_would_have_run(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.set_grad_enabled(self.grad), self._autocast():
            yield

    def _autocast(self) -> Any:
        enabled, dtype = self.autocast
        if _autocast(self.device) == self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype, enabled=enabled)


def _autocast(device: str) -> tuple[bool, Any]:
    """Whether autocast is on for a device type, and its dtype; the meta device has none."""
    if device == "meta":
        return False, None
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class _Edge(torch.autograd.Function):
    """The place of a deferred tensor in the graph, for users that never ask for its value in Python."""

    @staticmethod
    def forward(ctx: Any, cell: _Cell, make: Callable[[], Deferred], *inputs: Tensor) -> Deferred:
        ctx.cell = cell
        ctx.save_for_backward(*inputs)  # counted among what the graph keeps
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cell = ctx.cell
        wanted = [t for t, needed in zip(cell.inputs, ctx.needs_input_grad[2:]) if needed]
        found = iter(
            torch.autograd.grad(
                cell.value(),
                wanted,
                gradient,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def _all_pending(args: tuple[Any, ...]) -> bool:
    return all(arg.pending for arg in args if isinstance(arg, Deferred))


def _only_waits(deferred: Any, hook: Any) -> bool:
    """FSDP2 puts a hook on every output, to see the backward begin; the loss that was computed without this tells it.

    Asked for the value it would make the logits, and gather nothing else by it.
    """
    fsdp = (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")
    return fsdp and isinstance(deferred, Deferred) and deferred.pending and deferred._cell.consumed


def _refuse_if_consumed(deferred: Deferred) -> None:
    if deferred._cell.consumed:
        raise RuntimeError(
            f"the gradient of a {type(deferred).__name__} tensor of fastpeft was asked for, but a result that depends "
            f"on it has been computed without it. To have its gradient, {type(deferred).advice}"
        )


class _Steps:
    """Which optimizers have stepped: fused ones write to parameters without a trace in the tensors' versions."""

    def __init__(self) -> None:
        self.count = 0
        self._last: WeakKeyDictionary[Optimizer, list[int]] = WeakKeyDictionary()
        self._last_of_the_gone = 0
        self._watching = False

    def now(self) -> int:
        """How many steps there have been; they are counted from the first call on."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._note)
        return self.count

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self.count += 1
        last = self._last.get(optimizer)
        if last is None:
            self._last[optimizer] = last = [0]
            finalize(optimizer, self._forget, last).atexit = False
        last[0] = self.count

    def _forget(self, last: list[int]) -> None:
        self._last_of_the_gone = max(self._last_of_the_gone, *last)  # what it stepped cannot be asked any more

    def since(self, count: int, tensors: Sequence[Tensor]) -> bool:
        """Whether one of the tensors may have been stepped after that count."""
        recent = [optimizer for optimizer, last in self._last.items() if last[0] > count]
        stepped = {id(p) for optimizer in recent for group in optimizer.param_groups for p in group["params"]}
        return self._last_of_the_gone > count or any(id(t) in stepped for t in tensors)


_STEPS = _Steps()

_GRAD = Tensor.grad.__get__  # type: ignore[union-attr]
_ASK_FOR_A_GRADIENT = {Tensor.retain_grad, Tensor.register_hook, torch.autograd.grad}
_IDENTITY = {Tensor.__hash__}

# Answered without the value. Each attribute is a getter to torch.
_METADATA: set[Callable[..., Any]] = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "itemsize", "nbytes",
            "output_nr", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_sparse_csr", "is_mkldnn",
            "is_quantized", "is_nested", "_base",
        )
    ),
    *(
        getattr(Tensor, name)
        for name in (
            "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
            "element_size", "is_floating_point", "is_complex", "is_signed", "is_inference", "get_device",
            "is_same_size", "__len__",
        )
    ),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
    torch.is_same_size,
}  # fmt: skip
