"""The bordered weight: base and adapter as one matrix, so that one product computes both.

    W+ = [ W  B ]   (N + R) x (K + R)       R = G r columns for the G members' ranks, B block-diagonal
         [ A  0 ]

    s  = c dropout(x) A^T                   (M, R), the scaling folded in
    y  = [x | s] [W | B]^T                  one product, K + R deep
    ds = dy B                               (M, R)
    dx = [dy | c ds] [W ; A]                one product, N + R deep

No second pass over y, no accumulation into dx. It needs x and dy in rows of K + R and N + R elements, so it pays where
the producer of x writes such rows; a copy costs what it saves. docs/bordered_weight.md has the measurement, by which
form="auto" of `lora_linear_group` chooses. With dropout the mask falls on c ds A alone: then the backward adds that
product to dy W in place, as the plain form does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, philox, steps
from .backend import route
from .lora_linear import column_block, rows_of


class BorderedWeight:
    """Owns the (N + R) x (K + R) storage of one weight, or of several stacked along N, and lends the weight out.

    `weight`: (N, K), a view with rows K + R elements apart that holds what the given tensor held; changing it in place
    changes the product. The rim is scratch: it is filled from A and B at each use.
    """

    def __init__(self, weight: Tensor, rim: int) -> None:
        """weight: (N, K), copied. rim: R, the ranks of all members together."""
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"a bordered weight needs a floating-point matrix, got {weight.dtype} {tuple(weight.shape)}"
            )
        if rim < 1:
            raise ValueError(f"the rim must be at least 1 wide, got {rim}")
        n, k = weight.shape
        self.rim = rim
        self.storage = torch.zeros(n + rim, k + rim, dtype=weight.dtype, device=weight.device)
        self.weight = self.storage[:n, :k]
        self.weight.copy_(weight.detach())

    @classmethod
    def take(cls, parameter: torch.nn.Parameter, rim: int) -> BorderedWeight:
        """Moves a frozen parameter into bordered storage: its data becomes the view `weight`."""
        bordered = cls(parameter, rim)
        parameter.data = bordered.weight.detach()
        return bordered

    @staticmethod
    def release(parameter: torch.nn.Parameter) -> None:
        """Gives a parameter that `take` moved storage of its own again, with the same values."""
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def fill_rim(self, A: Sequence[Tensor], B: Sequence[Tensor], splits: Sequence[int]) -> None:
        """Writes the members' A_g (r, K) and B_g (N_g, r) into the rim; splits: the N_g, summing to N."""
        n, k = self.weight.shape
        if sum(splits) != n or sum(a.shape[0] for a in A) != self.rim:
            raise ValueError(
                f"splits {list(splits)} and ranks {[a.shape[0] for a in A]} do not fit a weight {(n, k)} "
                f"with a rim of {self.rim}"
            )
        with torch.no_grad():
            if len(splits) > 1:
                self.storage[:n, k:].zero_()
            row = column = 0
            for a, b, size in zip(A, B, splits):
                r = a.shape[0]
                self.storage[n + column : n + column + r, :k].copy_(a)
                self.storage[row : row + size, k + column : k + column + r].copy_(b)
                row, column = row + size, column + r

    def forward(self, x_plus: Tensor) -> Tensor:
        """y (M, N) of x_plus (M, K + R) = [x | s]."""
        return torch.mm(x_plus, self.storage[: self.weight.shape[0]].t())

    def backward(self, dy_plus: Tensor) -> Tensor:
        """dx (M, K) of dy_plus (M, N + R) = [dy | c ds]."""
        return torch.mm(dy_plus, self.storage[:, : self.weight.shape[1]])


def lora_linear_bordered(
    x: Tensor,
    bordered: BorderedWeight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    splits: Sequence[int],
    dropout_p: float = 0.0,
) -> tuple[Tensor, ...]:
    """The members' outputs (..., N_g), without bias; differentiable in x, A and B.

    x: (..., K). lora_A: G of (r, K), lora_B: G of (N_g, r), of the weight's dtype, all of one rank r = R / G.
    Raises ValueError on shapes that do not fit.
    """
    n, k = bordered.weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"a bordered weight {(n, k)} needs an input (..., {k}), got {tuple(x.shape)}")
    if len({a.shape[0] for a in lora_A}) != 1 or any(t.dtype != bordered.weight.dtype for t in (x, *lora_A, *lora_B)):
        raise ValueError("a bordered weight needs adapters of one rank, and input and adapters of its dtype")
    if native.transformed(x, *lora_A, *lora_B):
        bases = bordered.weight.split(list(splits))
        return native.linear(x, bases, [None] * len(bases), lora_A, lora_B, scaling, dropout_p)
    seed = philox.draw_seed(x.device) if philox.threshold(dropout_p) else None
    constants = (bordered, tuple(splits), tuple(map(float, scaling)), float(dropout_p), route(x.device))
    return _Bordered.apply(x, seed, constants, *lora_A, *lora_B)


class _Bordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor | None, constants: tuple[Any, ...], *adapters: Tensor) -> Any:
        bordered, splits, scaling, p, backend = constants
        members, flat, k = len(splits), rows_of(x), x.shape[-1]
        lora_A, lora_B = adapters[:members], adapters[members:]
        bordered.fill_rim(lora_A, lora_B, splits)
        s = steps.shrink(backend, flat, torch.cat(lora_A) if members > 1 else lora_A[0], scaling, p, seed)
        x_plus = flat.new_empty(flat.shape[0], k + bordered.rim)
        x_plus[:, :k] = flat
        x_plus[:, k:] = s
        y = bordered.forward(x_plus)
        ctx.save_for_backward(x, s, seed, *adapters)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        starts = [sum(splits[:g]) for g in range(members)]
        return tuple(column_block(y, start, n, x.shape[:-1]) for start, n in zip(starts, splits))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        bordered, splits, scaling, p, backend = ctx.constants
        x, s, seed, *adapters = ctx.saved_tensors
        members = len(splits)
        lora_A, lora_B = adapters[:members], adapters[members:]
        bases = bordered.weight.split(splits)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            bases = bordered.weight.clone().split(splits)  # which the next fill_rim does not write to
            dx_graph, d_As, d_Bs = native.linear_backward(
                grads, x, seed, bases, range(members), lora_A, lora_B, scaling, p, x.shape
            )
            return (dx_graph, None, None, *d_As, *d_Bs)
        flat, n, r = rows_of(x), bordered.weight.shape[0], lora_A[0].shape[0]
        dys = [flat.new_zeros(len(flat), size) if dy is None else rows_of(dy) for dy, size in zip(grads, splits)]
        rims = [steps.expand_backward(backend, dy, s[:, g * r : (g + 1) * r], lora_B[g]) for g, dy in enumerate(dys)]
        ds = torch.cat([part for part, _ in rims], dim=1) if members > 1 else rims[0][0]
        stacked = torch.cat(lora_A) if members > 1 else lora_A[0]
        dx: Tensor | None = None
        if ctx.needs_input_grad[0] and seed is None:
            bordered.fill_rim(lora_A, lora_B, splits)  # another call may have used the rim since
            dy_plus = flat.new_empty(len(flat), n + bordered.rim)
            torch.cat(dys, dim=1, out=dy_plus[:, :n])
            for g, c in enumerate(scaling):
                torch.mul(rims[g][0], c, out=dy_plus[:, n + g * r : n + (g + 1) * r])
            dx = bordered.backward(dy_plus)
            dA = steps.shrink_backward(backend, ds, flat, stacked, scaling, p, seed, None)
        else:
            if ctx.needs_input_grad[0]:
                dx = torch.mm(dys[0], bases[0])
                for dy, base in zip(dys[1:], bases[1:]):
                    dx.addmm_(dy, base)
            dA = steps.shrink_backward(backend, ds, flat, stacked, scaling, p, seed, dx)
        return (None if dx is None else dx.view(x.shape), None, None, *dA.split(r), *(dB for _, dB in rims))
