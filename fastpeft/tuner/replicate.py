"""Making a model deeper by using layers more than once (`layer_replication`), each time with adapters of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from .transaction import transaction


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; with `share_weights` its parameters are the very same."""
    memo = {id(p): p for p in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, memo)  # type: ignore[arg-type]


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Replace the model's stack of layers by ranges of it: [[0, 4], [2, 5]] makes 0 1 2 3 2 3 4.

    The weights are shared, each layer that stands in several places being one set of parameters. Understood are stacks
    named `layers` (Llama), `encoder.layer` (BERT) and `h` (Falcon, GPT-2).

    Raises `ValueError` if no stack is found, or a range is not within it.
    """
    owner, name = _find_stack(model)
    layers: Any = getattr(owner, name)
    new = nn.ModuleList()
    for start, end in layer_map:
        if not 0 <= start < end <= len(layers):
            raise ValueError(f"layer_replication: [{start}, {end}] is no range of the model's {len(layers)} layers.")
        for i in range(start, end):
            layer = clone_module(layers[i], share_weights=True)
            for module in layer.modules():  # attention finds its part of the cache by this number
                if hasattr(module, "layer_idx"):
                    module.layer_idx = len(new)  # type: ignore[assignment]
            new.append(layer)
    config: Any = getattr(owner, "config", None) or getattr(model, "config", None)
    with transaction() as undo:
        undo.replace_module(owner, name, new)
        if hasattr(config, "num_hidden_layers"):
            before = config.num_hidden_layers
            undo.push(lambda: setattr(config, "num_hidden_layers", before))
            config.num_hidden_layers = len(new)
            if getattr(config, "layer_types", None):
                kinds = config.layer_types
                undo.push(lambda: setattr(config, "layer_types", kinds))
                config.layer_types = [kinds[i] for start, end in layer_map for i in range(start, end)]


def _find_stack(model: Any) -> tuple[Any, str]:
    """The module that holds the list of layers, and the list's name in it."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    model = getattr(model, "transformer", model)
    for path in ("layers", "encoder.layer", "h"):
        owner, _, name = path.rpartition(".")
        holder = getattr(model, owner, None) if owner else model
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    raise ValueError(
        "Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon compatible architectures."
    )
