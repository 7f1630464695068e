"""Modules that are trained whole beside the adapter (`modules_to_save`): a copy per adapter, in a wrapper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .transaction import Undo, transaction
from .walk import wrappers

if TYPE_CHECKING:
    from ..configs import LoraConfig


def wrap_modules_to_save(model: nn.Module, config: LoraConfig, adapter_name: str, *, activate: bool) -> None:
    """Give the adapter its own copies of the modules that `modules_to_save` names (any name that ends with an entry).

    Args:
        activate: whether the adapter is active, so that its copies are the ones that run and are trained.
    """
    if config.modules_to_save:
        set_trainable(
            model,
            adapter_name,
            module_names=config.modules_to_save,
            inference_mode=config.inference_mode,
            activate_adapter=activate,
        )


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Collection[str],
    inference_mode: bool,
    activate_adapter: bool = True,
) -> None:
    """Wrap every module whose name ends with one of `module_names`, or add the adapter to its wrapper.

    Raises:
        ValueError: a name matches something inside an adapter (an adapter named like a module).
        TypeError: a matching module cannot be wrapped (a container, or a layer that is adapted already).
    """
    endings = tuple(module_names)
    # duplicates stay in the list: a tied layer has to be replaced wherever it hangs
    keys = [key for key, _ in model.named_modules(remove_duplicate=False) if key.endswith(endings)]
    with transaction() as undo:
        for key in keys:
            _wrap(model, key, adapter_name, inference_mode, activate_adapter, undo)


def _wrap(
    model: nn.Module,
    key: str,
    adapter_name: str,
    inference_mode: bool,
    activate: bool,
    undo: Undo,
) -> None:
    parent_key, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_key)
    grandparent = model.get_submodule(parent_key.rpartition(".")[0])
    target = model.get_submodule(key)
    if isinstance(grandparent, BaseTunerLayer):
        raise ValueError(
            f"modules_to_save={name!r} matches {key!r}, a part of an adapter layer ({type(grandparent).__name__}). "
            f"Please ensure that the adapter name, {adapter_name!r}, does not conflict with any of the targeted "
            "modules."
        )
    wrapper: Any = next((m for m in (grandparent, target) if isinstance(m, ModulesToSaveWrapper)), None)
    if wrapper is not None:
        is_new = adapter_name not in wrapper._adapters
        wrapper.update(adapter_name)
        if is_new:
            undo.push(lambda: wrapper.delete_adapter(adapter_name, new_active_adapters=wrapper.active_adapters))
        wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
        return
    if isinstance(parent, AuxiliaryTrainingWrapper):
        return  # part of a module that is wrapped as a whole
    wrapper = ModulesToSaveWrapper(target, adapter_name)
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
