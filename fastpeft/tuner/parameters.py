"""`target_parameters`: adapters on parameters that are no module's `weight`, like the experts of an MoE layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.experts import ParamWrapper
from .walk import named_modules, submodule_and_parent

if TYPE_CHECKING:
    from ..configs import LoraConfig
    from .base import BaseTuner


def inject_parameters(
    tuner: BaseTuner, model: nn.Module, config: LoraConfig, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """Wrap the module of every parameter that `config.target_parameters` names; return the parameters' names.

    An entry names a parameter by its full name or by the end of it after a dot. Several parameters of one module nest
    their wrappers in the order in which the module has them.

    Raises:
        ValueError: the parameter belongs to the model itself, or to a module that is adapted as a module.
    """
    if not config.target_parameters:
        return []
    from .inject import check_target_module_compatibility, creation_context

    names: list[str] = []
    for module_name, parameter_name, key in _matches(model, sorted(set(config.target_parameters))):
        target = _target(model, module_name, parameter_name)
        parent, _, target_name = submodule_and_parent(model, module_name)
        check_target_module_compatibility(model, target_name)
        with creation_context(low_cpu_mem_usage):
            tuner._create_and_replace(
                config, adapter_name, target, target_name, parent, current_key=key, parameter_name=parameter_name
            )
        names.append(key)
    return names


def _matches(model: nn.Module, targets: list[str]) -> list[tuple[str, str, str]]:
    """(name of the module, name of the parameter in it, full name without wrappers) of every targeted parameter."""
    suffixes = tuple(f".{target}" for target in targets)
    matches = []
    for module_name, module in list(named_modules(model)):
        if hasattr(module, "parametrizations"):  # the parameter itself is in `module.parametrizations` now
            for target in targets:
                owner, _, parameter_name = target.rpartition(".")
                if owner == module_name and getattr(module, parameter_name, None) is not None:
                    matches.append((module_name, parameter_name, target))
            continue
        plain_name = module_name.replace(".base_layer", "")
        for parameter_name, _ in module.named_parameters(recurse=False):
            key = f"{plain_name}.{parameter_name}"
            if key in targets or key.endswith(suffixes):
                matches.append((module_name, parameter_name, key))
    return matches


def _target(model: nn.Module, module_name: str, parameter_name: str) -> Any:
    """What to wrap: the module, the wrappers around it, or the wrapper that the parameter has already."""
    if not module_name:
        raise ValueError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{parameter_name}'): there "
            "is no parent in which the module could be replaced."
        )
    plain_name = module_name.replace(".base_layer", "")
    outermost = model.get_submodule(plain_name)
    if isinstance(outermost, BaseTunerLayer) and not isinstance(outermost, ParamWrapper):
        raise ValueError(
            f"Trying to wrap an `nn.Parameter` of layer '{plain_name}' of type {type(outermost).__name__}, which is "
            "not a valid target. Make sure that this layer is not also targeted with `target_modules`. For some "
            "models, PEFT will do this automatically, try setting `target_modules=[]` to prevent it."
        )
    wrapper: Any = outermost
    while isinstance(wrapper, ParamWrapper):
        if wrapper.parameter_name == parameter_name:
            return wrapper
        wrapper = wrapper.base_layer
    return model.get_submodule(module_name)
