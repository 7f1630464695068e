"""The steps of a LoRA group: each on the operator of `products`, or on the vendor's GEMM where that is faster.

Microseconds of thread time on a Zen 4 core (AVX-512), x (512, 576), r = 16, everything in cache, ours / PyTorch's (MKL,
oneDNN):

                      fp32        bf16        fp16
    shrink             99 / 136   112 /  81   115 /  486
    expand            131 / 120   142 /  85   122 / 4592
    expand_backward   216 / 269   199 / 155   204 / 3727
    shrink_backward   214 / 237   253 / 183   246 / 4354
    the same with dropout: 150 and 287 (fp32) beside 1700 to 2700 for F.dropout alone

Straight behind the product that made y, as a layer has it, an fp32 expand takes 350 / 329, (512, 1536) 578 / 864 and
(4096, 576) 1925 / 2838: y is on its way out of the cache, and the kernel asks for it ahead of time. So on the CPU, with
operands of one dtype, bf16 without dropout takes the vendor's products throughout; everything else runs on the
kernels. Whatever the backend, the results differ in rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import OPS, cpu_extension


def _vendor(backend: str, t: Tensor) -> bool:
    """Whether t is on a CPU where the kernels and the vendor's GEMM may be chosen between."""
    return backend == "auto" and t.device.type == "cpu" and cpu_extension() is not None


def _scale_members(t: Tensor, scaling: Sequence[float], dim: int) -> Tensor:
    """Each member's block of `t` along `dim` times its scaling, in place."""
    if all(c == scaling[0] for c in scaling):
        return t if scaling[0] == 1.0 else t.mul_(scaling[0])
    for block, c in zip(t.chunk(len(scaling), dim), scaling):
        block.mul_(c)
    return t


def shrink(backend: str, x: Tensor, A: Tensor, scaling: Sequence[float], p: float, seed: Tensor | None) -> Tensor:
    """s (M, G*r)."""
    if seed is None and x.dtype is A.dtype is torch.bfloat16 and _vendor(backend, x):
        return _scale_members(torch.mm(x, A.t()), scaling, 1)
    return OPS[backend].lora_shrink(x, A, scaling, p, seed)


def expand_(backend: str, y: Tensor, s: Tensor, B: Tensor, splits: Sequence[int]) -> None:
    """y += s B^T by members, in place."""
    if not (y.dtype is s.dtype is B.dtype is torch.bfloat16 and _vendor(backend, y)):
        OPS[backend].lora_expand_(y, s, B, splits)
        return
    r, start = B.shape[1], 0
    for g, n in enumerate(splits):
        y.narrow(1, start, n).addmm_(s.narrow(1, g * r, r), B.narrow(0, start, n).t())
        start += n


def expand_backward(backend: str, dy: Tensor, s: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """ds and dB of one member."""
    if dy.dtype is s.dtype is B.dtype is torch.bfloat16 and _vendor(backend, dy):
        return torch.mm(dy, B), torch.mm(dy.t(), s)
    return OPS[backend].lora_expand_backward(dy, s, B)


def shrink_backward(
    backend: str,
    ds: Tensor,
    x: Tensor,
    A: Tensor,
    scaling: Sequence[float],
    p: float,
    seed: Tensor | None,
    dx: Tensor | None,
) -> Tensor:
    """dA (G*r, K); the rim's part of dx is added to dx, where given, in place. May overwrite ds."""
    if seed is None and ds.dtype is x.dtype is A.dtype is torch.bfloat16 and _vendor(backend, x):
        ds = _scale_members(ds, scaling, 1)
        if dx is not None:
            dx.addmm_(ds, A)
        return torch.mm(ds.t(), x)
    return OPS[backend].lora_shrink_backward(ds, x, A, scaling, p, seed, dx)
