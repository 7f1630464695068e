"""Preparing a (quantised) model for training adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Their half-precision parameters are parts of the quantised format, not norms to be trained in float32.
_KEEP_DTYPE = frozenset({"aqlm", "eetq", "gptq", "hqq", "torchao"})


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze the model, cast its 16-bit parameters to float32, and if it is quantised checkpoint its activations.

    The cast keeps the norms and the output layer in full precision, which quantised training needs. 4-bit weights and
    the parameters of formats that must keep theirs are left alone.

    Args:
        model: a Transformers model; changed in place and returned.
        use_gradient_checkpointing: switch on gradient checkpointing for a quantised model.
        gradient_checkpointing_kwargs: passed on to `model.gradient_checkpointing_enable`.
        auto_clear_cache: give the accelerator's memory that the cast set free back to the system.
    """
    method = getattr(model, "quantization_method", None)
    method = getattr(method, "value", method)
    keeps_dtype = method in _KEEP_DTYPE or getattr(model, "hqq_quantized", False)
    in_kbit = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    checkpointing = dict(gradient_checkpointing_kwargs or {})

    for parameter in model.parameters():
        parameter.requires_grad = False
    if not keeps_dtype:
        for parameter in model.parameters():
            is_half = parameter.dtype in (torch.float16, torch.bfloat16)
            if is_half and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    if (in_kbit or keeps_dtype) and use_gradient_checkpointing:
        if checkpointing.get("use_reentrant", True):
            require_input_gradients(model)  # re-entrant checkpointing gives no gradient where no input asks for one
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def require_input_gradients(model: Any) -> Callable[[], Any]:
    """Let the embedding's output require a gradient, so that it flows through checkpointed blocks that are frozen.

    Returns:
        A function that takes it back.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return model.disable_input_require_grads
    if hasattr(model, "get_input_embeddings"):

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.requires_grad_(True)

        return model.get_input_embeddings().register_forward_hook(hook).remove
    return lambda: None
