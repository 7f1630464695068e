"""Checkpointing on the layers of a model: instance attributes, taken off again by `remove`.

A layer is an element of the model's stack: what Transformers marks as such, else the modules of the largest ModuleList.
Only its `forward` is stood in for, so that hooks (FSDP2's, accelerate's) stay outside and run once a step. Where
Transformers' own gradient checkpointing is switched on as well, whatever its `use_reentrant`, a layer with a mode
here goes by the mode, and its own switch has no effect on it; one without is left to Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import modes, region
from .offload import Store

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class CheckpointForward:
    """What stands in a layer's `__dict__["forward"]`."""

    def __init__(self, module: nn.Module, mode: str, store: Store | None) -> None:
        self.module = module
        self.mode = mode
        self.store = store
        self.previous = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "none" or not (self.module.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        if not getattr(self.module, "_can_checkpoint_with_cache", False):
            for name in _CACHES:  # a second run would add to the cache a second time
                if kwargs.get(name) is not None:
                    kwargs[name] = None
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        if torch.compiler.is_compiling():
            # The compiler has one graph of both runs and shares what it likes; it takes products to keep, not hooks.
            run = self._unswitched
            if self.mode == "selective":
                return checkpoint(run, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)
            if self.mode == "mlp":
                return checkpoint(run, *args, use_reentrant=False, context_fn=_mlp_contexts, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return region.run(self._unswitched, args, kwargs, self.mode, self.store if self.mode == "offload" else None)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward as it was before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _unswitched(self, *args: Any, **kwargs: Any) -> Any:
        """The same without Transformers' own checkpointing inside."""
        own: Any = self.module.__dict__
        switched = own.get("gradient_checkpointing", False)
        if not switched:
            return self.original(*args, **kwargs)
        own["gradient_checkpointing"] = False
        try:
            return self.original(*args, **kwargs)
        finally:
            own["gradient_checkpointing"] = True

    @property
    def __wrapped__(self) -> Any:
        return self.previous or MethodType(type(self.module).forward, self.module)


def _keep_products(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = modes.is_product(func) or modes.is_attention(func)
    return CheckpointPolicy.PREFER_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)


def _mlp_contexts() -> Any:
    """As selective, up to the output projection of an attention; the compiler asks operator by operator, in order."""
    attended = projected = False

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        nonlocal attended, projected
        if modes.is_attention(func):
            attended, projected = True, False
            return CheckpointPolicy.PREFER_SAVE
        keep = modes.is_product(func) and not (attended and projected)
        projected = projected or (attended and keep and modes.candidate(func, args, context.op_output))
        return CheckpointPolicy.PREFER_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model's layers in order; empty where there is no stack of them.

    Layers inside layers are not listed.
    """
    marked = [(n, m) for n, m in model.named_modules() if "gradient_checkpointing" in _class_attributes(m) and n]
    marked = [(n, m) for n, m in marked if isinstance(getattr(type(m), "gradient_checkpointing", None), bool)]
    if marked:
        return list(_outermost(marked))
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in lists}
    if not lists:
        return []
    name = max(sizes, key=lambda n: sizes[n])
    stack = dict(lists)[name]
    return [(f"{name}.{key}" if name else key, m) for key, m in stack.named_children()]


def install(model: nn.Module, layer_modes: Sequence[str]) -> Store | None:
    """Give the layers their modes; returns the store of those that offload. Replaces what was installed before."""
    remove(model)
    layers = find_layers(model)
    store = Store() if "offload" in layer_modes else None
    for (_, layer), mode in zip(layers, layer_modes, strict=True):
        layer.__dict__["forward"] = CheckpointForward(layer, mode, store)
    return store


def remove(model: nn.Module) -> None:
    """Take checkpointing off the model's layers."""
    for module in model.modules():
        module.__dict__.pop("_fastpeft_plan", None)
        for key in ("forward", "_old_forward"):
            forward = module.__dict__.get(key)
            if isinstance(forward, CheckpointForward):
                if forward.previous is None and key == "forward":
                    del module.__dict__[key]
                else:
                    module.__dict__[key] = forward.__wrapped__


def installed(model: nn.Module) -> list[str]:
    """The modes of the model's layers; empty where none is installed."""
    found = [m.__dict__.get("forward") for _, m in find_layers(model)]
    return [f.mode for f in found if isinstance(f, CheckpointForward)]


def resolve(option: Any, count: int) -> list[str]:
    """A mode for each of `count` layers, from a mode, a list of them, or a dict of {layer: mode} with {"*": mode} for
    the rest ("none" where it is not given).

    Raises ValueError on a mode that is not known, a list of another length, a layer that is not there.
    """
    if isinstance(option, str):
        chosen = [option] * count
    elif isinstance(option, Mapping):
        chosen = [option.get("*", "none")] * count
        for key, mode in option.items():
            if key == "*":
                continue
            if not isinstance(key, int) or not -count <= key < count:
                raise ValueError(
                    f"patch: checkpoint names layer {key!r}; the model has layers 0 to {count - 1}, and '*'"
                )
            chosen[key] = mode
    elif isinstance(option, Sequence):
        chosen = list(option)
        if len(chosen) != count:
            raise ValueError(f"patch: checkpoint lists {len(chosen)} modes; the model has {count} layers")
    else:
        raise ValueError(f"patch: checkpoint must be a mode, a list or a dict of them, got {type(option).__name__}")
    for mode in chosen:
        if mode not in modes.MODES:
            raise ValueError(f"patch: checkpoint mode must be one of {', '.join(modes.MODES)}, got {mode!r}")
    return chosen


def _class_attributes(module: nn.Module) -> set[str]:
    return {name for cls in type(module).__mro__ for name in cls.__dict__}


def _outermost(found: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    names = [name for name, _ in found]
    for name, module in found:
        if not any(name.startswith(other + ".") for other in names):
            yield name, module
