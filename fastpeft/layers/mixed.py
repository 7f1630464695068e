"""A batch whose samples use different adapters, as products over all adapters instead of a pass for each.

With adapters 1 … U in the batch, A their A's stacked and d(i) the adapter of sample i, two forms compute the same:

*wide*, of short samples: s = x Aᵀ for all adapters, (B, S, ΣR); what is not sample i's own is multiplied by zero, the
rest by its scaling; then s times all B's side by side. Two products whatever U is, and nothing is gathered.
*gathered*, of long samples: A[d(i)] and B[d(i)] are copied for each sample, and the products are batched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.plain import any_global_hook, bare, dropout_probability

if TYPE_CHECKING:
    from fastpeft.layers.lora import LoraLayer

# From this many rows a sample on, the copies of the gathered form cost less than the zeros of the wide one: measured
# with K and N from 576 to 2048 and 8 adapters of rank 16 or 64, on a CPU.
GATHER_ROWS = 16


def mixed_linear(layer: LoraLayer, x: Tensor, adapter_names: list[str]) -> Tensor | None:
    """The layer's output for x (B, …, K), sample i with adapter_names[i]; a name that the layer lacks means the base.

    None, with nothing computed, if an adapter is not two plain matrices, or dropout is on: then each goes its own way.
    """
    if any_global_hook():
        return None
    lora_A: Any = layer._modules["lora_A"]
    lora_B: Any = layer._modules["lora_B"]
    used: list[str] = []
    for name in dict.fromkeys(adapter_names):
        if name == "__base__" or name not in lora_A:
            continue
        A, B = lora_A[name], lora_B[name]
        if not (type(A) is type(B) is nn.Linear and bare(A) and bare(B)) or B.bias is not None:
            return None
        if dropout_probability(layer._modules["lora_dropout"][name]) or isinstance(layer.scaling[name], Tensor):  # type: ignore[index]
            return None
        used.append(name)

    result = layer.base_layer(x)
    if not used:
        return result
    As, Bs = [lora_A[name].weight for name in used], [lora_B[name].weight for name in used]
    dtype = As[0].dtype
    if any(w.dtype != dtype for w in (*As, *Bs)):
        dtype = max((w.dtype for w in (*As, *Bs)), key=lambda d: torch.finfo(d).bits)
        As, Bs = [w.to(dtype) for w in As], [w.to(dtype) for w in Bs]

    own = tuple(used.index(name) if name in used else -1 for name in adapter_names)
    ranks, scaling = tuple(a.shape[0] for a in As), tuple(layer.scaling[name] for name in used)
    rows = layer._cast_input_dtype(x, dtype).reshape(x.shape[0], -1, x.shape[-1])
    if rows.shape[1] < GATHER_ROWS:
        s = F.linear(rows, torch.cat(As))
        s = (s * _constant(_wide_scale, own, ranks, scaling, s)).flatten(0, 1)
        y = result.reshape(-1, result.shape[-1])
        stacked = torch.cat(Bs, dim=1).t()
        y = torch.addmm(y, s, stacked) if y.dtype == s.dtype else (y + s @ stacked).to(y.dtype)
    else:
        r, index = max(ranks), _constant(_row_of, own, ranks, scaling, rows)
        A = torch.stack([F.pad(a, (0, 0, 0, r - a.shape[0])) for a in As])[index]
        B = torch.stack([F.pad(b, (0, r - b.shape[1])) for b in Bs])[index]
        s = torch.bmm(rows, A.mT)
        s = s * _constant(_sample_scale, own, ranks, scaling, s)
        y = result.reshape(len(own), -1, result.shape[-1])
        y = torch.baddbmm(y, s, B.mT) if y.dtype == s.dtype else (y + torch.bmm(s, B.mT)).to(y.dtype)
    return y.view(result.shape)


def _wide_scale(own: tuple[int, ...], ranks: tuple[int, ...], scaling: tuple[float, ...]) -> Tensor:
    """(B, 1, ΣR): its adapter's scaling over a sample's own columns, zero over the others."""
    return torch.tensor([[[s if u == i else 0.0 for u, s in enumerate(scaling) for _ in range(ranks[u])]] for i in own])


def _row_of(own: tuple[int, ...], ranks: tuple[int, ...], scaling: tuple[float, ...]) -> Tensor:
    """(B,): where a sample's adapter is in the stack; anywhere for those without one."""
    return torch.tensor([max(i, 0) for i in own])


def _sample_scale(own: tuple[int, ...], ranks: tuple[int, ...], scaling: tuple[float, ...]) -> Tensor:
    """(B, 1, 1): a sample's scaling, zero for those without an adapter."""
    return torch.tensor([[[scaling[i] if i >= 0 else 0.0]] for i in own])


_constants: dict[Any, Tensor] = {}


def _constant(
    make: Any, own: tuple[int, ...], ranks: tuple[int, ...], scaling: tuple[float, ...], like: Tensor
) -> Tensor:
    """A small constant tensor on `like`'s device, remembered: it is the same for all layers and steps of a batch."""
    key = (make, own, ranks, scaling, like.device, like.dtype)
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = make(own, ranks, scaling)
            found = found.to(like.device, like.dtype if found.is_floating_point() else None)
        if not torch.compiler.is_compiling():
            if len(_constants) >= 256:
                _constants.clear()
            _constants[key] = found
    return found
