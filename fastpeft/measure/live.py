"""Bytes alive and products computed, counted operator by operator, on any device: the meta device too.

What an operator returns is alive until the last tensor on its storage is gone. Buffers inside an operator (a library's
workspace) are not seen. On the meta device nothing is computed; questions that code asks of values ("are all tokens
real?") are answered yes, as for a batch without padding, and attention is counted as the fused operator that a real
device would use, which keeps no scores.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward"}
_SDPA = torch.nn.functional.scaled_dot_product_attention


class LiveMemory(TorchDispatchMode):
    """Context manager. `bytes` is alive now of what was made within, `peak` the most since entry or `reset_peak()`.

    `product_flops` are those of matrix products and of fastpeft's products with weights and adapters,
    `attention_flops` those of fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.product_flops = 0
        self.attention_flops = 0
        self._known: set[int] = set()
        self._attention = FusedOnMeta()

    def __enter__(self) -> LiveMemory:
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def reset_peak(self) -> None:
        """Forget how much was alive before now."""
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") or kind.__torch_dispatch__ is not _PLAIN for kind in types):
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype is torch.bool else 1
        outputs = func(*args, **kwargs)
        self._count_flops(func, args, kwargs, outputs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(outputs):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        # The Python object of a storage lives as long as the storage.
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size

    def _count_flops(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "aten":
            if name.rstrip("_") in _PRODUCTS:  # in place or not
                count = flop_registry[getattr(torch.ops.aten, name.rstrip("_"))]
                self.product_flops += count(*args, **kwargs, out_val=outputs)
            elif name.startswith("_scaled_dot_product"):
                self.attention_flops += _attention_flops(name, args)
        elif namespace.startswith("fastpeft"):
            if name in ("attention", "attention_backward"):
                self.attention_flops += _attention_flops(name, args)
            else:
                self.product_flops += _own_flops(func, name, args)


def _attention_flops(name: str, args: Any) -> int:
    tensors = [a for a in args if isinstance(a, Tensor)]
    query, key = (tensors[1], tensors[2]) if "backward" in name else (tensors[0], tensors[1])
    once = 4 * query.numel() * key.shape[-2]  # scores, and their product with the values
    return once * 5 // 2 if "backward" in name else once  # five products in place of two


def _own_flops(func: Any, name: str, args: Any) -> int:
    """Of an operator of fastpeft: each row meets every element of each weight and adapter, in the backward twice."""
    if name in ("gemm", "gemm_"):
        a, b = args[:2] if name == "gemm" else args[1:3]
        return 2 * a.numel() * b.shape[1]
    if not any(part in name for part in ("lora", "linear", "shrink", "dora")):
        return 0
    given = {a.name: value for a, value in zip(func._schema.arguments, args)}
    factors = [given[key] for key in ("weight", "A", "B") if isinstance(given.get(key), Tensor)]
    rows = next((a.shape[:-1].numel() for a in args if isinstance(a, Tensor) and a.dim() >= 2), 0)
    twice = "backward" in name or given.get("products") is True  # the loss makes its logits and, with them, a gradient
    return (4 if twice else 2) * rows * sum(f.numel() for f in factors if f.dim() == 2)


class FusedOnMeta(TorchFunctionMode):
    """Attention on the meta device as the fused operator, where PyTorch itself would write the scores out.

    A backward called within is outside of it (PyTorch calls functions outside of the mode that sees them): what is to
    be run again there has to enter it itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and args and args[0].is_meta and torch.is_grad_enabled():
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype is torch.bool:  # as PyTorch does, and keeps
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


_PLAIN = Tensor.__torch_dispatch__
