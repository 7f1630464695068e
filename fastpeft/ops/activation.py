"""The activations of gated and plain MLPs: each as a formula and its derivative, in ordinary PyTorch.

    silu        x σ(x)                                        Elfwing et al., arXiv:1702.03118
    gelu        x Φ(x) = x (1 + erf(x/√2))/2                  Hendrycks & Gimpel, arXiv:1606.08415
    gelu_tanh   x (1 + tanh u)/2, u = √(2/π) (x + 0.044715 x³)   the same; equal to x σ(2u)
    quick_gelu  x σ(1.702 x)                                  the same
    relu        max(x, 0)
    relu2       max(x, 0)²                                    So et al., arXiv:2109.08668
    relu6       min(max(x, 0), 6)
    hardswish   x relu6(x + 3)/6                              Howard et al., arXiv:1905.02244
    tanh, sigmoid

Where there is no derivative it is PyTorch's. Of the names that Transformers' ACT2FN has besides, `swish` is silu, and
`gelu_new`, `gelu_pytorch_tanh`, `gelu_fast` and `gelu_accurate` are gelu_tanh.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_QUICK = 1.702


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_QUICK * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _d_silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _d_gelu(x: Tensor) -> Tensor:
    return (1 + torch.erf(x * math.sqrt(0.5))) / 2 + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _d_gelu_tanh(x: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x * x * x))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * x * x)


def _d_quick_gelu(x: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * x)
    return s * (1 + _QUICK * x * (1 - s))


def _d_relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _d_relu2(x: Tensor) -> Tensor:
    return 2 * F.relu(x)


def _d_relu6(x: Tensor) -> Tensor:
    return ((x > 0) & (x < 6)).to(x.dtype)


def _d_hardswish(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0))


def _d_tanh(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


def _d_sigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


# name -> (function, derivative); both differentiable.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _d_silu),
    "gelu": (F.gelu, _d_gelu),
    "gelu_tanh": (_gelu_tanh, _d_gelu_tanh),
    "quick_gelu": (_quick_gelu, _d_quick_gelu),
    "relu": (F.relu, _d_relu),
    "relu2": (_relu2, _d_relu2),
    "relu6": (F.relu6, _d_relu6),
    "hardswish": (F.hardswish, _d_hardswish),
    "tanh": (torch.tanh, _d_tanh),
    "sigmoid": (torch.sigmoid, _d_sigmoid),
}


def activation(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The function and its derivative. Raises ValueError on a name that is not here."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}") from None
