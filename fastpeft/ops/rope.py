"""Rotary position embeddings on queries and keys (Su et al., arXiv:2104.09864, eq. 34).

    y = x * cos + turned(x) * sin       turned(x): a pair (x_1, x_2) becomes (-x_2, x_1)

on the first R columns of each head; the other D - R pass through. The two of a pair are i and i + R/2, or with
`interleaved` 2i and 2i + 1. The gradient is the transposed map, for a proper cos and sin the rotation back:

    dx = dy * cos - turned(dy * sin)

Arithmetic is in fp32 (float64 if an operand is) and rounded once; eager code in 16 bit rounds three times. q and k are
done in one pass. Only cos and sin are kept.

Where the projection that made x is to be told x in the backward (`promise`), y is kept too, which attention keeps
anyway, and x is had from it by the inverse, for the pair of columns 1 and 2 with d = cos_1 cos_2 + sin_1 sin_2

    x_1 = (cos_2 y_1 + sin_1 y_2) / d       x_2 = (cos_1 y_2 - sin_2 y_1) / d

which is the transposed map with the tables of the pair's other column, over d. So a table that was rounded or scaled
(YaRN's) is undone exactly, and x comes back with y's relative error: one more rounding of the pair's size, and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .backend import OPS, define, exact, route
from .products import _accumulator
from .promise import Promise, Watch, take, unshared


def rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False, pairs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q and k (None for None) with the positions' rotation, in new memory, in their own shapes, dtypes and layouts.

    q: (B, H, T, D), k: (B, H_k, T, D) of q's dtype, any strides; where those are dense, the results have them too.
    cos, sin: (B, T, R) or (1, T, R), any strides, of any floating dtype. interleaved: pairs are neighbouring columns.
    pairs: cos and sin have one column a pair, (B or 1, T, R/2), not one a column. Under autocast nothing is cast.

    Raises ValueError on shapes that do not fit, TypeError where k is of another dtype than q.
    """
    _check(q, k, cos, sin, pairs)
    if native.transformed(q, k, cos, sin) or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        rotated = (None if x is None else rotate(x, cos, sin, interleaved, pairs, False) for x in (q, k))
        return tuple(rotated)  # type: ignore[return-value]
    backend = route(q.device)
    if not torch.is_grad_enabled() or not (q.requires_grad or (k is not None and k.requires_grad)):
        return OPS[backend].rope(q, k, cos, sin, interleaved, pairs, False)
    promises: list[Promise | None] = [None, None]
    if not torch.compiler.is_compiling():
        promises = [take(q), None if k is None else take(k)]
    rotated = _Rope.apply(q, k, cos, sin, interleaved, pairs, backend, promises)
    return rotated if k is not None else (rotated[0], None)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        pairs: bool,
        backend: str,
        promises: list[Promise | None],
    ) -> Any:
        rotated = OPS[backend].rope(q, k, cos, sin, interleaved, pairs, False)
        kept = [y if promise is not None else None for y, promise in zip(rotated, promises)]
        outputs = [y if keep is None else unshared(y) for y, keep in zip(rotated, kept)]
        ctx.watched = [None if keep is None else Watch(y) for y, keep in zip(outputs, kept)]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.call, ctx.promises = (interleaved, pairs, backend), promises
        ctx.set_materialize_grads(False)
        return tuple(outputs if k is not None else outputs[:1])

    @staticmethod
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None = None) -> Any:
        cos, sin, *kept = ctx.saved_tensors
        interleaved, pairs, backend = ctx.call
        # Where only k's result was used, it takes q's place.
        first, second = (dk, None) if dq is None else (dq, dk)
        if first is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            with exact(first.device):
                back = [None if t is None else rotate(t, cos, sin, interleaved, pairs, True) for t in (first, second)]
        else:
            _tell(kept, ctx.promises, ctx.watched, cos, sin, *ctx.call)
            back = OPS[backend].rope(first, second, cos, sin, interleaved, pairs, True)
        return *(back if dq is not None else (None, back[0])), None, None, None, None, None, None


def _tell(
    kept: Sequence[Tensor | None],
    promises: Sequence[Promise | None],
    watched: Sequence[Watch | None],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    pairs: bool,
    backend: str,
) -> None:
    """Fills the promises of those whose rotated form is as it was."""
    known = [
        (y, promise)
        for y, promise, watch in zip(kept, promises, watched)
        if y is not None and promise is not None and watch is not None and not watch.changed
    ]
    if known:
        first, second = [y for y, _ in known] if len(known) == 2 else (known[0][0], None)
        tables = inverse_tables(cos, sin, interleaved, pairs)
        for x, (_, promise) in zip(OPS[backend].rope(first, second, *tables, interleaved, pairs, True), known):
            promise.fill(x)


def inverse_tables(cos: Tensor, sin: Tensor, interleaved: bool, pairs: bool) -> tuple[Tensor, Tensor]:
    """Those with which the transposed map undoes the rotation. Where cos and sin are both 0, so is what they give."""
    acc = _accumulator(cos, sin)
    cos, sin = cos.to(acc), sin.to(acc)
    other_cos, other_sin = (cos, sin) if pairs else (_other(cos, interleaved), _other(sin, interleaved))
    d = cos * other_cos + sin * other_sin
    d = torch.where(d == 0, 1.0, d)
    return other_cos / d, other_sin / d


def _other(t: Tensor, interleaved: bool) -> Tensor:
    """Each column's partner in its pair."""
    return t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else t.roll(t.shape[-1] // 2, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, pairs: bool, inverse: bool) -> Tensor:
    """x (B, H, T, D) rotated (inverse: by the transposed map), in x's dtype; differentiable."""
    acc = _accumulator(x, cos, sin)
    cos, sin = (_spread(t.to(acc), interleaved, pairs).unsqueeze(1) for t in (cos, sin))
    columns = cos.shape[-1]
    head, rest = x[..., :columns].to(acc), x[..., columns:]
    if inverse:
        turned = head * cos - _turned(head * sin, interleaved)
    else:
        turned = head * cos + _turned(head, interleaved) * sin
    turned = turned.to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def rope_reference(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, pairs: bool, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    """Both, laid out as q and k are."""
    q_out, k_out = _fake(q, k, cos, sin, interleaved, pairs, inverse)
    q_out.copy_(rotate(q, cos, sin, interleaved, pairs, inverse))
    if k is not None and k_out is not None:
        k_out.copy_(rotate(k, cos, sin, interleaved, pairs, inverse))
    return q_out, k_out


def _spread(t: Tensor, interleaved: bool, pairs: bool) -> Tensor:
    """A table with one column for each column of x."""
    if not pairs:
        return t
    return t.repeat_interleave(2, dim=-1) if interleaved else torch.cat([t, t], dim=-1)


def _turned(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, pairs: bool) -> None:
    if q.dim() != 4 or (k is not None and k.dim() != 4):
        raise ValueError(f"rope: q and k must be (B, H, T, D), got {tuple(q.shape)} and {k if k is None else k.shape}")
    batch, _, tokens, width = q.shape
    if k is not None and (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, width):
        raise ValueError(f"rope: k {tuple(k.shape)} must be q's {tuple(q.shape)} in all but the number of heads")
    if k is not None and k.dtype != q.dtype:
        raise TypeError(f"rope: q is {q.dtype} and k {k.dtype}; they must be of one dtype")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ValueError(
            f"rope: cos and sin must be (1 or {batch}, {tokens}, R), got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    columns = cos.shape[-1] * (2 if pairs else 1)
    if columns % 2 or not 0 < columns <= width:
        raise ValueError(f"rope: {columns} columns are to be rotated; it must be an even number from 2 to {width}")


def _fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, pairs: bool, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(q), None if k is None else torch.empty_like(k)


# Both results are optional because one is: see `glu`.
define(
    "rope",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool pairs, bool inverse) "
    "-> (Tensor? q_out, Tensor? k_out)",
    reference=rope_reference,
    fake=_fake,
    kernels="rope",
)
