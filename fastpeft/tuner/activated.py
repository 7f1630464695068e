"""Where activated LoRA (aLoRA) adapters work in a batch: found from the input ids, and told to the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..layers.activated import Offsets, find_offsets, offsets_for


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str | Sequence[str],
    input_ids: Tensor,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """For each row of input_ids (B, T), how far from its end the row's adapter begins to work.

    That is where the last occurrence of the adapter's invocation tokens begins. None: it does not work, because the
    tokens do not occur, or the adapter is no aLoRA adapter, or "__base__".

    Args:
        peft_config: adapter → config.
        active_adapter: the adapter of all rows; of several, the first that is an aLoRA adapter.
        input_ids: the tokens.
        adapter_names: one adapter for each row instead.
    """
    if input_ids is None:
        return []
    active = [active_adapter] if isinstance(active_adapter, str) else list(active_adapter)
    default = next((name for name in active if _invocation(peft_config, name)), active[0])
    names = [*(adapter_names or ())] + [default] * (len(input_ids) - len(adapter_names or ()))
    offsets: list[int | None] = [None] * len(input_ids)
    for name in dict.fromkeys(names):
        if name != "__base__" and name not in peft_config:
            warnings.warn(f"Adapter '{name}' not found in peft_config. Using base model for its rows.", stacklevel=2)
        tokens = _invocation(peft_config, name)
        if tokens:
            rows = [i for i, other in enumerate(names) if other == name]
            for row, offset in zip(rows, find_offsets(input_ids[rows], tokens)):
                offsets[row] = offset
    return offsets


def _invocation(peft_config: Mapping[str, Any], name: str) -> Sequence[int] | None:
    return getattr(peft_config.get(name), "alora_invocation_tokens", None)


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether an active adapter, or one of `adapter_names`, is an aLoRA adapter."""
    names = {*model.active_adapters, *(adapter_names or ())}
    return any(_invocation(model.peft_config, name) for name in names)


def get_alora_offsets_for_forward(
    model: Any, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """kwargs with `alora_offsets`, if the batch has aLoRA adapters and none were given."""
    names = kwargs.get("adapter_names")
    if kwargs.get("alora_offsets") is not None or not is_alora_relevant_in_batch(model, names):
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, names)}


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """kwargs with `alora_offsets`, if the batch has aLoRA adapters and none were given; args as of `generate`."""
    names = kwargs.get("adapter_names")
    if kwargs.get("alora_offsets") is not None or not is_alora_relevant_in_batch(model, names):
        return kwargs
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], Tensor):
        input_ids = args[0]
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
    elif input_ids.dim() == 1:
        input_ids = input_ids.unsqueeze(0)
    return {**kwargs, "alora_offsets": _offsets(model, input_ids, names)}


def _offsets(model: Any, input_ids: Tensor | None, adapter_names: Sequence[str] | None) -> Any:
    if input_ids is None:
        return None
    return calculate_alora_offsets(model.peft_config, model.active_adapter, input_ids, adapter_names)


@contextmanager
def activated_from(model: nn.Module, offsets: Offsets, num_beams: Any = None) -> Iterator[None]:
    """Let the model's aLoRA adapters work from these offsets on while the block runs.

    That holds for activation checkpointing too, which runs layers again after the block: what it calls is given the
    offsets it was first called with.

    Raises `ValueError` with beam search, which changes the order of the samples.
    """
    if isinstance(num_beams, int) and num_beams > 1:
        raise ValueError("Beam search not yet supported for aLoRA.")
    with ExitStack() as stack:
        stack.enter_context(offsets_for(offsets))
        if model.training:
            layers: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            for layer in layers:
                checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
                if checkpoint is not None:
                    layer._gradient_checkpointing_func = _carrying(checkpoint, offsets)
                    stack.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
        yield


def _carrying(checkpoint: Callable[..., Any], offsets: Offsets) -> Callable[..., Any]:
    """A checkpointing function that runs what it is given, now and again, with these offsets."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def with_offsets(*inner: Any, **named: Any) -> Any:
            with offsets_for(offsets):
                return function(*inner, **named)

        return checkpoint(with_offsets, *args, **kwargs)

    return run
