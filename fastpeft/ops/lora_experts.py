"""LoRA on the stacked weights of a mixture's experts, for rows that lie sorted by expert.

    y = x W_e + c x A_e^T B_e^T        for the rows of expert e, which are offsets[e-1] … offsets[e]

x (M, K), W (E, K, N), A (E, r, K), B (E, N, r), offsets (E,), c a float: `torch._grouped_mm` with the adapter's two
narrow products (LoRA: Hu et al., 2021, eq. 3, for each expert). W is frozen. W_e + c A_e^T B_e^T is never made, nor its
gradient, both as large as all experts. The backward keeps x, s = c x A_e^T and the parameters:

    ds = dy B_e        dA_e = c ds^T x
    dB_e = dy^T s      dx = dy W_e^T + c ds A_e

On the CPU, where the offsets can be read, each expert's rows take the products of one layer (`gemm`, `steps`), and the
outputs lie in one tensor. Elsewhere reading them would wait for the device: there all products are torch._grouped_mm,
with the rank padded to its alignment of 16 bytes. Rows behind the last offset belong to nobody: they are zero on the
CPU, and elsewhere, in the output and in dx, what torch._grouped_mm leaves there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, steps
from .backend import OPS, exact, route
from .linear_rows import few
from .lora_linear import rows_of
from .products import MAX_RANK

# From so many rows of an expert on its products are those of a layer. Below, each weight comes from memory for little,
# and our product packs it first: dx over 64 experts of (768, 1024) takes 94 ms with 64 rows each and 90 by MKL's, 152
# and 154 with 128, 279 and 289 with 256 (fp32, one Zen 4 core). Few rows are `linear_rows`.
_ROWS = 128
_ALIGNMENT = 16  # bytes, of a row of what torch._grouped_mm multiplies
# What the lent stacks of `layers.weight_sum` ask for.
GROUPED_MM: Any = getattr(torch, "_grouped_mm", None)


def reference(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """y (M, N); differentiable by PyTorch."""
    parts, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        rows = x[start:end]
        parts.append(torch.add(rows @ weight[e], (rows @ lora_A[e].mT) @ lora_B[e].mT, alpha=scaling))
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, weight.shape[2])])


def lora_experts(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor) -> Tensor:
    """y (M, N) in x's dtype, from rows sorted by expert.

    x: (M, K). weight: (E, K, N), any strides (a transposed view of (E, N, K) too), frozen. lora_A: (E, r, K), lora_B:
    (E, N, r), r from 1 to 512. All of one floating dtype, under autocast too, as torch._grouped_mm takes them.
    offsets: (E,) int32, on x's device: where each expert's rows end.

    Raises ValueError on shapes or dtypes that do not fit and on a weight that is trained.
    """
    _check(x, weight, lora_A, lora_B, offsets)
    on_host = _on_host(x.device)
    return _LoraExperts.apply(x, weight, lora_A, lora_B, float(scaling), offsets, on_host, route(x.device))


def _on_host(device: torch.device) -> bool:
    """The offsets can be read without waiting for a device."""
    return device.type == "cpu"


class _LoraExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        offsets: Tensor,
        on_host: bool,
        backend: str,
    ) -> Tensor:
        with exact(x.device):
            if on_host:
                y, s = _forward(rows_of(x), weight, A, B, scaling, offsets.tolist(), backend)
            else:
                y, s = _forward_on_device(x, weight, A, B, scaling, offsets)
        # x is kept for dA and s for dB: a frozen adapter needs neither.
        trainable = A.requires_grad or B.requires_grad
        ctx.save_for_backward(x if trainable else None, s if trainable else None, weight, A, B, offsets)
        ctx.call = scaling, on_host, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, s, weight, A, B, offsets = ctx.saved_tensors
        scaling, on_host, backend = ctx.call
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable(dy, x, weight, A, B, scaling, offsets, needs)
        with exact(dy.device):
            if on_host:
                found = _backward(rows_of(dy), x, s, weight, A, B, scaling, offsets.tolist(), backend, needs[0])
            else:
                found = _backward_on_device(dy, x, s, weight, A, B, scaling, offsets, needs[0])
        dx, dA, dB = found
        return dx, None, dA if needs[2] else None, dB if needs[3] else None, None, None, None, None


def _forward(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, ends: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    if x.shape[0] >= len(ends):
        A, B = unit_stride(A), unit_stride(B)
    y, s = x.new_empty(x.shape[0], weight.shape[2]), x.new_empty(x.shape[0], A.shape[1])
    c, n, start = (scaling,), (y.shape[1],), 0
    for e, end in enumerate(ends):
        if end > start:
            rows, out = x[start:end], y[start:end]
            _product(backend, rows, weight[e].t(), out)
            rim = steps.shrink(backend, rows, A[e], c, 0.0, None)
            steps.expand_(backend, out, rim, B[e], n)  # straight behind the product: `out` is in the cache
            s[start:end] = rim
            start = end
    y[start:].zero_()
    s[start:].zero_()
    return y, s


def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    ends: list[int],
    backend: str,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if need_dx else None
    dA = dB = None
    if x is not None and s is not None:
        x = rows_of(x)
        dA, dB = torch.empty_like(A), torch.empty_like(B)
    c, start = (scaling,), 0
    for e, end in enumerate(ends):
        if end <= start:
            if dA is not None and dB is not None:
                dA[e], dB[e] = 0.0, 0.0
            continue
        d_out = dy[start:end]
        d_rows = None if dx is None else _product(backend, d_out, weight[e], dx[start:end])
        if dA is None or dB is None or x is None or s is None:
            if d_rows is not None:  # dA, formed of d_rows for want of x, is not used
                steps.shrink_backward(backend, torch.mm(d_out, B[e]), d_rows, A[e], c, 0.0, None, d_rows)
        else:
            ds, dB[e] = steps.expand_backward(backend, d_out, s[start:end], B[e])
            dA[e] = steps.shrink_backward(backend, ds, x[start:end], A[e], c, 0.0, None, d_rows)
        start = end
    if dx is not None:
        dx[start:].zero_()
    return dx, dA, dB


def unit_stride(factor: Tensor) -> Tensor:
    """The factor in memory where the kernels can read it, by rows or by columns.

    B lies expert by expert in its columns. As one transposed matrix (E, N r) PyTorch copies it in blocks, as a stack
    element by element: 0.7 and 2.2 ms for E = 64, N = 768, r = 16 on a Zen 4 core.
    """
    if factor.stride(-1) == 1 or factor.stride(-2) == 1:
        return factor
    if factor.dim() == 2:
        return factor.contiguous()
    if factor.shape[-1] > factor.shape[-2]:
        return unit_stride(factor.mT).mT
    return factor.flatten(1).contiguous().view(factor.shape)


def _product(backend: str, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x (M, K) times weight (N, K) transposed, into `out`."""
    if few(backend, x, weight):
        return out.copy_(OPS["auto"].linear_rows(x, weight, None))
    if x.shape[0] < _ROWS:
        return torch.mm(x, weight.t(), out=out)
    return gemm.linear(backend, x, weight, None, out=out)


def _forward_on_device(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    A, B = _aligned(A, B)
    y = GROUPED_MM(x, weight, offs=offsets)
    s = GROUPED_MM(x, A.mT, offs=offsets).mul_(scaling)
    return y.add_(GROUPED_MM(s, B.mT, offs=offsets)), s


def _backward_on_device(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    offsets: Tensor,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    r = A.shape[1]
    A, B = _aligned(A, B)
    dy = dy.contiguous()
    ds = GROUPED_MM(dy, B, offs=offsets).mul_(scaling)
    dx = None
    if need_dx:
        dx = GROUPED_MM(dy, weight.mT, offs=offsets).add_(GROUPED_MM(ds, A, offs=offsets))
    if x is None or s is None:
        return dx, None, None
    dA = GROUPED_MM(ds.t(), x, offs=offsets)
    dB = GROUPED_MM(dy.t(), s, offs=offsets)
    return dx, dA[:, :r], dB[..., :r]


def _differentiable(
    dy: Tensor, x: Any, weight: Tensor, A: Tensor, B: Tensor, scaling: float, offsets: Tensor, needs: tuple[bool, ...]
) -> Any:
    """The gradients as a graph of their own."""
    if x is None:  # a frozen adapter's products do not depend on x
        x = dy.new_zeros(dy.shape[0], weight.shape[1], requires_grad=True)
    wanted = [t for t, needed in ((x, needs[0]), (A, needs[2]), (B, needs[3])) if needed]
    with torch.enable_grad():
        y = reference(x, weight, A, B, scaling, offsets)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    dx, dA, dB = (next(found) if needed else None for needed in (needs[0], needs[2], needs[3]))
    return dx, None, dA, dB, None, None, None, None


def _aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with the rank padded by zeros."""
    r = A.shape[1]
    missing = -r % (_ALIGNMENT // A.element_size())
    return (F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))) if missing else (A.contiguous(), B.contiguous())


def _check(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> None:
    if weight.dim() != 3 or x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"lora_experts: x must be (M, K) and weight (E, K, N), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    experts, k, n = weight.shape
    r = A.shape[1] if A.dim() == 3 else 0
    if A.shape != (experts, r, k) or B.shape != (experts, n, r) or not 1 <= r <= MAX_RANK:
        raise ValueError(
            f"lora_experts: with weight {tuple(weight.shape)}, lora_A must be ({experts}, r, {k}) and lora_B "
            f"({experts}, {n}, r) with r from 1 to {MAX_RANK}, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if offsets.shape != (experts,):
        raise ValueError(f"lora_experts: offsets must be ({experts},), got {tuple(offsets.shape)}")
    if not x.dtype == weight.dtype == A.dtype == B.dtype:
        raise ValueError(
            f"lora_experts: x, weight, lora_A and lora_B must be of one dtype, got {x.dtype}, {weight.dtype}, "
            f"{A.dtype} and {B.dtype}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("lora_experts: the weight must be frozen; its requires_grad is True")
