"""What a model's layers keep, need and cost in each mode: counted by running them, once each kind of layer.

A layer is run alone, forward and backward, under `measure.LiveMemory`, on the device where the model is. On the meta
device nothing is computed, so that is how a model that is not there is counted (see `estimate`); on a real one the
inputs of the layers come from one forward of the model without a graph.

Which moments of a step can be its peak:

    the forward of layer i      what layers before it keep, and what is alive within it at most
    the loss                    what all layers keep, and the head: logits, their gradient
    the backward of layer i     what layers up to it keep, what it makes again and the gradients that pass through it,
                                and the gradients of the parameters of the layers from it on
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..measure import LiveMemory
from ..measure.live import FusedOnMeta
from . import region
from .install import CheckpointForward, find_layers
from .modes import MODES

# What it costs, in FLOPs, to make a byte again without a product, and to send one away and fetch it back: about what a
# GPU of today computes while its memory, or its bus, moves one. Only plans are compared by it.
REMADE, SENT = 100, 1000


@dataclass(frozen=True)
class Cost:
    """Of one layer in one mode; bytes, and the FLOPs of products and of attention."""

    kept: int  # from the forward to the backward
    forward: int  # alive at most in the forward, beside what the layers before keep
    backward: int  # alive at most in the backward, beside kept and the parameters' gradients
    forward_flops: int
    backward_flops: int  # those of what is made again included
    attention_flops: int
    sent: int = 0  # bytes that leave the device and come back

    @property
    def flops(self) -> int:
        """Of all products, forward and backward."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Head:
    """Everything but the layers: embedding, final norm, output layer, loss."""

    kept: int
    forward: int
    backward: int
    flops: int


@dataclass
class Counts:
    """Of a model at a batch and a length."""

    layers: list[dict[str, Cost]]  # a layer's cost in each mode
    gradients: list[int]  # bytes of each layer's parameters' gradients
    head: Head
    head_gradients: int
    shared: int  # bytes alive through the step that belong to no layer: angles of the rotation, masks
    accumulate: bool = False  # all gradients are there already, and only a layer's own come besides

    def gradients_from(self, layer: int) -> int:
        """Bytes of gradients that a step has made when the backward of this layer is over."""
        if self.accumulate:
            return self.gradients[layer]
        return self.head_gradients + sum(self.gradients[layer:])

    def price(self, layer: int, mode: str) -> int:
        """What a mode costs over "none", in FLOPs (see REMADE and SENT)."""
        costs, plain = self.layers[layer][mode], self.layers[layer]["none"]
        again = costs.flops + costs.attention_flops - plain.flops - plain.attention_flops
        remade = max(0, plain.kept - costs.kept) if mode != "none" else 0
        return max(0, again) + REMADE * remade + SENT * costs.sent

    def moments(self, modes: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
        """(name, bytes kept then, other activation bytes alive then, gradient bytes) of each moment of a step."""
        costs = [layer[mode] for layer, mode in zip(self.layers, modes)]
        kept = self.shared
        for index, cost in enumerate(costs):
            yield f"the forward of layer {index}", kept, cost.forward, 0
            kept += cost.kept
        yield "the loss", kept, max(self.head.forward, self.head.backward), self.head_gradients
        for index in range(len(costs) - 1, -1, -1):
            yield f"the backward of layer {index}", kept, costs[index].backward, self.gradients_from(index)
            kept -= costs[index].kept

    def peak(self, modes: Sequence[str]) -> tuple[str, int, int, int]:
        """The moment at which most is alive: name, bytes kept, other activation bytes, gradient bytes."""
        return max(self.moments(modes), key=lambda m: m[1] + m[2] + m[3])

    def flops(self, modes: Sequence[str]) -> int:
        """Of a step's products."""
        return self.head.flops + sum(layer[mode].flops for layer, mode in zip(self.layers, modes))


def count(model: nn.Module, batch: dict[str, Any], modes: Sequence[str] = MODES, autocast: Any = None) -> Counts:
    """Count the model's layers in each of `modes` ("none" is always counted too) and its head, for `batch`.

    batch: keyword arguments of the model's forward; with labels the head includes the loss. The model must be in
    training mode. Gradients, buffers of the random generators and checkpointing are as before afterwards.
    autocast: a function that returns a context in which to run, or None.

    Raises ValueError where the model has no stack of layers.
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no stack of layers (an nn.ModuleList) to count")
    context = autocast or contextlib.nullcontext
    wanted = list(dict.fromkeys(["none", *modes]))
    with _untouched(model), context():
        calls, shared = _calls(model, [m for _, m in layers], batch)
        known: dict[Any, dict[str, Cost]] = {}
        counted = []
        for _, layer in layers:
            key = _kind(layer, calls[layer])
            if key not in known:
                known[key] = {mode: _count_layer(layer, calls[layer], mode) for mode in wanted}
            counted.append(known[key])
        head = _count_head(model, [m for _, m in layers], calls, batch)
    inside = {id(p) for _, layer in layers for p in layer.parameters()}
    gradients = [_gradient_bytes(layer.parameters()) for _, layer in layers]
    outside = _gradient_bytes(p for p in model.parameters() if id(p) not in inside)
    return Counts(counted, gradients, head, outside, shared)


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any  # with None in place of tensors, but for the first


class _Seen(Exception):
    """Every layer has been called."""


def _calls(model: nn.Module, layers: list[nn.Module], batch: dict[str, Any]) -> tuple[dict[nn.Module, _Call], int]:
    """The arguments of each layer, on one forward without a graph, in which layers pass their input on."""
    calls: dict[nn.Module, _Call] = {}
    first: dict[Any, Any] = {}  # a layer of each kind is run, to see what it returns

    def stand_in(layer: nn.Module, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            for name in ("past_key_values", "past_key_value", "layer_past"):
                if kwargs.get(name) is not None:
                    kwargs[name] = None
            key = (_kind(layer, None), len(args))
            if key not in first:
                first[key] = original(*args, **kwargs)
            result = first[key]
            calls[layer] = _Call(args, kwargs, _form(result))
            return _like(_form(result), args[0] if args else kwargs["hidden_states"])

        return forward

    with _replaced(layers, stand_in), torch.no_grad(), LiveMemory():
        model(**batch)
    missing = [layer for layer in layers if layer not in calls]
    if missing:
        raise ValueError(f"the model's forward calls only {len(calls)} of its {len(layers)} layers")
    inputs = {t.untyped_storage()._cdata: t for call in calls.values() for t in _others(call)}
    return calls, sum(t.untyped_storage().nbytes() for t in inputs.values())


def _others(call: _Call) -> list[Tensor]:
    """Tensor arguments but for the hidden states."""
    return [t for t in tree_leaves((call.args[1:], call.kwargs)) if isinstance(t, Tensor) and not _is_hidden(t, call)]


def _is_hidden(t: Tensor, call: _Call) -> bool:
    return t is (call.args[0] if call.args else call.kwargs.get("hidden_states"))


def _form(result: Any) -> Any:
    return "tensor" if isinstance(result, Tensor) else len(result)


def _like(form: Any, hidden: Tensor) -> Any:
    passed = hidden.view_as(hidden)
    return passed if form == "tensor" else (passed, *[None] * (form - 1))


def _count_layer(layer: nn.Module, call: _Call, mode: str) -> Cost:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    own = layer.__dict__.get("forward")
    plain = own.original if isinstance(own, CheckpointForward) else layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with FusedOnMeta():
            return plain(*args, **kwargs)

    hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
    leaf = hidden.detach().requires_grad_()
    with LiveMemory() as live, torch.enable_grad():
        x = leaf.clone()  # so that the input's memory counts if and only if it is kept
        size = x.untyped_storage().nbytes()
        args, kwargs = ((x, *call.args[1:]), call.kwargs) if call.args else ((), {**call.kwargs, "hidden_states": x})
        if mode == "none":
            result = forward(*args, **kwargs)
        else:  # what is sent away is not here: "offload" keeps what "block" keeps, less the input
            result = region.run(forward, args, dict(kwargs), "block" if mode == "offload" else mode, None)
        y = result if isinstance(result, Tensor) else result[0]
        outside = y.untyped_storage().nbytes()
        del x, args, kwargs, result
        forward_peak, forward_flops, kept = live.peak, live.product_flops, live.bytes - outside
        live.reset_peak()
        found = torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y), allow_unused=True)
        backward = max(0, live.peak - outside - kept - _gradient_bytes(parameters))
        del found, y
    sent = 0
    if mode == "offload":
        kept, sent, backward = kept - size, size, backward + size
    again = live.product_flops - forward_flops
    return Cost(kept, forward_peak, backward, forward_flops, again, live.attention_flops, sent)


def _count_head(
    model: nn.Module, layers: list[nn.Module], calls: dict[nn.Module, _Call], batch: dict[str, Any]
) -> Head:
    inside = {id(p) for layer in layers for p in layer.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]

    def stand_in(layer: nn.Module, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            # A frozen embedding has no graph; the loss needs one from the last layer's output on.
            return _like(calls[layer].output, hidden if hidden.requires_grad else hidden.detach().requires_grad_())

        return forward

    with _replaced(layers, stand_in), LiveMemory() as live, torch.enable_grad():
        output = model(**batch)
        loss = output if isinstance(output, Tensor) else output["loss"] if "loss" in output else output[0]
        del output
        kept, forward = live.bytes, live.peak
        live.reset_peak()
        before = [p.grad for p in parameters]
        loss.sum().backward()
        backward = live.peak - _gradient_bytes(parameters)
        for p, grad in zip(parameters, before):
            p.grad = grad
    return Head(kept, forward, max(0, backward), live.product_flops)


def _kind(layer: nn.Module, call: _Call | None) -> Any:
    """The same for layers that do the same on tensors of the same shapes."""
    inputs = (
        []
        if call is None
        else [
            (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in tree_leaves((call.args, call.kwargs))
        ]
    )
    modules = tuple((name, type(m), type(m.__dict__.get("forward"))) for name, m in layer.named_modules())
    parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    dropouts = tuple((m.p, m.training) for m in layer.modules() if isinstance(m, nn.Dropout))
    return (modules, parameters, dropouts, getattr(layer, "attention_type", None), tuple(inputs))


def _gradient_bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


@contextlib.contextmanager
def _replaced(layers: list[nn.Module], stand_in: Any) -> Iterator[None]:
    """Within, each layer's forward is `stand_in(layer, its forward)`."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = stand_in(layer, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The state of the random generators is as before afterwards."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        yield
