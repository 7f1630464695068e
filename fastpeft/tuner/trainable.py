"""What is trained beside the adapter, in wrappers: whole modules (`modules_to_save`), single tokens of an embedding."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.tokens import TrainableTokensWrapper
from ..layers.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .tied import embedding_name, names_tied_with_embedding
from .transaction import Undo, transaction
from .walk import wrappers

if TYPE_CHECKING:
    from ..configs import LoraConfig


def wrap_modules_to_save(model: nn.Module, config: LoraConfig, adapter_name: str, *, activate: bool) -> None:
    """Give the adapter its own copies of the modules that `modules_to_save` names (any name that ends with an entry).

    Args:
        activate: whether the adapter is active, so that its copies are the ones that run and are trained.

    Modules in `modules_to_tie` share the weight of the embedding's copy.
    """
    options: Any = {"inference_mode": config.inference_mode, "activate_adapter": activate}
    if config.modules_to_save:
        set_trainable(model, adapter_name, config.modules_to_save, **options)
    if config.modules_to_tie:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        source = embedding.modules_to_save[adapter_name]
        set_trainable(model, adapter_name, sorted(config.modules_to_tie), tied_module=source, **options)


def wrap_trainable_tokens(model: nn.Module, config: LoraConfig, adapter_name: str, *, activate: bool) -> None:
    """Give the adapter rows of its own for `trainable_token_indices`, and for the layers tied to the embedding.

    Raises:
        ValueError: a layer is in `modules_to_save` too, or is not in the model, or tied layers are to have different
            tokens with `ensure_weight_tying`.
    """
    indices = config.trainable_token_indices
    if indices is None:
        return
    targets = indices if isinstance(indices, dict) else {embedding_name(model): indices}
    for name in targets:
        if name in (config.modules_to_save or ()):
            raise ValueError(
                "The embedding layer is already marked to be trained fully, either specify "
                f'`modules_to_save=[..., "{name}", ...]` or `trainable_tokens={{"{name}": x}}` but not both.'
            )
    is_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    tied_targets = _tied_targets(model, targets) if is_tied and len(targets) > 1 else []
    differ = any(targets[name] != targets[tied_targets[0]] for name in tied_targets)
    if differ and config.ensure_weight_tying:
        conflict = ", ".join(f"{name}: {targets[name]}" for name in tied_targets)
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
            f"layers: {conflict}. Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    if config.ensure_weight_tying and not is_tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices.",
            stacklevel=2,
        )
    followers = set(names_tied_with_embedding(model)) if tied_targets and not differ else set()
    options: Any = {"inference_mode": config.inference_mode, "activate_adapter": activate}
    for name, tokens in targets.items():
        if name in tied_targets and name in followers:
            continue  # follows the embedding, below
        set_trainable(model, adapter_name, [name], wrapper=TrainableTokensWrapper, token_indices=tokens, **options)
    embedding = model.get_input_embeddings() if is_tied else None  # type: ignore[operator]
    if isinstance(embedding, TrainableTokensWrapper) and not differ:
        source = embedding.token_adapter
        set_trainable(
            model,
            adapter_name,
            names_tied_with_embedding(model),
            wrapper=TrainableTokensWrapper,
            token_indices=source.token_indices.get(adapter_name),
            tied_adapter=source,
            **options,
        )


def _tied_targets(model: Any, targets: Collection[str]) -> list[str]:
    """Those of the targets that name the input embedding or a module tied to it."""
    embedding, tied = embedding_name(model), names_tied_with_embedding(model)

    def is_one(name: str) -> bool:
        return embedding.endswith(name) or any(other.endswith(name) or name in other.split(".") for other in tied)

    return [name for name in targets if is_one(name)]


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Collection[str],
    inference_mode: bool,
    activate_adapter: bool = True,
    wrapper: type[AuxiliaryTrainingWrapper] = ModulesToSaveWrapper,
    **wrapper_options: Any,
) -> None:
    """Wrap every module whose name ends with one of `module_names`, or add the adapter to its wrapper.

    Args:
        wrapper: the class of the wrapper; `wrapper_options` go to it and to its `update`.

    Raises:
        ValueError: a name matches something inside an adapter (an adapter named like a module), or of the modules
            whose tokens are to be trained there is none.
        TypeError: a matching module cannot be wrapped (a container, or a layer that is adapted already).
    """
    endings = tuple(module_names)
    # duplicates stay in the list: a tied layer has to be replaced wherever it hangs
    keys = [key for key, _ in model.named_modules(remove_duplicate=False) if key.endswith(endings)]
    if not keys and module_names and wrapper is TrainableTokensWrapper:
        raise ValueError(
            f"Target modules {set(module_names)} not found in the base model. Please check the target modules and try "
            "again."
        )
    with transaction() as undo:
        for key in keys:
            _wrap(model, key, adapter_name, inference_mode, activate_adapter, undo, wrapper, wrapper_options)


def _wrap(
    model: nn.Module,
    key: str,
    adapter_name: str,
    inference_mode: bool,
    activate: bool,
    undo: Undo,
    wrapper_class: type[AuxiliaryTrainingWrapper],
    options: dict[str, Any],
) -> None:
    parent_key, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_key)
    grandparent = model.get_submodule(parent_key.rpartition(".")[0])
    target = model.get_submodule(key)
    if isinstance(grandparent, BaseTunerLayer):
        raise ValueError(
            f"You are trying to target a module with {wrapper_class} that is a child of {type(grandparent)}: {key!r}. "
            "This is almost certainly not the intended behavior. Please ensure that the adapter name, "
            f"{adapter_name!r}, does not conflict with any of the targeted modules."
        )
    wrapper: Any = next((m for m in (grandparent, target) if isinstance(m, wrapper_class)), None)
    if wrapper is not None:
        is_new = adapter_name not in wrapper._adapters
        wrapper.update(adapter_name, **options)
        if is_new:
            undo.push(lambda: wrapper.delete_adapter(adapter_name, new_active_adapters=wrapper.active_adapters))
        wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
        return
    if isinstance(parent, AuxiliaryTrainingWrapper):
        return  # part of a module that is wrapped as a whole
    wrapper = wrapper_class(target, adapter_name, **options)
    wrapper.set_adapter(adapter_name if activate else [], inference_mode=inference_mode)
    undo.replace_module(parent, name, wrapper)


def set_wrapper_adapter(model: nn.Module, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Let every wrapper run the copy of the given adapter, or the original module if it has none.

    Raises:
        ValueError: two of the adapters have a copy of the same module; nothing has been changed then.
    """
    chosen = [(wrapper, wrapper.check_set_adapter(adapter_names)) for wrapper in wrappers(model)]
    for wrapper, name in chosen:
        wrapper.set_adapter(name if name in wrapper._adapters else [], inference_mode=inference_mode)
