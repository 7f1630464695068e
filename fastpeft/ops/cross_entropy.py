"""The softmax between the two products of a linear cross-entropy, on one tile of the logits, in place.

A tile z (M, n) has the columns first … first + n of the logits of M rows. What the loss sees is

    x = scale z                      or, with a cap c > 0 (soft-capping),   x = c t,  t = tanh(scale z / c)
    f = dx/dz = scale                                                       f = scale (1 - t²)

y is a row's label, an index into all columns, or negative for a row without one. Two operators:

    cross_entropy_accumulate_   adds the tile to what is known of each row, the label's column y apart:
                                    m a reference at most 8 below the largest x_v,  l = sum e^(x_v - m),  v ≠ y
                                    x_y,  and the sum of all x
                                and overwrites z_v by e^(x_v - m) f_v / scale, z_y by 0, for the product with the
                                weights. Where m grows, l is scaled to it, and so is the row of `acc`, the sum of
                                these products.
    cross_entropy_gradient_     overwrites z by the gradient:  z_v = f_v (a e^(x_v - n) - b),  z_y = f_y c

A sum of exponentials that is brought to a new reference as the maximum grows: Milakov & Gimelshein, 2018
(arXiv:1805.02867), as flash attention uses it. The label's own term is kept apart because the gradient of a confident
row is a small difference, p_y - 1, of which a rounded p_y leaves nothing.

fp32 inside (float64 if z is). z may have any row stride.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import define

# e^8 = 2981: within fp16, and rows are scaled down only where their maximum has grown by as much.
SLACK = 8.0

# The rows of `state`.
REFERENCE, SUM, OF_LABEL, TOTAL = range(4)


def new_state(rows: int, like: Tensor) -> Tensor:
    """(4, rows): m, l, x_y and the sum of x, before any tile."""
    state = like.new_zeros(4, rows, dtype=accumulator(like))
    state[REFERENCE].fill_(-torch.inf)
    return state


def accumulator(t: Tensor) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def logits_and_slope(z: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """x and f / scale in the accumulator's dtype."""
    x = z.to(accumulator(z)) * scale
    if cap == 0.0:
        return x, torch.ones_like(x)
    t = torch.tanh(x / cap)
    return cap * t, 1 - t * t


def _labelled(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which rows have their label among the tile's columns (M, 1), and in which (any, where they have not)."""
    at = (labels - first).unsqueeze(1)
    return (at >= 0) & (at < columns), at.clamp(0, columns - 1)


def accumulate_reference(
    z: Tensor, labels: Tensor, first: int, scale: float, cap: float, state: Tensor, acc: Tensor | None
) -> None:
    """acc (M, K): the products so far; None if z is not to be overwritten."""
    if z.shape[1] == 0:
        return
    x, slope = logits_and_slope(z, scale, cap)
    here, column = _labelled(labels, first, z.shape[1])
    m, exponentials, of_label, total = state.unbind(0)
    total += x.sum(1)
    x_y = x.gather(1, column)
    of_label.copy_(torch.where(here, x_y, of_label.unsqueeze(1)).squeeze(1))
    x.scatter_(1, column, torch.where(here, -torch.inf, x_y))
    top = x.amax(1)
    grown = top > m + SLACK
    factor = torch.where(grown, torch.exp(m - top), 1.0)
    m.copy_(torch.where(grown, top, m))
    e = torch.where((top == -torch.inf).unsqueeze(1), 0.0, torch.exp(x - m.unsqueeze(1)))
    exponentials.mul_(factor).add_(e.sum(1))
    if acc is not None:
        acc.mul_(factor.unsqueeze(1))
        z.copy_(e * slope)


def gradient_reference(z: Tensor, labels: Tensor, first: int, scale: float, cap: float, rows: Tensor) -> None:
    """rows (4, M): n, a, b and c."""
    if z.shape[1] == 0:
        return
    x, slope = logits_and_slope(z, scale, cap)
    n, a, b, c = rows.unsqueeze(2).unbind(0)
    gradient = a * torch.exp(x - n) - b
    here, column = _labelled(labels, first, z.shape[1])
    gradient.scatter_(1, column, torch.where(here, c, gradient.gather(1, column)))
    z.copy_(gradient * slope * scale)


define(
    "cross_entropy_accumulate_",
    "(Tensor(a!) z, Tensor labels, int first, float scale, float cap, Tensor(b!) state, Tensor(c!)? acc) -> ()",
    reference=accumulate_reference,
    fake=lambda z, labels, first, scale, cap, state, acc: None,
    kernels="cross_entropy",
)
define(
    "cross_entropy_gradient_",
    "(Tensor(a!) z, Tensor labels, int first, float scale, float cap, Tensor rows) -> ()",
    reference=gradient_reference,
    fake=lambda z, labels, first, scale, cap, rows: None,
    kernels="cross_entropy",
)
