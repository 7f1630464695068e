"""Attention (Vaswani et al., arXiv:1706.03762, eq. 1) in fp32 on the CPU, for training.

    s = scale q kᵀ        p = softmax of s by rows, with `causal` over the keys 0 … i for query i        o = p v

    dv = pᵀ do        dp = do vᵀ        ds = p ∘ (dp - rowsum(do ∘ o))        dq = scale ds k        dk = scale dsᵀ q

for each head; G heads of k and v serve H / G heads of q each, and their gradients are sums over those. The kernel takes
keys by blocks and keeps, besides its operands and o, the logarithm of each row's sum of exponentials, from which the
backward makes p again (Dao et al., arXiv:2205.14135): what PyTorch's keeps too. Exponentials and sums are in fp32, in
runs of at most 256 terms.

Everything else is PyTorch's `scaled_dot_product_attention`: other dtypes and devices, autocast, processors and lengths
for which the table of decisions does not say that ours is faster, forced backends, torch.compile. docs/attention.md has
the measurements.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decisions, native
from .backend import OPS, autocast_enabled, cpu_extension, define, route
from .norm_parts import accumulator

_UNIT = 16  # heads are a multiple of it wide: whole vectors


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """o (B, H, T, D), on our path laid out as (B, T, H, D).

    q: (B, H, T, D), k and v: (B, G, S, D), H a multiple of G; any strides. causal: query i sees the keys 0 … i.
    scale: of the logits; None: 1 / sqrt(D).

    Raises ValueError on shapes that do not fit.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not ours(q, k, v, scale):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return computed(q, k, v, causal, scale)


def computed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """`attention` by our operator, of operands that it `takes`."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, causal, scale)
    return OPS["auto"].attention(q, k, v, causal, scale)[0]


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `attention` runs on our kernel."""
    return takes(q, k, v, scale) and q.shape[2] >= decisions.attention_tokens()


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether our kernel can compute it now, faster or not."""
    return (
        not torch.compiler.is_compiling()
        and q.dtype is torch.float32
        and k.dtype is torch.float32
        and v.dtype is torch.float32
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.shape[-1] % _UNIT == 0
        and 0 < q.shape[-1] <= 256
        and q.numel() > 0
        and k.shape[2] > 0
        and scale > 0
        and route(q.device) == "auto"
        and cpu_extension() is not None
        and not native.transformed(q, k, v)
        and not autocast_enabled(q.device)
        and torch.get_float32_matmul_precision() == "highest"
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out, log_sum = OPS["auto"].attention(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, out, log_sum = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            exact = formula(q, k, v, ctx.causal, ctx.scale)[0]
            needed = [t for t, need in zip((q, k, v), ctx.needs_input_grad) if need]
            found = iter(torch.autograd.grad(exact, needed, dout, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None
        return *OPS["auto"].attention_backward(dout, q, k, v, out, log_sum, ctx.causal, ctx.scale), None, None


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o and the logarithms of the sums, differentiable."""
    acc = accumulator(q, k, v)
    queries, keys, values = (t.to(acc) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    s = scale * queries @ keys.transpose(2, 3)
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).tril(), float("-inf"))
    log_sum = torch.logsumexp(s, dim=-1)
    return ((s - log_sum.unsqueeze(-1)).exp() @ values).to(q.dtype), log_sum


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, H, T, D), laid out as (B, T, H, D), and the logarithms of the sums (B, H, T)."""
    out, log_sum = formula(q, k, v, causal, scale)
    return _by_tokens(out), log_sum


def backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, laid out as (B, T, H, D)."""
    acc = accumulator(q, k, v)
    do, queries, keys, values, o = (t.to(acc) for t in (dout, q, k, v, out))
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    p = (scale * queries @ keys.transpose(2, 3) - log_sum.to(acc).unsqueeze(-1)).exp()
    p = p.tril() if causal else p
    ds = p * (do @ values.transpose(2, 3) - (do * o).sum(-1, keepdim=True))
    dq, dk, dv = scale * ds @ keys, scale * ds.transpose(2, 3) @ queries, p.transpose(2, 3) @ do
    dk, dv = (t.unflatten(1, (k.shape[1], group)).sum(2) for t in (dk, dv))
    return _by_tokens(dq.to(q.dtype)), _by_tokens(dk.to(k.dtype)), _by_tokens(dv.to(v.dtype))


def _by_tokens(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention: q must be (B, H, T, D), k and v alike (B, G, S, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must have the same B and D, "
            f"and q a multiple of k's heads"
        )


def _fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_by_tokens(q), q.new_empty(q.shape[:3], dtype=accumulator(q, k, v))


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_by_tokens(q), _empty_by_tokens(k), _empty_by_tokens(v)


def _empty_by_tokens(t: Tensor) -> Tensor:
    b, h, n, d = t.shape
    return t.new_empty(b, n, h, d).transpose(1, 2)


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor out, Tensor log_sum)",
    reference=reference,
    fake=_fake,
)
define(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum, bool causal, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    reference=backward_reference,
    fake=_fake_backward,
)
