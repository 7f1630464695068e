"""The products a LoRA group is made of, as operators: what the three backends implement.

A *group* is G projections of one input x (M, K), all of rank r. Their adapters are stacked: A (G*r, K) holds the
members' rows one after another, B (N, r) holds member g's `splits[g]` rows, N = sum(splits). s is (M, G*r). Member g
has its own scaling c_g and, with dropout, its own mask m_g (see `philox`); p_q is the probability the mask realises.

    lora_shrink            s_g = c_g/(1-p_q) (m_g * x) A_g^T             the scale is folded into s, so B stays raw
    lora_expand_           y_g += s_g B_g^T
    lora_expand_backward   ds = dy B,  dB = dy^T s                       one member, one pass over dy
    lora_shrink_backward   dA_g = c_g/(1-p_q) ds_g^T (m_g * x)
                           dx += sum_g c_g/(1-p_q) m_g * (ds_g A_g)      the same pass, each mask formed once
    lora_linear_wide       y = x W^T + bias + s B^T
    lora_linear_wide_backward   dx = dy W + sum_g c_g/(1-p_q) m_g * (ds_g A_g)

Sums are in fp32 (float64 if an operand is float64) and rounded once to the dtype of the result: s and dA to A's, ds to
s's, dB to B's, y, dy and dx to x's. Adapters may be of another dtype than x. Matrices may have any row stride.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox
from .backend import define

MAX_RANK = 512


def _accumulator(*operands: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32


def _members(
    scaling: list[float], p: float, seed: Tensor | None, rows: int, columns: int
) -> list[tuple[float, Tensor | None]]:
    """Scale and mask of each member."""
    if seed is None:
        return [(c, None) for c in scaling]
    kept = philox.keep_scale(p)
    return [(c * kept, philox.keep_mask(seed, g, rows, columns, p)) for g, c in enumerate(scaling)]


def shrink_reference(x: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None) -> Tensor:
    """s (M, G*r) in A's dtype, from x (M, K) and A (G*r, K)."""
    acc = _accumulator(x, A)
    x, rows = x.to(acc), A.to(acc).chunk(len(scaling))
    s = [
        c * ((x if mask is None else x * mask) @ a.T)
        for (c, mask), a in zip(_members(scaling, p, seed, *x.shape), rows)
    ]
    return torch.cat(s, dim=1).to(A.dtype)


def expand_reference(y: Tensor, s: Tensor, B: Tensor, splits: list[int]) -> None:
    """y (M, N) += s (M, G*r) by blocks times B (N, r)^T, in place."""
    acc = _accumulator(y, s, B)
    rims = [s_g @ b.T for s_g, b in zip(s.to(acc).chunk(len(splits), dim=1), B.to(acc).split(splits))]
    y.copy_(y.to(acc) + torch.cat(rims, dim=1))


def expand_backward_reference(dy: Tensor, s: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """ds (M, r) in s's dtype and dB (N, r) in B's, of one member, from dy (M, N)."""
    acc = _accumulator(dy, s, B)
    dy = dy.to(acc)
    return (dy @ B.to(acc)).to(s.dtype), (dy.T @ s.to(acc)).to(B.dtype)


def shrink_backward_reference(
    ds: Tensor, x: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None, dx: Tensor | None
) -> Tensor:
    """dA (G*r, K) in A's dtype; where dx (M, K) is given the rim's part is added to it in place."""
    acc = _accumulator(ds, x, A)
    x = x.to(acc)
    d_rows, rim = [], torch.zeros(())
    parts = zip(
        _members(scaling, p, seed, *x.shape), ds.to(acc).chunk(len(scaling), dim=1), A.to(acc).chunk(len(scaling))
    )
    for (c, mask), ds_g, a in parts:
        d_rows.append(c * (ds_g.T @ (x if mask is None else x * mask)))
        if dx is not None:
            part = c * (ds_g @ a)
            part = part if mask is None else part * mask
            rim = rim + part
    if dx is not None:
        dx.copy_(dx.to(acc) + rim)
    return torch.cat(d_rows).to(A.dtype)


def wide_reference(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, B: Tensor, splits: list[int]) -> Tensor:
    """y (M, N): the vendor's product for the base, the rim added to it."""
    y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    expand_reference(y, s, B, splits)
    return y


def wide_backward_reference(
    dy: Tensor, weight: Tensor, ds: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None
) -> Tensor:
    """dx (M, K) of one stacked dy (M, N)."""
    dx = dy @ weight
    acc = _accumulator(dx, ds, A)
    rim = torch.zeros(dx.shape, dtype=acc, device=dx.device)
    parts = zip(
        _members(scaling, p, seed, *dx.shape), ds.to(acc).chunk(len(scaling), dim=1), A.to(acc).chunk(len(scaling))
    )
    for (c, mask), ds_g, a in parts:
        part = c * (ds_g @ a)
        rim += part if mask is None else part * mask
    return (dx.to(acc) + rim).to(dx.dtype)


def _shrink_fake(x: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0], dtype=A.dtype)


def _expand_fake(y: Tensor, s: Tensor, B: Tensor, splits: list[int]) -> None:
    return None


def _expand_backward_fake(dy: Tensor, s: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), B.new_empty(B.shape)


def _shrink_backward_fake(
    ds: Tensor, x: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None, dx: Tensor | None
) -> Tensor:
    return A.new_empty(A.shape)


def _wide_fake(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, B: Tensor, splits: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _wide_backward_fake(
    dy: Tensor, weight: Tensor, ds: Tensor, A: Tensor, scaling: list[float], p: float, seed: Tensor | None
) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


define(
    "lora_shrink",
    "(Tensor x, Tensor A, float[] scaling, float p, Tensor? seed) -> Tensor",
    reference=shrink_reference,
    fake=_shrink_fake,
    kernels="lora_linear",
)
define(
    "lora_expand_",
    "(Tensor(a!) y, Tensor s, Tensor B, int[] splits) -> ()",
    reference=expand_reference,
    fake=_expand_fake,
    kernels="lora_linear",
)
define(
    "lora_expand_backward",
    "(Tensor dy, Tensor s, Tensor B) -> (Tensor ds, Tensor dB)",
    reference=expand_backward_reference,
    fake=_expand_backward_fake,
    kernels="lora_linear",
)
define(
    "lora_shrink_backward",
    "(Tensor ds, Tensor x, Tensor A, float[] scaling, float p, Tensor? seed, Tensor(a!)? dx) -> Tensor",
    reference=shrink_backward_reference,
    fake=_shrink_backward_fake,
    kernels="lora_linear",
)
define(
    "lora_linear_wide",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor B, int[] splits) -> Tensor",
    reference=wide_reference,
    fake=_wide_fake,
    kernels="lora_linear",
)
define(
    "lora_linear_wide_backward",
    "(Tensor dy, Tensor weight, Tensor ds, Tensor A, float[] scaling, float p, Tensor? seed) -> Tensor",
    reference=wide_backward_reference,
    fake=_wide_backward_fake,
    kernels="lora_linear",
)
