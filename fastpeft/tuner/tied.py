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


def prepare_tied_layers(model: nn.Module, config: LoraConfig) -> None:
    """See to layers that share a weight and are adapted, or copied for `modules_to_save`.

    With `ensure_weight_tying` the config is changed so that the embedding is adapted (or copied) and the layers tied to
    it follow: they are in `modules_to_tie` or `target_modules_to_tie` then, and no longer among the others. Without, or
    where there is nothing to tie, there is a warning.
    """
    copied = any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in config.modules_to_save or ())
    targets = config.target_modules
    if isinstance(targets, str):
        adapted = any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
    else:
        adapted = any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in targets or ())
    if not config.ensure_weight_tying:
        if (copied or adapted) and names_tied_with_embedding(model):
            warnings.warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True. This can lead to complications, for example when merging "
                "the adapter or converting your model to formats other than safetensors. Check the discussion here: "
                "https://github.com/huggingface/peft/issues/2777",
                stacklevel=2,
            )
        return
    tied = names_tied_with_embedding(model)
    if not tied:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=2
        )
        return
    source = embedding_name(model)
    if copied:
        config.modules_to_tie = set(tied)
        config.modules_to_save = _without_tied([*(config.modules_to_save or ()), source], tied)
    elif adapted:
        config.target_modules_to_tie = set(tied)
        if isinstance(targets, str):
            config.target_modules = rf"(?:{targets}|^{re.escape(source)}$)"
        else:
            config.target_modules = set(_without_tied([*(targets or ()), source], tied))
    elif config.trainable_token_indices is None:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`",
            stacklevel=2,
        )


def embedding_name(model: Any, default: str = "embed_tokens") -> str:
    """The name of the model's input embedding."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((name for name, module in model.named_modules() if module is embedding), default)


def is_tied_target(config: Any, key: str) -> bool:
    """Whether the module named `key` is to follow the adapter of the embedding."""
    names = config.target_modules_to_tie or ()
    return key in names or any(key.endswith(f".{name}") for name in names)


def share_factors(embedding: Any, layer: Any, adapter_name: str, initialised: bool) -> None:
    """Let a layer tied to an embedding have the embedding's factors: its A is their B transposed, its B their A.

    The parameters of both share memory. If the layer's own were `initialised`, it is their values that both have.
    """
    A, B = embedding.lora_embedding_A[adapter_name], embedding.lora_embedding_B[adapter_name]
    if adapter_name in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name] = A, B
        return
    for factor, source in ((layer.lora_A[adapter_name], B), (layer.lora_B[adapter_name], A)):
        if initialised and not source.is_meta:  # PEFT fills the shared memory: the same numbers, in its order
            source.data.copy_(factor.weight.data.flatten().view(source.shape))
        factor.weight = nn.Parameter(source.data.t(), requires_grad=factor.weight.requires_grad)


def _without_tied(names: list[str], tied: list[str]) -> list[str]:
    """The names, each once, without those that match one of the tied modules."""
    matches = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in names]
    kept = [name for name, m in zip(names, matches) if not any(m.match(key) for key in tied)]
    return list(dict.fromkeys(kept))


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
