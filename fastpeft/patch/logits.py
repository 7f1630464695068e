"""Logits that are computed only if somebody looks at them; the loss of them is computed without.

What a causal model's own code does with its head's output is scale it, soft-cap it, cast it up, shift it, flatten it,
and hand it to `F.cross_entropy`. `Logits` notes all of that and answers the last with `linear_cross_entropy`, which
reads the hidden states. Any other use gets the real logits (see `deferred`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import linear_cross_entropy, lora_linear
from ..ops.backend import autocast_enabled
from ..ops.deferred import Deferred
from ..ops.philox import draw_seed
from .reading import Operands


@dataclass(frozen=True)
class Origin:
    """Where logits come from: post * tanh(scale * z), or scale * z, with z the head's output for these rows."""

    hidden: Tensor  # (..., K)
    operands: Operands
    seed: Tensor | None  # of the adapter's dropout mask
    scale: float = 1.0
    capped: bool = False
    post: float = 1.0

    def times(self, factor: float) -> Origin:
        """The origin of logits multiplied by a number."""
        if self.capped:
            return replace(self, post=self.post * factor)
        return replace(self, scale=self.scale * factor)


class Logits(Deferred):
    """The output of a head for hidden states, computed when it is looked at."""

    kept: ClassVar[dict[Callable[..., Any], Any]] = {}
    advice = 'call fastpeft.patch(model, loss="never")'

    origin: Origin

    @staticmethod
    def of(hidden: Tensor, operands: Operands) -> Any:
        """The logits of hidden states (..., K) by a head of these operands, in the modes of now."""
        weight, bias, A, B, _, p = operands
        seed = None
        if A is not None and p:
            compute, seed = _with_dropout(hidden, operands)
        else:
            compute = lambda: _head(hidden, operands)  # noqa: E731
        inputs = [t for t in (hidden, weight, bias, A, B) if t is not None]
        device = hidden.device
        dtype = torch.get_autocast_dtype(device.type) if autocast_enabled(device) else hidden.dtype
        logits = Logits(compute, (*hidden.shape[:-1], weight.shape[0]), dtype, device, inputs)
        logits.origin = Origin(hidden, operands, seed)
        return logits

    def _next(self, func: Any, args: Any, kwargs: Any, origin: Origin | None = None, **how: Any) -> Any:
        """`func(*args, **kwargs)`, deferred, and where it comes from."""
        result = self.derive(func, args, kwargs, **how)
        result.origin = self.origin if origin is None else origin
        return result


def _head(hidden: Tensor, operands: Operands) -> Tensor:
    weight, bias, A, B, scaling, p = operands
    if A is None or B is None:
        return F.linear(hidden, weight, bias)
    return lora_linear(hidden, weight, bias, A, B, scaling, p)


def _with_dropout(hidden: Tensor, operands: Operands) -> tuple[Callable[[], Tensor], Tensor]:
    """What computes the logits later, and the seed of the mask they have: drawn now, as the layer draws it."""
    device = hidden.device
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    seed = draw_seed(device)

    def compute() -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
            return _head(hidden, operands)

    return compute, seed


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _multiplied(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    logits, factor = args if isinstance(args[0], Logits) else (args[1], args[0])
    if not logits.pending or not _number(factor):
        return NotImplemented
    return logits._next(func, args, kwargs, logits.origin.times(factor))


def _divided(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or kwargs or not isinstance(args[0], Logits):
        return NotImplemented
    logits, divisor = args
    if not logits.pending or not _number(divisor) or divisor == 0:
        return NotImplemented
    return logits._next(func, args, kwargs, logits.origin.times(1.0 / divisor))


def _tanh(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not args[0].pending or args[0].origin.capped:
        return NotImplemented
    return args[0]._next(func, args, kwargs, replace(args[0].origin, capped=True))


def _cast(func: Any, args: Any, kwargs: Any) -> Any:
    """float(), double(), to(dtype): up; down would lose what the loss does not."""
    logits = args[0]
    if not isinstance(logits, Logits) or not logits.pending or kwargs.keys() - {"dtype", "memory_format"}:
        return NotImplemented
    wanted = [a for a in (*args[1:], kwargs.get("dtype")) if a is not None]
    dtype = torch.float32 if func is Tensor.float else wanted[0] if len(wanted) == 1 else None
    if not isinstance(dtype, torch.dtype) or torch.promote_types(dtype, logits.dtype) != dtype:
        return NotImplemented
    return logits._next(func, args, kwargs, dtype=dtype, is_view=dtype == logits.dtype)


def _same(is_view: bool, detached: bool = False) -> Any:
    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not args[0].pending:
            return NotImplemented
        return args[0]._next(func, args, kwargs, is_view=is_view, detached=detached)

    return handler


def _reshaped(func: Any, args: Any, kwargs: Any) -> Any:
    """view, reshape, flatten: where a row of logits stays a row."""
    logits = args[0]
    if not isinstance(logits, Logits) or not logits.pending:
        return NotImplemented
    shape = func(torch.empty((), device="meta").expand(logits.shape), *args[1:], **kwargs).shape
    if not shape or shape[-1] != logits.shape[-1] or 0 in shape:
        return NotImplemented
    hidden = logits.origin.hidden
    with torch.set_grad_enabled(logits.requires_grad):
        hidden = hidden.reshape(*shape[:-1], hidden.shape[-1])
    return logits._next(func, args, kwargs, replace(logits.origin, hidden=hidden), shape=shape, is_view=True)


def _indexed(func: Any, args: Any, kwargs: Any) -> Any:
    """Some of the rows, by slices and numbers."""
    logits, index = args
    if not isinstance(logits, Logits) or not logits.pending:
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is Ellipsis or isinstance(i, slice) or type(i) is int for i in index) or index.count(Ellipsis) > 1:
        return NotImplemented
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at = index.index(Ellipsis)
    whole = [slice(None)] * (logits.dim() - len(index) + 1)
    index = (*index[:at], *whole, *index[at + 1 :])
    last, V = index[-1], logits.shape[-1]
    if len(index) != logits.dim() or not isinstance(last, slice) or last.indices(V) != (0, V, 1):
        return NotImplemented
    with torch.set_grad_enabled(logits.requires_grad):
        hidden = logits.origin.hidden[index[:-1]]
    origin = replace(logits.origin, hidden=hidden)
    return logits._next(func, args, kwargs, origin, shape=(*hidden.shape[:-1], V), is_view=True)


def _loss(func: Any, args: Any, kwargs: Any) -> Any:
    """F.cross_entropy of logits (N, V) with indices."""
    return _cross_entropy(*args, **kwargs)


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    logits = input
    if (
        not isinstance(logits, Logits)
        or not logits.pending
        or (weight, size_average, reduce) != (None, None, None)
        or type(target) is not Tensor
        or target.dtype != torch.int64
        or target.device != logits.device
        or logits.dim() != 2
        or target.shape != logits.shape[:1]
        or logits.origin.post <= 0
    ):
        return NotImplemented
    origin, cell = logits.origin, logits._cell
    head_weight, bias, A, B, scaling, p = origin.operands
    logits.check()
    with torch.set_grad_enabled(logits.requires_grad and torch.is_grad_enabled()), cell._autocast():
        loss = linear_cross_entropy(
            origin.hidden, head_weight, target, bias, A, B, scaling, p,
            logit_scale=origin.scale * origin.post, softcap=origin.post if origin.capped else None,
            label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction, seed=origin.seed,
        )  # fmt: skip
    logits.consume()
    return loss.to(logits.dtype)


def _methods(*names: str) -> list[Any]:
    return [getattr(of, name) for name in names for of in (Tensor, torch) if hasattr(of, name)]


Logits.kept |= {
    **dict.fromkeys(_methods("mul", "multiply", "__mul__", "__rmul__"), _multiplied),
    **dict.fromkeys(_methods("div", "divide", "true_divide", "__truediv__"), _divided),
    **dict.fromkeys(_methods("tanh"), _tanh),
    **dict.fromkeys([Tensor.float, Tensor.to], _cast),
    **dict.fromkeys([Tensor.contiguous], _same(is_view=True)),
    **dict.fromkeys(_methods("clone"), _same(is_view=False)),
    **dict.fromkeys(_methods("detach"), _same(is_view=True, detached=True)),
    **dict.fromkeys(_methods("view", "reshape", "flatten"), _reshaped),
    Tensor.__getitem__: _indexed,
    F.cross_entropy: _loss,
}
