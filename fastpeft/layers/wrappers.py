"""Modules that are trained in full beside the adapters, a copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft._bridge_hook import Bridged
from fastpeft.layers.base import BaseTunerLayer, set_requires_grad


class AuxiliaryTrainingWrapper(Bridged, nn.Module):
    """Stands where `original_module` stood and forwards to it or to what an adapter trains in its place.

    Attributes that the wrapper does not have are those of the module in use, so that `wrapper.weight` works.
    Extra keyword arguments go to `init_modules` and `update`.
    """

    _peft_name: ClassVar[str] = "peft.utils.other.AuxiliaryTrainingWrapper"

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: list[str] = []

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)
        self.check_module()

    # What a wrapper supplies

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the containers that `update` fills."""
        raise NotImplementedError

    def _error_message_name(self) -> str:
        """What the user calls this wrapper: the config's option."""
        return "training wrapper"

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        """Whether `_getattr_wrapped` knows where to look for attributes."""
        return False

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        """The attribute `name` of the module in use."""
        raise NotImplementedError

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        """The output with the active adapter."""
        raise NotImplementedError

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """The output with one adapter, for some samples of a mixed batch."""
        raise NotImplementedError

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        """The output without any adapter."""
        return self.original_module(*args, **kwargs)

    # Adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are off; change it with `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter as it was set; change it with `set_adapter`."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter in a list, which may be empty."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    def check_module(self) -> None:
        """Raise `TypeError` if the module is one that cannot be called, or an adapter layer."""
        containers = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
        if isinstance(self.original_module, (*containers, BaseTunerLayer)):
            raise TypeError(
                f"{self._error_message_name()} cannot be applied to modules of type {type(self.original_module)}"
            )

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Let the module be trained with this adapter too."""
        self._adapters.add(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off."""
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; raises `ValueError` for one that the wrapper does not have."""
        if not isinstance(adapter_names, str):
            for name in adapter_names:
                self._require(name)
            adapter_names = list(adapter_names)
        self._active_adapter = adapter_names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Make what these adapters train here trainable or frozen."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for path in self.adapter_layer_names:
            container: Any = self
            for part in path.split("."):
                container = getattr(container, part)
            for name in names:
                if name in container:
                    set_requires_grad(container[name], requires_grad)

    def _require(self, adapter_name: str) -> None:
        if adapter_name not in self._adapters:
            raise ValueError(f"Adapter {adapter_name} not found in {self._adapters}")

    # Attributes and forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules")
            if modules is None or "original_module" not in modules:  # still in __init__
                raise
        if self.__dict__["_disable_adapters"] or not self.active_adapters:
            return getattr(modules["original_module"], name)
        if self._hasattr_wrapped(name, modules):
            return self._getattr_wrapped(name, modules)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ValueError` if `adapter_names` does not fit the input."""
        names = kwargs.get("adapter_names")
        if names is not None and args and len(args[0]) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(args[0])} respectively."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module in use; `adapter_names`: one adapter a sample instead ("__base__": the original module)."""
        self._check_forward_args(*args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self._disable_adapters or any(name not in self._adapters for name in self.active_adapters):
            return self._forward_wrapped_passthrough(*args, **kwargs)
        if adapter_names is None:
            return self._forward_wrapped(*args, **kwargs)
        return self._mixed_batch_forward(*args, adapter_names=adapter_names, **kwargs)

    def _mixed_batch_forward(self, input: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if not isinstance(self.original_module, _MIXABLE):
            names = ", ".join(module.__name__ for module in _MIXABLE)
            raise TypeError(f"Mixed batching is only supported for the following modules: {names}.")
        parts, order = [], []
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            order += rows
            if name == "__base__":
                parts.append(self.original_module(input[rows], *args, **kwargs))
            else:
                parts.append(self._forward_wrapped_mixed_batch(input[rows], name, *args, **kwargs))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(parts)[back]


_MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """The config's `modules_to_save`: each adapter trains and saves a copy of the module. One is active at a time.

    tied_module: share its weight instead of copying (an output layer tied to an embedding that is trained itself).
    """

    _peft_name: ClassVar[str] = "peft.utils.other.ModulesToSaveWrapper"

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the container of the copies."""
        self.modules_to_save = nn.ModuleDict()

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        return self.active_adapters[0] in modules["modules_to_save"]

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        return getattr(modules["modules_to_save"][self.active_adapters[0]], name)

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        return self.modules_to_save[self.active_adapters[0]](*args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        return self.modules_to_save[active_adapter](x, *args, **kwargs)

    def _get_available_adapters(self) -> set[str]:
        """The adapters that have a copy."""
        return set(self.modules_to_save.keys())

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        """Make the adapter's copy of the module, if it has none; the original is frozen."""
        super().update(adapter_name)
        if adapter_name not in self.modules_to_save:
            with self._gathered():
                self.modules_to_save[adapter_name] = self._copy(tied_module)
        self.original_module.requires_grad_(False)
        if adapter_name == self._active_adapter:
            set_requires_grad(self.modules_to_save[adapter_name], True)

    def _copy(self, tied_module: Any) -> nn.Module:
        if tied_module is not None and isinstance(self.original_module, nn.Embedding):
            return nn.Embedding(*tied_module.weight.shape, _weight=tied_module.weight)
        if tied_module is not None:
            linear = nn.Linear(*reversed(tied_module.weight.shape), bias=False)
            linear.weight = tied_module.weight
            return linear
        module = copy.deepcopy(self.original_module)
        if hasattr(module, "_hf_hook"):
            _renew_hook(module)
        return module

    def _gathered(self) -> Any:
        """Under DeepSpeed ZeRO-3 the original's parameters are elsewhere, and fetched for the copy."""
        for parameter in self.original_module.parameters():
            if parameter.numel() == 0 and hasattr(parameter, "ds_numel"):
                import deepspeed

                return deepspeed.zero.GatheredParameters(self.original_module.parameters(), modifier_rank=0)
        return nullcontext()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on (the active copy becomes trainable) or off (all copies are frozen)."""
        super().enable_adapters(enabled)
        names = self.active_adapters if enabled else list(self.modules_to_save)
        for name in names:
            set_requires_grad(self.modules_to_save[name], enabled)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of these adapters `set_adapter` would activate: the one that has a copy here, or None.

        Raises `ValueError` for an empty list, and if several have one.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        here = [name for name in adapter_name if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use this adapter's copy; it becomes trainable (unless `inference_mode`), the one before frozen. []: none.

        Raises `ValueError` for several adapters, and for one that the wrapper does not have.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save.")
        for name in names:
            self._require(name)
        for name in self.active_adapters:
            set_requires_grad(self.modules_to_save[name], False)
        for name in names:
            set_requires_grad(self.modules_to_save[name], not inference_mode)
        self._active_adapter = names[0] if names else []

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete the adapter's copy and use that of the new active adapter, if it has one.

        The caller chooses the new one, so that it is the same on all layers. Raises `ValueError` for several.
        """
        if adapter_name not in self.modules_to_save:
            return
        if new_active_adapters and len(new_active_adapters) > 1:
            raise ValueError(
                f"Attempted to set multiple ({new_active_adapters}) adapters at once for {type(self).__name__}, which "
                "is not allowed."
            )
        self._adapters.discard(adapter_name)
        new = new_active_adapters[0] if new_active_adapters else None
        if new is None or new not in self.modules_to_save:
            self._active_adapter = []
        elif self.active_adapters[:1] != [new]:
            self.set_adapter(new)
        del self.modules_to_save[adapter_name]

    # Saving and unloading

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key in an adapter file: key in this module's state dict}; empty if the adapter has no copy here."""
        if adapter_name not in self._adapters:
            return {}
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in self.modules_to_save[adapter_name].state_dict()}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The adapter's entries of this module's state dict, under the keys of an adapter file."""
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module to put back in the model: the active adapter's copy, or the original if none is active."""
        if not self.active_adapters:
            return self.original_module
        module: Any = self.modules_to_save[self.active_adapters[0]]
        if hasattr(module, "base_layer"):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.get_base_layer()
        return module


def _renew_hook(module: Any) -> None:
    """Give a copied module a hook of accelerate of its own, like the one that was copied with it."""
    import inspect

    import accelerate.hooks
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hook = module._hf_hook
    cls = getattr(accelerate.hooks, type(hook).__name__)
    names = inspect.signature(cls.__init__).parameters
    new = cls(**{key: value for key, value in vars(hook).items() if key in names})
    remove_hook_from_module(module)
    add_hook_to_module(module, new)
