"""A language model's loss without its logits: `linear_cross_entropy` in place of head, logits and cross-entropy.

A module that has output embeddings (Transformers' `get_output_embeddings`) and takes labels opens an extent while its
forward runs with labels. In it the head returns `Logits`, which the model's own code scales, shifts and flattens as
ever; when they come to `F.cross_entropy`, whoever calls it (the model's loss function, `nn.CrossEntropyLoss`, a
function of the user's), the loss is computed from the hidden states. They are also what the model returns: whoever
looks at them gets the real ones. Without labels nothing is different.

Before it is used, head and loss are compared with what they replace on random numbers against float64, and then the
model is run with labels, once each way, with and without `num_items_in_batch`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ..ops.backend import autocast_enabled
from ..ops.linear_rows import linear_few
from .forwards import Forward, eager, fits
from .inputs import NoInput, example_call
from .logits import Logits
from .observe import untouched
from .reading import Operands, Reading, Unsupported, check_base, hooks_of, is_tuner_layer, lora_library, read_lora
from .report import Row

LOSS_OPTIONS = ("auto", "never")
ROWS = 33
FACTOR = 2.0  # of the original's error against float64
_TENSORS = (Tensor, Parameter)
_BLOCK = 1 << 24  # elements of a weight that are converted to float64 at a time


class HeadForward(Forward):
    """The head's forward: `Logits` while its model runs with labels, else what it was."""

    __slots__ = ("leaf", "open", "reading", "used")

    def __init__(self, module: nn.Module, reading: Reading | None) -> None:
        """reading: of a head with LoRA; None for an nn.Linear."""
        super().__init__(module)
        self.reading = reading
        self.open: int | None = None  # the thread whose model is running with labels
        self.leaf = False  # verification: the hidden states are to be a leaf of the graph
        self.used: Tensor | None = None  # and which they were

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.leaf and args:
            self.used = args[0].detach().requires_grad_()
            args = (self.used, *args[1:])
        if self.open is not None and self.open == get_ident() and self.active and len(args) == 1 and not kwargs:
            logits = self.deferred(args[0])
            if logits is not None:
                return logits
        if len(args) == 1 and not kwargs and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = self.few(args[0])
            if y is not None:
                return y
        return self.original(*args, **kwargs)

    def few(self, hidden: Any) -> Tensor | None:
        """The logits of few tokens, as decoding wants them, by the product for those; None where that is not taken."""
        module, parameters = self.module, self.module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if (
            self.previous is not None
            or not self.active
            or type(module).forward is not nn.Linear.forward
            or type(hidden) not in _TENSORS
            or type(weight) not in _TENSORS
            or (bias is not None and type(bias) not in _TENSORS)
        ):
            return None
        return linear_few(hidden, weight, bias)  # type: ignore[arg-type]

    def deferred(self, hidden: Any) -> Logits | None:
        """The logits, not computed; None where the head's own forward must run."""
        module = self.module
        if module._backward_hooks or module._backward_pre_hooks:
            return None
        operands = self.operands()
        if operands is None or not fits(hidden, operands[0]) or hidden.dim() < 2 or hidden.is_inference():
            return None
        if any(t is not None and (t.device != hidden.device or t.is_inference()) for t in operands[:4]):
            return None
        return Logits.of(hidden, operands)

    def operands(self) -> Operands | None:
        """Weight, bias and adapter as they are now; None while the head's own forward must run."""
        if self.reading is not None:
            return self.reading.operands()
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        if type(weight) not in _TENSORS or (bias is not None and type(bias) not in _TENSORS):
            return None
        return (weight, bias, None, None, 0.0, 0.0)  # type: ignore[return-value]

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.reading is not None)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, adapted = state
        self.open, self.leaf, self.used, self.reading = None, False, None, None
        if adapted:
            try:
                self.reading = read_lora(self.module, ours=self)
            except Unsupported:
                self.active = False


class LossForward(Forward):
    """The forward of the model that owns the heads: with labels, the extent in which they return `Logits`."""

    __slots__ = ("heads", "place")

    def __init__(self, module: nn.Module, heads: list[HeadForward]) -> None:
        super().__init__(module)
        self.heads = heads
        self.place = _place_of_labels(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and self.place is not None and len(args) > self.place:
            labels = args[self.place]
        if labels is None or not self.active or not eager() or torch.is_inference_mode_enabled():
            return self.original(*args, **kwargs)
        before = [head.open for head in self.heads]
        for head in self.heads:
            head.open = get_ident()
        try:
            return self.original(*args, **kwargs)
        finally:
            for head, was in zip(self.heads, before):
                head.open = was

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.heads, self.place)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, self.heads, self.place = state


@dataclass
class Head:
    """A head that was found, and the models that call it."""

    name: str
    module: nn.Module
    owners: list[nn.Module]
    reading: Reading | None = None
    reason: str | None = None

    @property
    def kind(self) -> str:
        return f"head, {type(self.module).__name__}"


def find(root: nn.Module) -> list[Head]:
    """The heads of every module inside `root` that has output embeddings and takes labels."""
    names = {module: name for name, module in root.named_modules()}
    found: dict[nn.Module, Head] = {}
    for owner in root.modules():
        if not hasattr(type(owner), "get_output_embeddings") or _place_of_labels(owner) is None:
            continue
        with contextlib.suppress(Exception):  # the model's own code: some raise where they have none
            embeddings: Any = owner.get_output_embeddings()  # type: ignore[operator]
            for module in _layers(embeddings) if isinstance(embeddings, nn.Module) else ():
                if module in names:
                    found.setdefault(module, Head(names[module], module, [])).owners.append(owner)
    for head in found.values():
        try:
            head.reading = _read(head.module)
        except Unsupported as why:
            head.reason = str(why)
    return list(found.values())


def apply(root: nn.Module, example_inputs: Any, verify: bool) -> list[Row]:
    """Put the losses on the model; a row for each head. On an exception the caller calls `remove`."""
    heads = find(root)
    forwards: list[tuple[Head, HeadForward]] = []
    for head in heads:
        if head.reason is None:
            forward = HeadForward(head.module, head.reading)
            head.reason = verify_head(forward) if verify else None
            if head.reason is None:
                forwards.append((head, forward))
    owners: dict[nn.Module, list[HeadForward]] = {}
    for head, forward in forwards:
        head.module.__dict__["forward"] = forward
        for owner in head.owners:
            owners.setdefault(owner, []).append(forward)
    for owner, of_owner in owners.items():
        owner.__dict__["forward"] = LossForward(owner, of_owner)
    if forwards and verify:
        reason = _check_models(root, owners, example_inputs)
        if reason is not None:
            remove(root)
            for head, _ in forwards:
                head.reason = reason
    return [_row(head) for head in heads]


def remove(model: nn.Module) -> None:
    """Take off what `apply` put on; other forwards stay as they are."""
    for module in model.modules():
        for key in ("forward", "_old_forward"):
            forward = module.__dict__.get(key)
            if isinstance(forward, HeadForward | LossForward):
                forward.active = False
                if key == "_old_forward":
                    module.__dict__[key] = forward.__wrapped__
                elif forward.previous is None:
                    del module.__dict__[key]
                else:
                    module.__dict__[key] = forward.previous


def verify_head(forward: HeadForward) -> str | None:
    """Why the loss may not be computed without this head's logits, or None: tried on random numbers against float64."""
    operands = forward.operands()
    if operands is None:
        return "the head could not be read"
    weight = operands[0]
    generator = torch.Generator(weight.device).manual_seed(0)
    V, K = weight.shape
    h = torch.randn(ROWS, K, generator=generator, dtype=weight.dtype, device=weight.device)
    labels = torch.randint(V, (ROWS,), generator=generator, device=weight.device)
    labels[1] = -100
    found: list[list[Tensor]] = []
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False), _no_dropout(forward):
        try:
            for logits_of in (forward.deferred, forward.original):
                for reduction in ("none", "mean"):
                    x = h.clone().requires_grad_()
                    logits: Any = logits_of(x)
                    if logits is None:
                        return "the head could not be read"
                    loss = F.cross_entropy(logits.float(), labels, reduction=reduction)
                    if isinstance(logits, Logits) and not logits.pending:
                        return "the loss asked for the logits"
                    found.append([loss.detach(), *torch.autograd.grad(loss.sum(), x)])
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return f"it failed when tried: {type(error).__name__}: {error}"
        losses, dh = _exact(h, labels, operands)
    count = (labels >= 0).sum()
    exact = [[losses, dh], [losses.sum() / count, dh / count]]
    for ours, theirs, truths in zip(found[:2], found[2:], exact):
        for name, mine, other, truth in zip(("loss", "gradient of the hidden states"), ours, theirs, truths):
            error, allowed = (_distance(t, truth) for t in (mine, other))
            # A mean is one number: PyTorch's may happen to be exact.
            unit = torch.finfo(other.dtype).eps * (1 if truth.dim() else 4)
            if mine.dtype != other.dtype or not error <= max(FACTOR * allowed, unit):
                return f"{name}: relative error {error:.1e} against float64, the original's is {allowed:.1e}"
    return None


def _exact(h: Tensor, labels: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their sum in float64, a block of the vocabulary converted at a time."""
    weight, bias, A, B, scaling, _ = operands
    h64, V = h.double(), weight.shape[0]
    blocks = range(0, V, max(1, _BLOCK // weight.shape[1]))
    step = blocks.step

    def rows(j: int) -> Tensor:
        w = weight[j : j + step].detach().double()
        if A is not None and B is not None:
            w = w + scaling * B[j : j + step].detach().double() @ A.detach().double()
        return w

    z = torch.cat([h64 @ rows(j).T for j in blocks], 1)
    if bias is not None:
        z += bias.detach().double()
    z.requires_grad_()
    losses = F.cross_entropy(z, labels, reduction="none")
    (dz,) = torch.autograd.grad(losses.sum(), z)
    dh = torch.stack([dz[:, j : j + step] @ rows(j) for j in blocks]).sum(0)
    return losses.detach(), dh


@contextlib.contextmanager
def _no_dropout(forward: HeadForward) -> Iterator[None]:
    dropout = getattr(forward.reading, "dropout", None)
    before = dropout is not None and dropout.training
    if before:
        dropout.training = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            dropout.training = True  # type: ignore[union-attr]


def _check_models(root: nn.Module, owners: dict[nn.Module, list[HeadForward]], example_inputs: Any) -> str | None:
    """Run the models with labels as they were and as they are now: the same loss, the same gradient, no logits?"""
    try:
        target, args, kwargs = example_call(root, example_inputs)
    except NoInput as why:
        return f"the loss could not be tried: {why}; pass example_inputs="
    heads = [head for of_owner in owners.values() for head in of_owner]
    wrappers = [owner.__dict__["forward"] for owner in owners]
    calls = [kwargs]
    try:
        with untouched(target), torch.no_grad():
            if kwargs.get("labels") is None and not args:
                calls = [kwargs | {"labels": _labels(_first(target(**kwargs), "logits"))}]
        if not args and _takes_anything(target):
            calls.append(calls[0] | {"num_items_in_batch": 7})
        for call in calls:
            results = []
            for active in (False, True):
                for forward in wrappers:
                    forward.active = active
                with _leaves(heads), untouched(target), torch.enable_grad():
                    output = target(*args, **call)
                    results.append(_result(output, heads))
                logits = _first(output, "logits")
                if active and not (isinstance(logits, Logits) and logits.pending):
                    return "the model's own code uses the logits for more than the loss, or its loss is another"
            reason = _differ(*results)
            if reason is not None:
                return reason
    except Exception as error:  # whatever the model's own code raises: it is not ours to judge
        return f"the loss could not be tried: {type(error).__name__}: {error}"
    finally:
        for forward in wrappers:
            forward.active = True
    return None


@contextlib.contextmanager
def _leaves(heads: list[HeadForward]) -> Iterator[None]:
    for head in heads:
        head.leaf, head.used = True, None
    try:
        yield
    finally:
        for head in heads:
            head.leaf, head.used = False, None


def _result(output: Any, heads: list[HeadForward]) -> list[Tensor]:
    loss = _first(output, "loss")
    used = [head.used for head in heads if head.used is not None]
    return [loss.detach(), *torch.autograd.grad(loss, used)]


def _differ(theirs: list[Tensor], ours: list[Tensor]) -> str | None:
    if [(t.shape, t.dtype) for t in theirs] != [(t.shape, t.dtype) for t in ours]:
        return "the model returns another loss with it"
    # Head and loss have been compared strictly; this is for what the model does in between, misread by order 1.
    for a, b in zip(theirs, ours):
        exact = a.dtype in (torch.float32, torch.float64) and not autocast_enabled(a.device)
        limit = 1e-3 if exact else 5e-2
        apart = _distance(b, a.double())
        if not apart <= limit:
            return f"the model's loss differs by {apart:.1e} with it"
    return None


def _labels(logits: Tensor) -> Tensor:
    """Random labels for logits (..., V), one of them to be ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    labels.view(-1)[-1] = -100
    return labels.to(logits.device)


def _first(output: Any, name: str) -> Any:
    """A field of a model's output by its name, as ModelOutput has it."""
    value = output[name] if isinstance(output, dict) else getattr(output, name, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"the model's output has no {name}")
    return value


def _distance(value: Tensor, truth: Tensor) -> float:
    error = ((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def _place_of_labels(module: nn.Module) -> int | None:
    """The position of the argument `labels` of a module's forward, or None if it has none."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names.index("labels") if "labels" in names else None


def _takes_anything(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _layers(embeddings: nn.Module) -> Iterator[nn.Module]:
    """The linear layers inside: itself, or those of a wrapper that keeps a trained copy beside the original."""
    if isinstance(embeddings, nn.Linear) or is_tuner_layer(embeddings):
        yield embeddings
    else:
        for child in embeddings.children():
            yield from _layers(child)


def _read(module: nn.Module) -> Reading | None:
    if lora_library(module) is not None:
        own = module.__dict__.get("forward")
        return read_lora(module, ours=own if isinstance(own, Forward) else None)
    if is_tuner_layer(module):
        raise Unsupported(f"no fused form for a {type(module).__name__}")
    base = check_base(module)
    if type(base) is not nn.Linear:
        raise Unsupported(f"it is a {type(base).__name__}, not an nn.Linear")
    if any(hooks_of((base,))):
        raise Unsupported("other code has registered hooks on it")
    return None


def _row(head: Head) -> Row:
    if head.reason is not None:
        return Row(head.name, head.kind, reason=f"the loss is computed from its logits: {head.reason}")
    return Row(
        head.name,
        head.kind,
        "linear_cross_entropy",
        "with labels: the loss without the logits, which are there if looked at",
    )
