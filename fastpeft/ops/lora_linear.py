"""LoRA on linear layers: one projection, or a group of projections of one input.

    y_g = x W_g^T + bias_g + c_g dropout_g(x) A_g^T B_g^T

x (..., K), W_g (N_g, K), bias_g (N_g), A_g (r_g, K), B_g (N_g, r_g), c_g a float (LoRA: Hu et al., 2021, eq. 3). W is
frozen. The backward keeps x, s = c dropout(x) A^T, the masks' seed and the parameters; masks are formed again:

    ds_g = dy_g B_g        dA_g = c_g ds_g^T dropout_g(x)
    dB_g = dy_g^T s_g      dx   = sum_g dy_g W_g + c_g mask_g * (ds_g A_g)

Two ways to compute it. *Fused*: an autograd.Function over the operators of `products`. *Native*: the same formula in
ordinary differentiable PyTorch, for inputs so small that calls, not arithmetic, are the cost, and for everything the
Function does not do: trainable weights, tensor subclasses, functorch transforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import philox
from .backend import OPS, route
from .products import MAX_RANK

# Up to this many elements of x the native form is the faster one: calls, not arithmetic, are what it costs there.
NATIVE_ELEMENTS = 4096

_PLAIN_TYPES = (Tensor, Parameter, type(None))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y (..., N) = x W^T + bias + scaling * dropout(x) A^T B^T, in the dtype of the base product.

    x: (..., K). weight: (N, K), any strides; frozen, or differentiated natively. lora_A: (r, K), lora_B: (N, r), r from
    1 to 512, of one floating dtype that may differ from x's. dropout_p: applied as given, so pass 0 in evaluation.
    Under autocast everything is cast as F.linear casts.

    Raises ValueError on shapes that do not fit, on r > 512 and on dropout_p outside [0, 1].
    """
    if dropout_p == 0.0 and x.numel() <= NATIVE_ELEMENTS and x.dtype is lora_A.dtype:
        if x.dim() == 2:
            return torch.addmm(F.linear(x, weight, bias), F.linear(x, lora_A), lora_B.t(), alpha=scaling)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.addmm(F.linear(flat, weight, bias), F.linear(flat, lora_A), lora_B.t(), alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[1])
    return lora_linear_group(x, (weight,), (bias,), (lora_A,), (lora_B,), (scaling,), dropout_p)[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    *,
    stacked_weight: Tensor | None = None,
    stacked_bias: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, ...]:
    """The outputs of several projections of one input, each with its own adapter or (A and B None) with none.

    Lists have one entry a projection, shapes as in `lora_linear`; ranks may differ. Each projection with an adapter
    draws its own dropout mask. stacked_weight: (sum N_g, K), whose row blocks are the weights in their order: then the
    base is one product and the outputs are column blocks of one matrix. stacked_bias: the biases likewise, in one.
    form: "plain" (the vendor's product, then the rim added in place), "fused" (base and rim in one kernel, where the
    backend has one), or "auto".

    Raises ValueError on lists, shapes or options that do not fit.
    """
    if form not in ("auto", "plain", "fused"):
        raise ValueError(f"form must be 'auto', 'plain' or 'fused', got {form!r}")
    _check(x, weights, biases, lora_A, lora_B, scaling, dropout_p, stacked_weight)
    trainable_base = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    if trainable_base or _transformed(x, *weights, *biases, *lora_A, *lora_B):
        return _native(x, weights, biases, lora_A, lora_B, scaling, dropout_p)
    if dropout_p == 0.0 and x.numel() <= NATIVE_ELEMENTS:
        return _native(x, weights, biases, lora_A, lora_B, scaling, 0.0)

    members = tuple(i for i, a in enumerate(lora_A) if a is not None)
    device, dtype = x.device, None
    adapters = [lora_A[i] for i in members] + [lora_B[i] for i in members]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        x, adapters = x.to(dtype), [t.to(dtype) for t in adapters]  # type: ignore[union-attr]
    stacked = stacked_weight is not None
    plan = _Plan(
        splits=tuple(w.shape[0] for w in weights),
        members=members,
        scaling=tuple(float(scaling[i]) for i in members),
        p=float(dropout_p),
        stacked=stacked,
        stacked_bias=stacked and stacked_bias is not None,
        fused=form == "fused",
        dtype=dtype,
        backend=route(device),
    )
    seed = philox.draw_seed(device) if philox.threshold(dropout_p) and members else None
    base = [stacked_weight] if stacked else [*weights]
    added = [stacked_bias] if plan.stacked_bias else [*biases]
    return _LoraLinear.apply(plan, x, seed, *base, *added, *adapters)


class _Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    splits: tuple[int, ...]  # N of each projection
    members: tuple[int, ...]  # the projections that have an adapter
    scaling: tuple[float, ...]  # one for each member
    p: float
    stacked: bool  # one weight for all projections
    stacked_bias: bool
    fused: bool
    dtype: torch.dtype | None  # autocast's, to which the base is cast in the forward and again in the backward
    backend: str

    def split_tensors(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Weights, biases, A's and B's out of one flat list."""
        n, g = len(self.splits), len(self.members)
        ends = [1 if self.stacked else n, 1 if self.stacked_bias else n, g, g]
        parts, start = [], 0
        for count in ends:
            parts.append(list(tensors[start : start + count]))
            start += count
        return parts[0], parts[1], parts[2], parts[3]

    def offset(self, projection: int) -> int:
        return sum(self.splits[:projection])


class _LoraLinear(torch.autograd.Function):
    """Outputs of all projections from (plan, x, seed, weights, biases, A's, B's)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, seed: Tensor | None, *tensors: Tensor | None) -> Any:
        weights, biases, lora_A, lora_B = plan.split_tensors(tensors)
        with _exact(x):
            s, outputs = _forward(plan, x, seed, weights, biases, lora_A, lora_B)
        ctx.plan = plan
        # x is kept for dA and s for dB: an adapter that is frozen needs neither.
        trainable = any(t.requires_grad for t in (*lora_A, *lora_B))
        kept = (x, s) if trainable else (None, None)
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.save_for_backward(*kept, seed, *weights, *lora_A, *lora_B)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        x, s, seed, *tensors = ctx.saved_tensors
        none = [None] * (1 if plan.stacked_bias else len(plan.splits))
        n_weights = 1 if plan.stacked else len(plan.splits)
        weights, _, lora_A, lora_B = plan.split_tensors([*tensors[:n_weights], *none, *tensors[n_weights:]])
        needs = plan.split_tensors(ctx.needs_input_grad[3:])
        if all(dy is None for dy in grads):
            return (None,) * len(ctx.needs_input_grad)
        args = (plan, grads, x, s, seed, weights, lora_A, lora_B, ctx.needs_input_grad[1], needs, ctx.x_shape)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            dx, d_bias, dA, dB = _differentiable_backward(*args)
        else:
            with _exact(next(dy for dy in grads if dy is not None)):
                dx, d_bias, dA, dB = _backward(*args)
        return (None, dx, None, *[None] * n_weights, *d_bias, *dA, *dB)


def _forward(
    plan: _Plan,
    x: Tensor,
    seed: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """s, and the outputs as tensors that autograd does not take for views (so that they may be changed in place)."""
    ops = OPS[plan.backend]
    flat, lead = _rows(x), x.shape[:-1]
    if plan.dtype is not None:
        weights, biases = [w.to(plan.dtype) for w in weights], [None if b is None else b.to(plan.dtype) for b in biases]
    s, r = None, 0
    rims: dict[int, tuple[Tensor, Tensor]] = {}
    if lora_A:
        r = max(a.shape[0] for a in lora_A)
        s = ops.lora_shrink(flat, _stack_rows(lora_A, r), plan.scaling, plan.p, seed)
        rims = {i: (s[:, g * r : g * r + b.shape[1]], b) for g, (i, b) in enumerate(zip(plan.members, lora_B))}

    one_matrix = plan.stacked or len(plan.splits) == 1
    everyone = len(rims) == len(plan.splits)
    if not one_matrix:
        outputs = []
        for i, (w, b) in enumerate(zip(weights, biases)):
            y = F.linear(x, w, b)
            if i in rims:
                ops.lora_expand_(y.view(-1, y.shape[-1]), *rims[i], [y.shape[-1]])
            outputs.append(y)
        return s, tuple(outputs)

    bias = biases[0] if plan.stacked_bias or not plan.stacked else None
    if plan.fused and everyone:
        y = ops.lora_linear_wide(flat, weights[0], bias, s, _stack_columns(lora_B, r), plan.splits)
    else:
        y = F.linear(flat, weights[0], bias)
        if everyone:
            ops.lora_expand_(y, s, _stack_columns(lora_B, r), plan.splits)
        else:
            for i, (s_i, b) in rims.items():
                ops.lora_expand_(y.narrow(1, plan.offset(i), plan.splits[i]), s_i, b, [plan.splits[i]])
    blocks = []
    for i, n in enumerate(plan.splits):
        own_bias = biases[i] if plan.stacked and not plan.stacked_bias else None
        if own_bias is not None:
            y.narrow(1, plan.offset(i), n).add_(own_bias)
        blocks.append(_block(y, plan.offset(i), n, lead))
    return s, tuple(blocks)


def _backward(
    plan: _Plan,
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    need_dx: bool,
    needs: tuple[list[bool], ...],
    x_shape: torch.Size,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    ops = OPS[plan.backend]
    dys = [None if dy is None else _rows(dy) for dy in grads]
    _, need_bias, need_A, need_B = needs
    if plan.dtype is not None:
        weights = [w.to(plan.dtype) for w in weights]

    dx = None
    if need_dx:
        for i, dy in enumerate(dys):
            if dy is None:
                continue
            w = weights[0].narrow(0, plan.offset(i), plan.splits[i]) if plan.stacked else weights[i]
            dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)

    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_B)
    if lora_A and (need_dx or any(need_A) or any(need_B)):
        r = max(a.shape[0] for a in lora_A)
        parts = []
        for g, (i, b) in enumerate(zip(plan.members, lora_B)):
            dy, rank = dys[i], b.shape[1]
            if dy is None:
                ds = lora_A[g].new_zeros(x_shape[:-1].numel(), r)
            elif s is None:
                ds = torch.mm(dy.to(b.dtype), b)
            else:
                ds, d_b = ops.lora_expand_backward(dy, s[:, g * r : g * r + rank], b)
                dB[g] = d_b if need_B[g] else None
            parts.append(F.pad(ds, (0, r - rank)) if ds.shape[1] < r else ds)
        ds = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        stacked_A = _stack_rows(lora_A, r)
        flat = dx if x is None else _rows(x)
        if flat is not None:
            d_rows = ops.lora_shrink_backward(ds, flat, stacked_A, plan.scaling, plan.p, seed, dx)
            for g, (i, a) in enumerate(zip(plan.members, lora_A)):
                if need_A[g] and dys[i] is not None:
                    dA[g] = d_rows if len(lora_A) == 1 else d_rows.narrow(0, g * r, a.shape[0])
    return None if dx is None else dx.view(x_shape), _bias_grads(plan, dys, need_bias), dA, dB


def _bias_grads(plan: _Plan, dys: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    sums = [None if dy is None else dy.sum(0) for dy in dys]
    if plan.stacked_bias:
        like = next(t for t in sums if t is not None)
        return [torch.cat([like.new_zeros(n) if t is None else t for t, n in zip(sums, plan.splits)])]
    return [t if need else None for t, need in zip(sums, needed)]


def _differentiable_backward(
    plan: _Plan,
    grads: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    weights: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    need_dx: bool,
    needs: tuple[list[bool], ...],
    x_shape: torch.Size,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """The gradients as a graph of ordinary operators, for a second derivative (create_graph=True)."""
    dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in grads]
    rows, columns = x_shape[:-1].numel(), x_shape[-1]
    dx: Any = 0
    for i, dy in enumerate(dys):
        if dy is not None:
            w = weights[0].narrow(0, plan.offset(i), plan.splits[i]) if plan.stacked else weights[i]
            dx = dx + dy @ w.to(dy.dtype)
    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_B)
    for g, (i, a, b) in enumerate(zip(plan.members, lora_A, lora_B)):
        dy = dys[i]
        if dy is None:
            continue
        dy, c = dy.to(a.dtype), plan.scaling[g]
        mask = (
            None if seed is None else c * philox.keep_scale(plan.p) * philox.keep_mask(seed, g, rows, columns, plan.p)
        )
        ds = dy @ b
        rim = ds @ a
        dx = dx + (rim * (c if mask is None else mask)).to(dx.dtype)
        if x is not None:
            scaled = x.reshape(rows, columns).to(a.dtype) * (c if mask is None else mask.to(a.dtype))
            dA[g] = ds.T @ scaled
            dB[g] = dy.T @ (scaled @ a.T)
    return dx.reshape(x_shape) if need_dx else None, _bias_grads(plan, dys, needs[1]), dA, dB


def _native(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float,
) -> tuple[Tensor, ...]:
    """The formula in ordinary operators."""
    outputs, member, seed = [], 0, None
    for w, bias, a, b, c in zip(weights, biases, lora_A, lora_B, scaling):
        y = F.linear(x, w, bias)
        if a is not None and b is not None:
            z = x
            if dropout_p and _transformed(x):
                z = F.dropout(x, dropout_p)  # a sharded or batched x has masks of its own kind
            elif dropout_p:
                seed = philox.draw_seed(x.device) if seed is None else seed
                rows, columns = x.shape[:-1].numel(), x.shape[-1]
                mask = philox.keep_mask(seed, member, rows, columns, dropout_p).view(x.shape)
                z = x * (mask * philox.keep_scale(dropout_p)).to(x.dtype)
            y = (y + F.linear(F.linear(z.to(a.dtype), a), b) * c).to(y.dtype)
            member += 1
        outputs.append(y)
    return tuple(outputs)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float,
    stacked_weight: Tensor | None,
) -> None:
    if not weights or len({len(part) for part in (weights, biases, lora_A, lora_B, scaling)}) != 1:
        raise ValueError(
            "weights, biases, lora_A, lora_B and scaling need one entry a projection, got "
            f"{len(weights)}, {len(biases)}, {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    k = x.shape[-1] if x.dim() else 0
    total = 0
    for i, (w, a, b) in enumerate(zip(weights, lora_A, lora_B)):
        n = w.shape[0]
        total += n
        if w.dim() != 2 or w.shape[1] != k:
            raise ValueError(f"projection {i}: weight must be (N, {k}) for an input of width {k}, got {tuple(w.shape)}")
        if (a is None) != (b is None):
            raise ValueError(f"projection {i}: lora_A and lora_B must both be given or both be None")
        if a is None or b is None:
            continue
        if a.dim() != 2 or a.shape[1] != k or b.shape != (n, a.shape[0]):
            raise ValueError(
                f"projection {i}: with weight {tuple(w.shape)}, lora_A must be (r, {k}) and lora_B ({n}, r), got "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        if not 1 <= a.shape[0] <= MAX_RANK:
            raise ValueError(f"projection {i}: rank must be from 1 to {MAX_RANK}, got {a.shape[0]}")
    if stacked_weight is not None and stacked_weight.shape != (total, k):
        raise ValueError(f"stacked_weight must be ({total}, {k}), got {tuple(stacked_weight.shape)}")


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor subclass or a functorch transform is at work, which a custom operator would not see through."""
    if torch.compiler.is_compiling():
        return False
    return any(type(t) not in _PLAIN_TYPES for t in tensors) or torch._C._are_functorch_transforms_active()


def _exact(like: Tensor) -> torch.autocast:
    """Autocast off: the plan has cast what is to be cast."""
    return torch.autocast(like.device.type, enabled=False)


def _rows(t: Tensor) -> Tensor:
    """t as a matrix whose rows are contiguous (an input may come transposed, a gradient expanded)."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _stack_rows(parts: list[Tensor], r: int) -> Tensor:
    """A's (r_g, K) one below another, each padded with zero rows to r."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p if p.shape[0] == r else F.pad(p, (0, 0, 0, r - p.shape[0])) for p in parts])


def _stack_columns(parts: list[Tensor], r: int) -> Tensor:
    """B's (N_g, r_g) one below another, each padded with zero columns to r."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p if p.shape[1] == r else F.pad(p, (0, r - p.shape[1])) for p in parts])


def _block(y: Tensor, offset: int, n: int, lead: torch.Size) -> Tensor:
    """Columns offset … offset + n of y (M, N) as (*lead, n), sharing memory but not a view to autograd.

    A view returned by an autograd.Function may not be changed in place, and models do that (clamp_ on queries).
    """
    if torch.compiler.is_compiling():
        return y.narrow(1, offset, n).view(*lead, n)
    if n == y.shape[1]:
        return y if len(lead) == 1 else torch.ops.aten._unsafe_view(y, (*lead, n))
    strides = [math.prod(lead[i + 1 :]) * y.stride(0) for i in range(len(lead))]
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset() + offset, (*lead, n), (*strides, 1))
