"""A batch whose samples use different adapters: `model(x, adapter_names=["a", "b", "__base__"])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.lora import LoraLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper
from .walk import adapter_layers

if TYPE_CHECKING:
    from .base import BaseTuner


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]) -> Any:
    """Forward pre-hook of an adapter layer."""
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


@contextmanager
def per_sample_adapters(tuner: BaseTuner, adapter_names: Sequence[str], num_beams: Any = None) -> Iterator[None]:
    """Let every adapter layer use, for sample i, the adapter `adapter_names[i]`; `"__base__"` stands for none.

    With beam search the decoder sees each sample `num_beams` times in a row, the encoder sees it once.

    Raises:
        ValueError: the model is in training mode, or no layer has an adapter of a given name.
        TypeError: `adapter_names` is no list, with beam search.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers: list[Any] = [m for m in adapter_layers(tuner.model) if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
    known: set[str] = set()
    for layer in layers:
        if isinstance(layer, LoraLayer):
            known.update(layer.lora_A.keys(), layer.lora_embedding_A.keys())
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    names = adapter_names
    beam_search = isinstance(num_beams, int) and num_beams > 1
    in_encoder: set[int] = set()
    if beam_search:
        if not isinstance(adapter_names, list | tuple):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        names = [name for name in adapter_names for _ in range(num_beams)]
        encoder = _encoder(tuner.model)
        in_encoder = {id(m) for m in adapter_layers(encoder)} if encoder is not None else set()
    with ExitStack() as stack:
        for layer in layers:
            own = adapter_names if id(layer) in in_encoder else names
            hook = partial(_add_adapter_names, adapter_names=own)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model; Transformers' other models name themselves as theirs."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None  # type: ignore[operator]
    return None if encoder is model else encoder
