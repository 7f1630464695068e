"""What every adapter layer has: a base layer, adapters by name, which of them are active, merged or off."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft._bridge_hook import Bridged
from fastpeft.errors import PeftWarning


class BaseTunerLayer(Bridged):
    """A mixin for `nn.Module`s that stand where a base layer stood and add adapters to it.

    The weights live in containers (`nn.ModuleDict`, `nn.ParameterDict`) keyed by adapter, named in
    `adapter_layer_names`; further per-adapter state in dicts named in `other_param_names`. Names are PEFT's:
    Transformers, TRL and diffusers read them.
    """

    _peft_name: ClassVar[str] = "peft.tuners.tuners_utils.BaseTunerLayer"

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    _modules: dict[str, nn.Module | None]
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str] = []
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}  # adapter -> its containers that are never trained
    cast_input_dtype_enabled: bool = True  # False: whoever calls has cast the input (diffusers' layerwise casting)

    # The base layer

    def get_base_layer(self) -> Any:
        """The innermost base layer, below any adapter layers stacked on one another."""
        layer: Any = self
        while "base_layer" in layer._modules:
            layer = layer._modules["base_layer"]
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models read `self.wo.weight` to learn a dtype."""
        base = self.get_base_layer()
        return base.qweight if hasattr(base, "qweight") else base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.get_base_layer().bias

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        """Where the adapter belongs and in which dtype, by the base layer's weight; None where that is unknown."""
        for name in ("weight", "qweight"):
            weight = getattr(base_layer, name, None)
            if weight is not None:
                return weight.device, getattr(base_layer, "compute_dtype", weight.dtype)
        return None, None

    # Adapters: which there are, which are active

    @property
    def merged(self) -> bool:
        """Whether some adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are off; change it with `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter(s) as they were set; change them with `set_adapter`."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters; some may not be on this layer."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def _containers(self) -> Iterator[Any]:
        for name in self.adapter_layer_names:
            yield self._modules[name] if name in self._modules else getattr(self, name)

    def _get_available_adapters(self) -> set[str]:
        """The adapters that have weights on this layer."""
        return {name for container in self._containers() for name in container.keys()}  # noqa: SIM118

    def _all_available_adapter_names(self) -> list[str]:
        """The adapters that have weights or other state on this layer, sorted."""
        states = [getattr(self, name) for name in self.adapter_layer_names + self.other_param_names]
        return sorted({name for state in states if hasattr(state, "keys") for name in state.keys()})  # noqa: SIM118

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and no others; they become trainable (unless `inference_mode`), the others frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for container in self._containers():
            for name, item in container.items():
                set_requires_grad(item, name in names and not inference_mode)
        self._freeze_what_is_not_trained(names)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Make the weights of these adapters trainable or frozen."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for container in self._containers():
            for name in names:
                if name in container:
                    set_requires_grad(container[name], requires_grad)
        self._freeze_what_is_not_trained(names)

    def _freeze_what_is_not_trained(self, adapter_names: Iterable[str]) -> None:
        """Freeze again those weights of the adapters that their method does not train."""
        if self.frozen_peft_weight_names:
            for adapter in adapter_names:
                for name in self.frozen_peft_weight_names.get(adapter, ()):
                    container = getattr(self, name)
                    if adapter in container:
                        set_requires_grad(container[adapter], False)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on (the active ones become trainable) or off (all are frozen)."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for container in self._containers():
                for item in container.values():
                    set_requires_grad(item, False)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others by name is activated."""
        for name in self.adapter_layer_names + self.other_param_names:
            state = getattr(self, name)
            if adapter_name in state:
                del state[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        remaining = self._all_available_adapter_names()
        if not active and remaining:
            active = remaining[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
        self.set_adapter(active)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; see the subclass."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again; see the subclass."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's effect is an addition to the weight, so that a LoRA adapter can stand for it."""
        return False

    # Placement and dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter's weights to the base layer's device and, if that is a floating one, its dtype.

        Weights on the meta device are left: they are placed when a checkpoint is loaded into them.
        """
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device or base_device
        if device is None:
            return
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            dtype = None
        for name in self.adapter_layer_names + self.other_param_names:
            container = self._modules.get(name)
            if container is not None and adapter_name in container:  # type: ignore[operator]
                _move(container, adapter_name, device, dtype)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """x in the adapter's dtype, unless casting is switched off; None stays None."""
        if x is None or x.dtype == dtype or not self.cast_input_dtype_enabled:
            return x
        return x.to(dtype)


def set_requires_grad(item: nn.Module | Tensor, requires_grad: bool) -> None:
    """Make a module's parameters, or a tensor, trainable or frozen; non-leaf tensors (sharded views) are left."""
    if isinstance(item, Tensor):
        if item.is_leaf:
            item.requires_grad_(requires_grad)
    elif item._modules:
        for parameter in item.parameters():
            if parameter.is_leaf:
                parameter.requires_grad_(requires_grad)
    else:  # the usual case, without the generator chain of parameters()
        for p in item._parameters.values():
            if p is not None and p.requires_grad is not requires_grad and p.is_leaf:
                p.requires_grad_(requires_grad)


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters to merge: those given, or the active ones, without those merged already (warned about)."""
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = module.active_adapters if adapter_names is None else adapter_names
    if not module.merged:
        return names
    merged, names = module.merged_adapters, [name for name in names if name not in module.merged_adapters]
    if names:
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
            f"{','.join(names)}.",
            stacklevel=3,
        )
    else:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return names


def embed_scale(base_layer: Any) -> Tensor | None:
    """The factor by which some embeddings (Gemma's) multiply their output in forward, as a tensor of one element."""
    scale = getattr(base_layer, "embed_scale", None)
    if isinstance(scale, (int, float)):
        return torch.tensor(scale, device=base_layer.weight.device, dtype=base_layer.weight.dtype)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        warnings.warn(
            f"Found embed_scale attribute with shape {scale.shape}, expected scalar. Embedding scaling will not be "
            "applied to the adapter's output.",
            PeftWarning,
            stacklevel=3,
        )
        return None
    return scale if isinstance(scale, Tensor) else None


def in_out_features(module: Any) -> tuple[int | None, int | None]:
    """The widths of a layer's input and output; (None, None) with a warning where they are unknown."""
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise ValueError("Only same dim for query/key/value is supported as of now for MultiheadAttention.")
        return module.embed_dim, 3 * module.embed_dim
    if type(module).__name__ == "Conv1D":  # Transformers' linear layer that stores (in, out)
        return tuple(getattr(module.weight, "ds_shape", module.weight.shape))  # type: ignore[return-value]
    known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))
    for names in _FEATURE_NAMES:
        if hasattr(module, names[0]) and hasattr(module, names[1]):
            if not known:
                _warn_unknown(module)
            return getattr(module, names[0]), getattr(module, names[1])
    _warn_unknown(module)
    return None, None


_FEATURE_NAMES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
)


def _warn_unknown(module: nn.Module) -> None:
    warnings.warn(
        f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.", UserWarning, stacklevel=4
    )


def _move(container: Any, name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move container[name] as `Module.to` does, without its price where there is nothing to move."""
    item = container[name]
    if isinstance(item, Tensor):
        tensors = [item]
    elif item._modules:
        tensors = [*item.parameters(), *item.buffers()]
    else:
        tensors = [t for t in (*item._parameters.values(), *item._buffers.values()) if t is not None]
    for tensor in tensors:
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta or (tensor.device == device and tensor.dtype == target):
            continue
        if isinstance(item, nn.Module):
            item.to(device=device, dtype=dtype)
            return
        moved = tensor.detach().to(device, target)
        is_parameter = isinstance(tensor, nn.Parameter)
        container[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
