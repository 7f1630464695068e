"""Products of large fp32 matrices on the CPU: ours where they take less time than the vendor's, which is then theirs.

    mm(a, b) = a b        addmm_(y, a, b): y += a b        linear(x, W, bias) = x Wᵀ + bias

and, with a gain for each term of the sums (DoRA's, in the backward), a diag(gain) b. A linear layer's product for few
rows, of any dtype, is another operator (`linear_rows`).

Sums are runs of at most 320 terms in fp32. docs/gemm.md has the measurements and when each is taken: by the table of
decisions, for operands of at least so many rows, and for no smaller matrix than 64 x 64. The vendor's product stays for
every other dtype and device, on a forced backend, where `torch.set_float32_matmul_precision` allows less than fp32, and
under torch.compile, which may fuse something with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decisions
from .backend import OPS, cpu_extension, define
from .linear_rows import few

_LEAST = 64  # columns and terms: two panels, and packing that is worth it


def ours(backend: str, a: Tensor, b: Tensor) -> bool:
    """Whether a (M, K) times b (K, N) runs on our kernel."""
    return (
        backend == "auto"
        and a.dtype is torch.float32
        and b.dtype is torch.float32
        and a.device.type == "cpu"
        and b.shape[1] >= _LEAST
        and b.shape[0] >= _LEAST
        and not torch.compiler.is_compiling()
        and a.shape[0] >= decisions.gemm_rows()
        and cpu_extension() is not None
        and torch.get_float32_matmul_precision() == "highest"
    )


def mm(backend: str, a: Tensor, b: Tensor, out: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
    """a (M, K) diag(gain) b (K, N), into `out` (M, N) where that is given. gain (K) or, of ones, None."""
    if not ours(backend, a, b):
        a = a if gain is None else a * gain
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return OPS["auto"].gemm(a, b, gain)
    OPS["auto"].gemm_(out, a, b, False, gain)
    return out


def addmm_(backend: str, y: Tensor, a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor:
    """y (M, N) += a (M, K) diag(gain) b (K, N), in place. Returns y."""
    if not ours(backend, a, b) or y.dtype is not torch.float32:
        return y.addmm_(a if gain is None else a * gain, b)
    OPS["auto"].gemm_(y, a, b, True, gain)
    return y


def linear(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) transposed, plus bias (N)."""
    if out is None and few(backend, x, weight):
        return OPS["auto"].linear_rows(x, weight, bias)
    wide = weight.t()
    if not ours(backend, x, wide):
        if out is None:
            return F.linear(x, weight, bias)
        return torch.mm(x, wide, out=out) if bias is None else torch.addmm(bias, x, wide, out=out)
    if bias is None:
        return mm(backend, x, wide, out)
    return mm(backend, x, wide, out).add_(bias)


def reference(a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor:
    """a (M, K) diag(gain) b (K, N)."""
    return torch.mm(a if gain is None else a * gain, b)


def reference_(y: Tensor, a: Tensor, b: Tensor, add: bool, gain: Tensor | None = None) -> None:
    """y (M, N) = or += a diag(gain) b, in place."""
    a = a if gain is None else a * gain
    if add:
        y.addmm_(a, b)
    else:
        y.copy_(torch.mm(a, b))


def _fake_(y: Tensor, a: Tensor, b: Tensor, add: bool, gain: Tensor | None = None) -> None:
    return None


def _fake(a: Tensor, b: Tensor, gain: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


define("gemm", "(Tensor a, Tensor b, Tensor? gain=None) -> Tensor", reference=reference, fake=_fake)
define(
    "gemm_",
    "(Tensor(a!) y, Tensor a, Tensor b, bool add, Tensor? gain=None) -> ()",
    reference=reference_,
    fake=_fake_,
)
