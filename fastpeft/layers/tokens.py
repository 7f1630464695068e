"""Training single tokens: some rows of an embedding, and of an output layer tied to it, in place of the whole table.

What is trained replaces the rows (it is not added to them), so that it means the same on a table whose new rows were
filled at random in another run. The table is never copied: the tokens' outputs are computed from the trained rows alone
and put in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.base import BaseTunerLayer, check_adapters_to_merge, embed_scale, in_out_features
from fastpeft.layers.buffers import BufferDict
from fastpeft.layers.wrappers import AuxiliaryTrainingWrapper


class TrainableTokensLayer(BaseTunerLayer, nn.Module):
    """An embedding (or a linear layer, when tied to one) with trained rows for each adapter's `token_indices`.

    tied_adapter: another such layer whose rows this one uses instead of having its own.
    """

    _peft_name: ClassVar[str] = "peft.tuners.trainable_tokens.layer.TrainableTokensLayer"

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")
    base_layer: Any
    trainable_tokens_delta: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, tied_adapter: Any = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters = []
        self._tied_adapter = [tied_adapter] if tied_adapter is not None else []  # in a list: not a submodule
        self._lookup: dict[tuple[str, ...], Tensor] = {}
        if tied_adapter is None:
            self.trainable_tokens_delta = nn.ParameterDict()
            self.trainable_tokens_original = BufferDict(persistent=False)
            self.token_indices: dict[str, list[int]] = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
            self.token_indices = tied_adapter.token_indices
        self.in_features, self.out_features = in_out_features(self.get_base_layer())

    @property
    def tied_adapter(self) -> Any:
        """The layer whose rows this one uses, or None."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def update_layer(self, adapter_name: str, token_indices: list[int], **kwargs: Any) -> None:
        """Give an adapter rows of its own, equal to those of the table. A tied layer follows the one it is tied to.

        Raises `ValueError` for an index that is not in the table or is given twice.
        """
        if self.tied_adapter is not None:
            return
        weight = self.base_layer.weight
        indices = list(token_indices)
        if len(set(indices)) < len(indices) or not all(-weight.shape[0] <= i < weight.shape[0] for i in indices):
            raise ValueError(
                f"trainable_token_indices: {indices} must be distinct rows of a table of {weight.shape[0]} tokens."
            )
        self.token_indices[adapter_name] = indices
        rows = weight[indices].detach()
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows.clone())
        self.trainable_tokens_original[adapter_name] = rows.clone()
        self._lookup.clear()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's rows."""
        super().delete_adapter(adapter_name)
        self._lookup.clear()

    # Merging

    def _check_overlapping_tokens(self, adapter_names: Iterable[str]) -> None:
        """Raise `ValueError` if two of these adapters, or one and a merged one, train the same token."""
        seen: set[int] = set()
        for name in dict.fromkeys([*self.merged_adapters, *adapter_names]):
            indices = {i % self.base_layer.weight.shape[0] for i in self.token_indices[name]}
            if seen & indices:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    "behavior. Only disjunct token indices are currently supported."
                )
            seen |= indices

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows of the adapters (default: the active ones) into the table.

        Raises `ValueError` if they overlap, or with `safe_merge` if they are not finite; the table is as before then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.token_indices]
        self._check_overlapping_tokens(names)
        if not names:
            return
        merged = self._with_rows(self.base_layer.weight.data, names)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self.base_layer.weight.data = merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write the original rows back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.base_layer.weight.data
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight[self.token_indices[name]] = self.trainable_tokens_original[name].to(weight)

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """The table with the adapters' rows in it, a new tensor, differentiable in the rows."""
        return self._with_rows(self.base_layer.weight, [name for name in active_adapters if name in self.token_indices])

    def _with_rows(self, weight: Tensor, names: list[str]) -> Tensor:
        for name in names:
            index = torch.tensor(self.token_indices[name], device=weight.device) % weight.shape[0]
            weight = weight.index_copy(0, index, self.trainable_tokens_delta[name].to(weight))
        return weight

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters' rows."""
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the rows of these adapters; raises `ValueError` if they overlap."""
        names = [name for name in active_adapters if name in self.token_indices]
        if self._disable_adapters or not names:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer
        if self.merged_adapters:
            return base(x, *args, **kwargs)
        self._check_overlapping_tokens(names)
        if isinstance(base, nn.Embedding):
            return self._embed(base, x, names)
        if isinstance(base, nn.Linear):
            rows = torch.cat([self.trainable_tokens_delta[name] for name in names]).to(base.weight.dtype)
            index = torch.tensor([i for name in names for i in self.token_indices[name]], device=x.device)
            index = index % base.weight.shape[0]
            own_bias = None if base.bias is None else base.bias[index]
            own = F.linear(x, rows, own_bias)
            return F.linear(x, base.weight, base.bias).index_copy_(-1, index, own)
        raise ValueError("TrainableTokensLayer wraps an unknown layer type, maybe you are targeting the wrong layer?")

    def _embed(self, base: Any, x: Tensor, names: list[str]) -> Tensor:
        scale = embed_scale(base)
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            y = F.embedding(
                x,
                self._with_rows(base.weight, names),
                base.padding_idx,
                base.max_norm,
                base.norm_type,
                base.scale_grad_by_freq,
                base.sparse,
            )
        else:
            place = self._places(names)[x]  # the row of the stacked deltas, or one past the last
            rows = torch.cat([self.trainable_tokens_delta[name] for name in names]).to(base.weight.dtype)
            trained = place < rows.shape[0]
            own = F.embedding(place.clamp_max(rows.shape[0] - 1), rows, self._padding_row(base, names))
            y = torch.where(trained.unsqueeze(-1), own, F.embedding(x, base.weight, base.padding_idx))
        return y if scale is None else y * scale.to(y.dtype)

    def _places(self, names: list[str]) -> Tensor:
        """(V,): for each token the row of the adapters' stacked rows that replaces it, or their number if none does."""
        key, weight = tuple(names), self.base_layer.weight
        lookup = self._lookup.get(key)
        if lookup is None or lookup.device != weight.device or lookup.shape[0] != weight.shape[0]:
            indices = [i % weight.shape[0] for name in names for i in self.token_indices[name]]
            lookup = torch.full((weight.shape[0],), len(indices), device=weight.device)
            lookup[indices] = torch.arange(len(indices), device=weight.device)
            self._lookup[key] = lookup
        return lookup

    def _padding_row(self, base: Any, names: list[str]) -> int | None:
        """Where the padding token is among the adapters' rows: it gets no gradient."""
        indices = [i % base.weight.shape[0] for name in names for i in self.token_indices[name]]
        return indices.index(base.padding_idx) if base.padding_idx in indices else None


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """The config's `trainable_token_indices`: an embedding with some rows trained, by a `TrainableTokensLayer` inside.

    One adapter is active at a time.
    """

    _peft_name: ClassVar[str] = "peft.utils.other.TrainableTokensWrapper"

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, token_indices: list[int], tied_adapter: Any = None
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)

    def init_modules(self, adapter_name: str, tied_adapter: Any = None, **kwargs: Any) -> None:
        """Make the layer inside, which takes the module over."""
        self.token_adapter = TrainableTokensLayer(self._modules.pop("original_module"), adapter_name, tied_adapter)  # type: ignore[arg-type]

    @property
    def original_module(self) -> Any:
        """The module wrapped; a property, so that it is in the state dict once."""
        return self.token_adapter.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            adapter = self.__dict__.get("_modules", {}).get("token_adapter")
            if adapter is None:
                raise
        if name == "weight" and not self.__dict__["_disable_adapters"] and self.active_adapters:
            return adapter.get_merged_weights(adapter.active_adapters)
        return getattr(adapter.base_layer, name)

    def _error_message_name(self) -> str:
        return "trainable_token_indices"

    def _forward_wrapped(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.token_adapter(x, *args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        return self.token_adapter.forward_adapters(x, [active_adapter])

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.token_adapter(*args, **kwargs)  # which knows what is off, and takes merged rows out

    def _get_available_adapters(self) -> set[str]:
        """The adapters that have rows."""
        return set(self.token_adapter.trainable_tokens_delta.keys())

    def update(self, adapter_name: str, token_indices: Any = None, **kwargs: Any) -> None:
        """Give the adapter rows, if it has none."""
        if adapter_name not in self._adapters:
            self.token_adapter.update_layer(adapter_name, token_indices=token_indices)
        super().update(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off."""
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of these adapters `set_adapter` would activate: the one that has rows here, or None.

        Raises `ValueError` for an empty list, and if several have some.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        here = [name for name in adapter_name if name in self.token_adapter.trainable_tokens_delta]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use this adapter's rows; they become trainable (unless `inference_mode`), the others frozen. []: none."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.token_adapter.set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete the adapter's rows and use those of the new active adapter, if it has some.

        The caller chooses the new one, so that it is the same on all layers. Raises `ValueError` for several.
        """
        if new_active_adapters and len(new_active_adapters) > 1:
            raise ValueError(
                f"Attempted to set multiple ({new_active_adapters}) adapters at once for {type(self).__name__}, which "
                "is not allowed."
            )
        layer = self.token_adapter
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
        layer.delete_adapter(adapter_name)
        self._adapters.discard(adapter_name)
        new = new_active_adapters[0] if new_active_adapters else None
        if new is None or new not in layer.trainable_tokens_delta:
            self._active_adapter = []
            layer._active_adapter = []
        else:
            self.set_adapter(new)

    # Saving and unloading

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{key in an adapter file: key in this module's state dict}; empty for a tied layer, or without the adapter."""
        if self.token_adapter.tied_adapter is not None or adapter_name not in self._adapters:
            return {}
        return {"token_adapter.trainable_tokens_delta": f"token_adapter.trainable_tokens_delta.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The adapter's entries of this module's state dict, under the keys of an adapter file."""
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module to put back in the model, with the adapters' rows written into it if `merge`."""
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.get_base_layer()
