"""Layers whose weights Accelerate keeps elsewhere (CPU or disk) and brings in for each forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def onload(layer: Any) -> Iterator[None]:
    """Have the layer's weights in place inside the block, and what was changed there kept afterwards.

    A weight that came from disk stays in CPU memory then, since the file has the old value.
    """
    hooks: list[tuple[Any, Any]] = [
        (module, module._hf_hook)
        for name, module in layer.named_modules()
        if name and getattr(getattr(module, "_hf_hook", None), "offload", False)
    ]
    for module, hook in hooks:
        hook.pre_forward(module)
    yield
    base = getattr(layer, "base_layer", None)
    for module, hook in hooks:
        if base is not None and module is base:
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            hook.weights_map = {name: tensor.data.to("cpu") for name, tensor in tensors}
        hook.post_forward(module, torch.tensor([]))
