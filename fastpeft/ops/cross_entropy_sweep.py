"""The loops of a linear cross-entropy over the tiles of its logits, each an operator of its own.

A tile is all rows up to a limit and some of the columns. So its weights, read once, are still in the cache for the
second product, and so are its logits: two products of 512 rows with (49152, 576) weights take less time so than whole
(docs/linear_cross_entropy.md). The shape of a tile depends on the shapes alone: the same bits every run.

The formulas are in `linear_cross_entropy`, the softmax on a tile in `cross_entropy`, an adapter's products in `steps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gemm, steps
from .backend import OPS, define
from .cross_entropy import accumulator, new_state

# Rows and elements of a tile, by kind of device: docs/linear_cross_entropy.md has the measurements.
_ROWS = {"cpu": 2048}
_ELEMENTS = {"cpu": 1 << 19}
_COLUMNS = (256, 16384)


def tile_shape(rows: int, columns: int, device: str) -> tuple[int, int]:
    """Rows and columns of a tile, a function of the shapes alone."""
    most = min(rows, _ROWS.get(device, 8192))
    wide = _ELEMENTS.get(device, 1 << 25) // max(most, 1) // 64 * 64
    if device == "cpu" and wide % 1024 == 0:
        wide -= (
            64  # fp32 rows whole pages apart lie in the same few sets of the first cache: 2 % of both products' time
        )
    return most, min(columns, max(_COLUMNS[0], min(_COLUMNS[1], wide)))


def _spans(n: int, step: int) -> list[tuple[int, int]]:
    return [(i, min(i + step, n)) for i in range(0, n, max(step, 1))]


class _Tiles:
    """The logits of some rows, one tile at a time, each in the same memory."""

    def __init__(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, B: Tensor | None, backend: str
    ) -> None:
        self.h, self.weight, self.bias, self.s, self.B, self.backend = h, weight, bias, s, B, backend
        rows, columns = tile_shape(h.shape[0], weight.shape[0], h.device.type)
        self.rows, self.columns = _spans(h.shape[0], rows), _spans(weight.shape[0], columns)
        self._space = h.new_empty(rows * columns)

    def weights(self, j: tuple[int, int]) -> Tensor:
        """Rows of W in h's dtype."""
        return self.weight[j[0] : j[1]].to(self.h.dtype)

    def logits(self, i: tuple[int, int], j: tuple[int, int], weights: Tensor) -> Tensor:
        """z of rows i and columns j, to be overwritten."""
        rows, columns = i[1] - i[0], j[1] - j[0]
        z = self._space[: rows * columns].view(rows, columns)
        h = self.h[i[0] : i[1]]
        bias = None if self.bias is None else self.bias[j[0] : j[1]].to(h.dtype)
        gemm.linear(self.backend, h, weights, bias, out=z)
        if self.s is not None and self.B is not None:
            steps.expand_(self.backend, z, self.s[i[0] : i[1]], self.B[j[0] : j[1]], (columns,))
        return z


def add_product_(backend: str, acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a b, acc being fp32 beside 16-bit operands."""
    if acc.dtype is a.dtype:
        gemm.addmm_(backend, acc, a, b)
    elif acc.is_cuda:
        acc.add_(torch.mm(a, b, out_dtype=acc.dtype))
    else:
        acc.add_(torch.mm(a, b))


def forward_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float,
    products: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The state of the rows, (4, M) as `cross_entropy` has it, and the sums (M, K) of e^(x_v - m) f_v / scale W_v over
    v ≠ y if they are wanted, else nothing."""
    accumulate = OPS[backend].cross_entropy_accumulate_
    tiles = _Tiles(h, weight, bias, s, B, backend)
    state = new_state(h.shape[0], h)
    sums = h.new_zeros(h.shape if products else 0, dtype=state.dtype)
    for i in tiles.rows:
        part = state[:, i[0] : i[1]].contiguous()
        acc = sums[i[0] : i[1]] if products else None
        for j in tiles.columns:
            w = tiles.weights(j)
            z = tiles.logits(i, j, w)
            accumulate(z, labels[i[0] : i[1]], j[0], scale, cap, part, acc)
            if acc is not None:
                add_product_(backend, acc, z, w)
        state[:, i[0] : i[1]] = part
    return state, sums


def backward_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    scale: float,
    cap: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh without the adapter's part (h's dtype), dW, d_bias, ds (s's dtype) and dB; nothing where not needed.

    rows (4, M): as cross_entropy_gradient_ takes them.
    """
    tiles = _Tiles(h, weight, bias, s, B, backend)
    acc = accumulator(h)
    dh, dW, d_bias, ds, dB = _gradients(h, weight, bias, s, B, need)
    sum_h = dh if dh.dtype == acc else torch.zeros_like(dh, dtype=acc)
    sum_s = ds if ds.dtype == acc else torch.zeros_like(ds, dtype=acc)
    for j in tiles.columns:
        w = tiles.weights(j)
        of_weight = _Sum(dW[j[0] : j[1]]) if need[1] else None
        of_bias = _Sum(d_bias[j[0] : j[1]]) if need[2] else None
        of_B = _Sum(dB[j[0] : j[1]]) if need[4] else None
        for i in tiles.rows:
            dz, here = tiles.logits(i, j, w), slice(i[0], i[1])
            OPS[backend].cross_entropy_gradient_(dz, labels[here], j[0], scale, cap, rows[:, here].contiguous())
            if need[0]:
                add_product_(backend, sum_h[here], dz, w)
            if of_weight is not None:
                of_weight.add(gemm.mm(backend, dz.t(), h[here]))
            if of_bias is not None:
                of_bias.add(dz.sum(0, dtype=acc))
            if (need[3] or need[4]) and s is not None and B is not None:
                ds_part, dB_part = steps.expand_backward(backend, dz, s[here], B[j[0] : j[1]])
                if need[3]:
                    sum_s[here] += ds_part
                if of_B is not None:
                    of_B.add(dB_part)
        for total in (of_weight, of_bias, of_B):
            if total is not None:
                total.store()
    return sum_h.to(h.dtype), dW, d_bias, sum_s.to(ds.dtype), dB


class _Sum:
    """A sum of parts that goes to `out`, added up in fp32 if there is more than one."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._first: Any = None
        self._sum: Any = None

    def add(self, part: Tensor) -> None:
        if self._sum is not None:
            self._sum += part
        elif self._first is not None:
            self._sum = self._first.to(accumulator(part)) + part
        else:
            self._first = part

    def store(self) -> None:
        self._out.copy_(self._first if self._sum is None else self._sum)


def _gradients(
    h: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, B: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = h.new_empty(0)
    dh = torch.zeros_like(h, memory_format=torch.contiguous_format) if need[0] else none
    dW = torch.empty_like(weight, memory_format=torch.contiguous_format) if need[1] else none
    d_bias = torch.empty_like(bias) if need[2] and bias is not None else none
    ds = torch.zeros_like(s) if need[3] and s is not None else none
    dB = torch.empty_like(B, memory_format=torch.contiguous_format) if need[4] and B is not None else none
    return dh, dW, d_bias, ds, dB


def _forward_fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float,
    products: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(h)
    return h.new_empty(4, h.shape[0], dtype=acc), h.new_empty(h.shape if products else 0, dtype=acc)


def _backward_fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    scale: float,
    cap: float,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(h, weight, bias, s, B, need)


# Each is the whole loop over the tiles: one operator to torch.compile, whatever the number of tiles.
define(
    "linear_cross_entropy",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor? s, Tensor? B, Tensor labels, float scale, float cap, "
    "bool products, str backend) -> (Tensor state, Tensor sums)",
    reference=forward_reference,
    fake=_forward_fake,
)
define(
    "linear_cross_entropy_backward",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor? s, Tensor? B, Tensor labels, Tensor rows, float scale, float cap, "
    "bool[] need, str backend) -> (Tensor dh, Tensor dW, Tensor d_bias, Tensor ds, Tensor dB)",
    reference=backward_reference,
    fake=_backward_fake,
)
