"""A linear layer with a 4-bit weight, and LoRA on it: forward and input gradient without ever holding W.

    y  = x W^T + bias + c dropout(x) A^T B^T         W as in `nf4`
    dx = dy W + c mask * (dy B A)                    dA, dB as in `lora_linear`

Few rows of x: one operator decodes W where it multiplies (`linear_4bit`). Many: W is decoded by panels into a scratch
of at most 4 MiB, a panel is multiplied by the vendor's GEMM, and its place in y (or, for panels of columns, in dx) is
written: `y[:, n0:n1] = x W[n0:n1]^T`, `dx[:, k0:k1] = dy W[:, k0:k1]`. What "few" is, is data (`decisions`).

The base product is made in the weight's `compute_dtype` where there is one (bitsandbytes: x is cast to it and y back).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import decisions, gemm, native, philox, steps
from .backend import OPS, autocast_enabled, exact, route
from .lora_linear import check, rows_of, shaped
from .lora_linear_4bit import lora_linear_4bit
from .nf4 import DTYPES, Weight4bit, dequantize_4bit

_own = threading.local()


def nf4_linear(
    x: Tensor,
    weight: Weight4bit,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """y (..., N) in x's dtype, from x (..., K) and a 4-bit weight (N, K), with an adapter or (A and B None) without.

    lora_A: (r, K), lora_B: (N, r), r from 1 to 512, of one floating dtype that may differ from x's. Under autocast x
    and the adapter are cast to its dtype, and the base product is made in it.

    Raises ValueError on shapes that do not fit, on r > 512 and on dropout_p outside [0, 1].
    """
    if lora_A is not None and lora_B is not None and dropout_p == 0.0:
        y = lora_linear_4bit(x, weight, bias, lora_A, lora_B, scaling)
        if y is not None:
            return y
    if x.dim() == 0 or x.shape[-1] != weight.columns:
        raise ValueError(
            f"nf4_linear: weight {tuple(weight.shape)} needs an input (..., {weight.columns}), got {tuple(x.shape)}"
        )
    if (lora_A is None) != (lora_B is None):
        raise ValueError("nf4_linear: lora_A and lora_B must both be given or both be None")
    if lora_A is not None and lora_B is not None:
        check(x, weight, lora_A, lora_B, dropout_p, "nf4_linear")  # type: ignore[arg-type]
    adapter = [t for t in (lora_A, lora_B) if t is not None]
    if native.transformed(x, weight.packed, bias, *adapter):
        dense = dequantize_4bit(weight, x.dtype)
        return native.linear(x, (dense,), (bias,), (lora_A,), (lora_B,), (scaling,), dropout_p)[0]
    device, dtype = x.device, x.dtype
    if autocast_enabled(device):
        cast = torch.get_autocast_dtype(device.type)
        x, weight = x.to(cast), weight.to(cast)
        lora_A, lora_B = (None if t is None else t.to(cast) for t in (lora_A, lora_B))
    seed = philox.draw_seed(device) if lora_A is not None and philox.threshold(dropout_p) else None
    if not torch.is_grad_enabled() and x.dim() > 1 and not torch.compiler.is_compiling():
        # Decoding: an autograd.Function costs as much as a product of (1, 576) and (576, 576).
        with exact(device):
            y = _forward(route(device), x, seed, weight, bias, lora_A, lora_B, (float(scaling),), float(dropout_p))[0]
        return y.view(*x.shape[:-1], weight.rows).to(dtype)
    call = _Call(weight, float(scaling), float(dropout_p), route(device))
    tensors = weight.storage()[:6]
    return _Nf4Linear.apply(call, x, seed, bias, lora_A, lora_B, *tensors).to(dtype)


class _Call:
    """Everything about a call that is not a tensor."""

    def __init__(self, weight: Weight4bit, scaling: float, p: float, backend: str) -> None:
        self.rest = weight[6:]
        self.scaling, self.p, self.backend = (scaling,), p, backend

    def weight(self, tensors: tuple[Any, ...]) -> Weight4bit:
        return Weight4bit(*tensors, *self.rest)  # type: ignore[call-arg]


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: Tensor,
        seed: Tensor | None,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        weight = call.weight(tensors)
        with exact(x.device):
            y, s = _forward(call.backend, x, seed, weight, bias, A, B, call.scaling, call.p)
        # x is kept for dA and s for dB: a frozen adapter needs neither.
        trainable = A is not None and B is not None and (A.requires_grad or B.requires_grad)
        ctx.save_for_backward(x if trainable else None, s if trainable else None, seed, A, B, *tensors)
        ctx.call, ctx.shape = call, x.shape
        return y if x.dim() == 2 else shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, s, seed, A, B, *tensors = ctx.saved_tensors
        call: _Call = ctx.call
        weight = call.weight(tuple(tensors))
        _, need_dx, _, need_bias, need_A, need_B = ctx.needs_input_grad[:6]
        dx = dA = dB = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dense = (dequantize_4bit(weight, dy.dtype),)
            given = [] if A is None else [A], [] if B is None else [B]
            members, scaling = ([], ()) if A is None else ([0], call.scaling)
            dx, dAs, dBs = native.linear_backward((dy,), x, seed, dense, members, *given, scaling, call.p, ctx.shape)
            dA, dB = (dAs[0], dBs[0]) if A is not None else (None, None)
            d_bias = dy.flatten(0, -2).sum(0) if need_bias else None
        else:
            with exact(dy.device):
                dy = rows_of(dy)
                d_bias = dy.sum(0) if need_bias else None
                dx = input_gradient(call.backend, dy, weight) if need_dx else None
                if A is not None and B is not None:
                    dA, dB = _adapter_backward(call, dy, x, s, seed, A, B, dx)
                dx = None if dx is None else dx.view(ctx.shape)
        storage = (None,) * len(tensors)
        return None, dx if need_dx else None, None, d_bias, dA if need_A else None, dB if need_B else None, *storage


def _forward(
    backend: str,
    x: Tensor,
    seed: Tensor | None,
    weight: Weight4bit,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scaling: tuple[float],
    p: float,
) -> tuple[Tensor, Tensor | None]:
    flat, s = rows_of(x), None
    if A is not None and B is not None:
        s = steps.shrink(backend, flat, A, scaling, p, seed)
    return linear(backend, flat, weight, bias, s, B), s


def _adapter_backward(
    call: _Call,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    A: Tensor,
    B: Tensor,
    dx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB; the rim's part is added to dx in place."""
    if x is None or s is None:
        if dx is not None:  # dA, formed of dx for want of x, is not used
            steps.shrink_backward(call.backend, torch.mm(dy.to(B.dtype), B), dx, A, call.scaling, call.p, seed, dx)
        return None, None
    ds, dB = steps.expand_backward(call.backend, dy, s, B)
    return steps.shrink_backward(call.backend, ds, rows_of(x), A, call.scaling, call.p, seed, dx), dB


def linear(
    backend: str, x: Tensor, weight: Weight4bit, bias: Tensor | None, s: Tensor | None = None, B: Tensor | None = None
) -> Tensor:
    """y (M, N) in x's dtype = x (M, K) W^T + bias + s (M, r) B (N, r)^T."""
    chosen = _chosen(x.device.type, weight, x.dtype)
    if x.shape[0] <= chosen.forward or x.dtype not in DTYPES:
        return OPS[backend].linear_4bit(x, *weight.storage(), weight.rows, bias, s, B)
    dtype = weight.compute_dtype or x.dtype
    n = weight.rows
    narrow, y = x.to(dtype), x.new_empty(x.shape[0], n)
    added = None if bias is None else bias.to(dtype)
    for rows, panel in row_panels(backend, weight, dtype):
        part, of_rows = y[:, rows], None if added is None else added[rows]
        if dtype is not x.dtype:
            part.copy_(gemm.linear(backend, narrow, panel, of_rows))
        else:
            gemm.linear(backend, narrow, panel, of_rows, out=part)
    if s is not None and B is not None:
        steps.expand_(backend, y, s, B, (n,))
    return y


def input_gradient(backend: str, dy: Tensor, weight: Weight4bit, into: Tensor | None = None) -> Tensor:
    """dx (M, K) in dy's dtype = dy (M, N) W; where `into` is given it is added to that, in place."""
    chosen = _chosen(dy.device.type, weight, dy.dtype)
    n, k = weight.shape
    if dy.shape[0] <= chosen.backward or dy.dtype not in DTYPES:
        dx = OPS[backend].linear_4bit_backward(dy, *weight.storage(), k, None, None)
        return dx if into is None else into.add_(dx)
    dtype = weight.compute_dtype or dy.dtype
    narrow = dy.to(dtype)
    dx = dy.new_empty(dy.shape[0], k) if into is None else into
    step = _step(chosen.panel_bytes, n, dtype, k)
    scratch = _scratch(step * n, dtype, dy.device)
    for first in range(0, k, step):
        count = min(step, k - first)
        panel = scratch[: count * n].view(n, count)
        OPS[backend].dequantize_4bit_(panel, *weight.storage(), k, 0, first)
        part = dx.narrow(1, first, count)
        if dtype is not dy.dtype:
            product = gemm.mm(backend, narrow, panel)
            part.copy_(product) if into is None else part.add_(product)
        elif into is None:
            gemm.mm(backend, narrow, panel, out=part)
        else:
            gemm.addmm_(backend, part, narrow, panel)
    return dx


def row_panels(backend: str, weight: Weight4bit, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows of W in `dtype`), one panel after the other in one scratch."""
    n, k = weight.shape
    step = _step(_chosen(weight.device.type, weight, dtype).panel_bytes, k, dtype, n)
    scratch = _scratch(step * k, dtype, weight.device)
    for first in range(0, n, step):
        count = min(step, n - first)
        panel = scratch[: count * k].view(count, k)
        OPS[backend].dequantize_4bit_(panel, *weight.storage(), k, first, 0)
        yield slice(first, first + count), panel


def _chosen(device_type: str, weight: Weight4bit, dtype: torch.dtype) -> decisions.Rows:
    return decisions.linear_4bit(device_type, weight.compute_dtype or dtype)


def _step(panel_bytes: int, depth: int, dtype: torch.dtype, length: int) -> int:
    """Rows (or columns) of a panel: equal panels, of multiples of 32, within the bytes or one such step."""
    most = max(panel_bytes // (max(depth, 1) * dtype.itemsize) // 32 * 32, 32)
    panels = -(-length // most)
    return max(min(most, -(-length // max(panels, 1) // 32) * 32), 32)


def _scratch(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU a thread's own, kept: memory that is new at every call costs a page fault for every 4 KiB of it."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(elements, dtype=dtype, device=device)
    kept: dict[Any, Tensor] = _own.__dict__
    found = kept.get(dtype)
    if found is None or found.numel() < elements:
        found = kept[dtype] = torch.empty(elements, dtype=dtype)
    return found
