"""What each checkpointing mode keeps of a layer between the forward and the backward.

    none       everything that autograd asks for
    selective  the layer's input, the outputs of its matrix products and of its attention; norms, activations, rotations
               and products as thin as an adapter's second are made again
    mlp        of these, what the attention needs; gate and up are made again from the residual in the middle
    block      the layer's input
    offload    the layer's input, in host memory (on a CPU: in a file)

Modes differ in which operators' outputs are kept; everything else follows from the record of the layer's operators
(see `trace`). So they know nothing of architectures: the products of the MLP are those behind the last attention and
its output projection, whether they stand in a decoder of Llama's kind, beside the attention, or in fused kernels.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from .trace import Op

MODES = ("none", "selective", "mlp", "block", "offload")

# A product whose contraction is shorter than this share of its output's width costs less than keeping its output:
# an adapter's second product (r against N), not a projection (K / N is at least 1/5 in any MLP known).
THIN = 1 / 8

_ATEN_PRODUCTS = frozenset({"mm", "addmm", "_scaled_mm", "_int_mm", "_grouped_mm", "convolution"})
_BATCHED = frozenset({"bmm", "baddbmm"})


@functools.cache
def _name(func: Any) -> tuple[str, str]:
    namespace, _, name = func._schema.name.partition("::")
    return namespace, name


@functools.cache
def is_attention(func: Any) -> bool:
    """Scaled dot-product attention in one operator."""
    namespace, name = _name(func)
    return not name.endswith("backward") and (
        ("attention" in name and namespace in ("aten", "_flash_attn", "fastpeft", "fastpeft_reference"))
        or name in ("flex_attention", "_flash_attn_forward")
    )


@functools.cache
def is_product(func: Any) -> bool:
    """A matrix product with a weight, by the vendor's library or by an operator of fastpeft's."""
    namespace, name = _name(func)
    if namespace == "aten":
        return name in _ATEN_PRODUCTS
    if namespace.startswith("fastpeft"):
        return (name in ("gemm", "gemm_", "lora_shrink", "dora_drop_") or "linear" in name) and "backward" not in name
    return namespace == "bitsandbytes" and name.startswith(("gemv", "gemm", "int8_linear", "int8_scaled"))


def candidate(func: Any, args: tuple[Any, ...], outputs: Any) -> bool:
    """May a mode keep what this operator made?"""
    if is_attention(func):
        return True
    if is_product(func):
        return not _thin(func, args, outputs)
    # Products of a batch of matrices are attention written out, whose scores are quadratic in the length, or experts.
    return _name(func)[1] in _BATCHED and any(_is_weight(a) for a in args)


def _thin(func: Any, args: tuple[Any, ...], outputs: Any) -> bool:
    out = outputs if isinstance(outputs, Tensor) else next((t for t in outputs if isinstance(t, Tensor)), None)
    if out is None or out.dim() < 2:
        return False
    place = _place_of_x(func)
    if place is None:
        factors = [a for a in args if isinstance(a, Tensor) and a.dim() >= 2]
        x = factors[-2 if len(factors) > 1 else -1] if factors else None
    else:
        x = args[place]
    return x is not None and x.shape[-1] < THIN * out.shape[-1]


@functools.cache
def _place_of_x(func: Any) -> int | None:
    """Where an operator of fastpeft's takes the rows that it multiplies."""
    names = [argument.name for argument in func._schema.arguments]
    return names.index("x") if _name(func)[0].startswith("fastpeft") and "x" in names else None


def _is_weight(argument: Any) -> bool:
    base = getattr(argument, "_base", None)
    return isinstance(argument, Tensor) and (
        (argument.is_leaf and argument.requires_grad) or (base is not None and base.is_leaf and base.requires_grad)
    )


def keeps(mode: str, ops: list[Op], elements: int) -> set[int]:
    """The operators whose outputs `mode` keeps. elements: of the layer's input."""
    held = [i for i, op in enumerate(ops) if op.outputs is not None]
    if mode == "selective":
        return set(held)
    if mode != "mlp":
        return set()
    attentions = [i for i in held if is_attention(ops[i].func)]
    if not attentions:
        return set()
    last = attentions[-1]
    # An adapter's S comes before the product beside it; the output projection is the first as wide as the input.
    behind = (i for i in held if i > last and 2 * _size(ops[i].outputs) >= elements)
    end = next(behind, last)
    # DoRA's has a second product, which is added to it, or an operator that makes that one too.
    made = set(ops[end].makes)
    together = made.union(*(op.writes for op in ops[end:] if not made.isdisjoint(op.writes)))
    end = max(i for i in held if not together.isdisjoint((*ops[i].makes, *ops[i].writes)))
    return {i for i in held if i <= end}


def _size(outputs: Any) -> int:
    tensor = outputs if isinstance(outputs, Tensor) else next(t for t in outputs if isinstance(t, Tensor))
    return math.prod(tensor.shape)
