"""Embeddings that share their weight with the output layer, and adapters on them."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from .constants import EMBEDDING_LAYER_NAMES

if TYPE_CHECKING:
    from ..configs import LoraConfig


def model_of(model: nn.Module) -> nn.Module:
    """The user's model inside a `PeftModel` or a tuner, or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # type: ignore[operator]
    return model.model if hasattr(model, "tuner_layer_cls") else model  # type: ignore[return-value]


def names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Names of the modules whose weight is the input embedding's, sorted; without the embedding itself."""
    model = model_of(model)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    keys = getattr(model, "_tied_weights_keys", None)
    if keys is None:
        return []
    if not isinstance(keys, dict):  # a list of parameter names says nothing about the source
        return sorted({name.rpartition(".")[0] for name in keys})
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
            "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
        )
    tied: dict[str, str] = {}  # name of the tied parameter → name of its source
    for prefix, module in model.named_modules():
        own = getattr(module, "_tied_weights_keys", None) or {}
        dot = f"{prefix}." if prefix else ""
        tied.update({f"{dot}{k}": f"{dot}{v}" for k, v in own.items()})
    of_embedding = {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    # an adapted module's weight has moved to `base_layer`; the keys still have the name from before
    now = {
        re.sub(r"(?<![^.])(base_layer|original_module|token_adapter)\.", "", name): name
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in of_embedding
    }
    names = {now.get(target, target) for target, source in tied.items() if source in now or source in now.values()}
    return sorted({name.rpartition(".")[0] for name in names})


def warn_if_tied(model: nn.Module, config: LoraConfig) -> None:
    """Warn about an adapter, or a copy in `modules_to_save`, on one of several layers that share a weight."""
    targets = config.target_modules
    if isinstance(targets, str):
        affected = any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        affected = any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in targets or ())
    affected = affected or any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in config.modules_to_save or ())
    if affected and names_tied_with_embedding(model):
        warnings.warn(
            "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` "
            "is not set to True. This can lead to complications, for example when merging the adapter or converting "
            "your model to formats other than safetensors. Check the discussion here: "
            "https://github.com/huggingface/peft/issues/2777",
            stacklevel=2,
        )


def warn_before_merge(targeted_module_names: list[str], tie_word_embeddings: bool) -> None:
    """Merging into one of two tied layers changes the other one too, or unties them."""
    tied_target_modules = [
        name for name in targeted_module_names if tie_word_embeddings and name.split(".")[-1] in EMBEDDING_LAYER_NAMES
    ]
    if tied_target_modules:
        warnings.warn(
            f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the adapter. "
            "This can lead to complications. You can opt to merge the adapter after cloning the weights (to untie the "
            "embeddings): load the model with `tie_word_embeddings=False`, copy the embedding's weight to the output "
            "layer, save the model and its config, and load it again.",
            stacklevel=2,
        )


def untie_config_after_merge(model: Any) -> None:
    """Set `tie_word_embeddings=False` if the two weights are no longer the same tensor."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    try:
        weights: list[Any] = [
            getattr(get(), "weight", None) for get in (model.get_input_embeddings, model.get_output_embeddings)
        ]
    except (AttributeError, NotImplementedError):
        return
    if all(w is not None for w in weights) and weights[0].data_ptr() != weights[1].data_ptr():
        config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. "
            "Setting `tie_word_embeddings=False` in the model config.",
            stacklevel=2,
        )
