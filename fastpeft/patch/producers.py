"""Norms and activations: their forwards, alone or together with the projections that read what they produce.

A norm that feeds projections computes them in the same operator (`norm_linear`) and lays their outputs down in the
`Group`, where they wait for the model's code to call the projections with the norm's output. So does an activation
(`glu_linear`). A gated activation returns a `Gated` tensor, which waits to be multiplied: `act(gate) * up` is one
operator, whoever writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.deferred import Deferred, Handler
from ..ops.glu import NATIVE_ELEMENTS, glu
from ..ops.glu_linear import glu_linear
from ..ops.norm_linear import LayerNorm, RMSNorm, norm_linear
from .forwards import TENSORS, Forward, eager
from .group import Gathered, Group
from .recognise import ActivationSpec, NormSpec, Spec


class ProducerForward(Forward):
    """The forward of a module whose operator is known."""

    __slots__ = ("group", "spec")

    spec: Spec

    def __init__(self, module: nn.Module, spec: Spec) -> None:
        super().__init__(module)
        self.spec = spec
        self.group: Group | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.active and type(args[0]) in TENSORS:
            y = self.fused(args[0])
            if y is not None:
                return y
        return self.original(*args, **kwargs)

    def fused(self, x: Tensor) -> Tensor | None:
        """The operator's result; None where the module's own forward must run."""
        if x.dim() < 2 or not self.worth_it(x) or not eager():
            return None
        out = self.spec.out_dtype(self.module, x)
        parameters = self.spec.parameters(self.module)
        return None if out is None or parameters is None else self.produce(x, parameters, out)

    def worth_it(self, x: Tensor) -> bool:
        """x is large enough to be better off with the operator."""
        return x.numel() > NATIVE_ELEMENTS or (self.group is not None and self.group.probing)

    def produce(self, x: Tensor, parameters: tuple[Tensor | None, ...], out: torch.dtype) -> Tensor:
        """The result for x, and what belongs to it."""
        raise NotImplementedError

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.group, self.spec)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, self.group, self.spec = state


class NormForward(ProducerForward):
    """RMSNorm or LayerNorm, with the projections of its output where they are known."""

    __slots__ = ()

    spec: NormSpec

    def worth_it(self, x: Tensor) -> bool:
        # One operator instead of half a dozen even for a single token; with a graph, Function.apply costs as much.
        return not torch.is_grad_enabled() or super().worth_it(x)

    def produce(self, x: Tensor, parameters: tuple[Tensor | None, ...], out: torch.dtype) -> Tensor:
        spec, group = self.spec, self.group
        if group is not None:
            kind = LayerNorm if spec.layer else RMSNorm
            norm = kind(spec.eps, spec.offset, out)

            def compute(gathered: Gathered) -> tuple[Tensor, tuple[Tensor, ...]]:
                *lists, block, block_bias, m, told = gathered
                return norm_linear(
                    norm, x, parameters, *lists, stacked_weight=block, stacked_bias=block_bias, magnitudes=m, told=told
                )

            n = group.join(x, out, compute)
            if n is not None:
                return n
        return spec.apply(x, parameters, out)


class ActivationForward(ProducerForward):
    """An activation; gated: what it returns will be multiplied by another tensor first."""

    __slots__ = ("gated",)

    spec: ActivationSpec

    def __init__(self, module: nn.Module, spec: ActivationSpec, gated: bool) -> None:
        super().__init__(module, spec)
        self.gated = gated

    def produce(self, x: Tensor, parameters: tuple[Tensor | None, ...], out: torch.dtype) -> Tensor | None:  # type: ignore[override]
        if out is not x.dtype:
            return None
        if not self.gated:
            return self.multiply(x, None)
        if x.is_inference():
            return None
        original: Callable[..., Tensor] = self.original
        gated: Any = Gated(lambda: original(x), x.shape, x.dtype, x.device, (x,))
        gated.multiplied = (self, x)
        return gated

    def multiply(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """act(gate) * up (up None: act(gate)), and the projections of it where they are known."""
        act, group = self.spec.act, self.group
        if group is not None:

            def compute(gathered: Gathered) -> tuple[Tensor, tuple[Tensor, ...]]:
                *lists, block, block_bias, m, _ = gathered  # a rotary embedding reads no such output
                return glu_linear(gate, up, act, *lists, stacked_weight=block, stacked_bias=block_bias, magnitudes=m)

            h = group.join(gate, gate.dtype, compute)
            if h is not None:
                return h
        return glu(gate, up, act)

    def __getstate__(self) -> Any:
        return (super().__getstate__(), self.gated)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        self.gated = state[1]


class Gated(Deferred):
    """act(gate), waiting to be multiplied by `up`. Anything else that is done with it has the value itself."""

    advice: ClassVar[str] = "call fastpeft.patch(model, blocks='never')"

    multiplied: tuple[ActivationForward, Tensor]


def _multiply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    gated, up = args if isinstance(args[0], Gated) else args[::-1]
    if type(up) not in TENSORS or not gated.pending:
        return NotImplemented
    forward, gate = gated.multiplied
    if up.shape != gate.shape or up.dtype is not gate.dtype or up.device != gate.device or not forward.active:
        return NotImplemented
    gated.consume()
    return forward.multiply(gate, up)


_kept: dict[Callable[..., Any], Handler] = dict.fromkeys(
    (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), _multiply
)
Gated.kept = _kept
