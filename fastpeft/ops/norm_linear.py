"""A norm and the projections that read its output, the norm's input kept for all of them.

    n = rms_norm(x) or layer_norm(x)
    y_g = n W_g^T + bias_g + c_g dropout_g(n) A_g^T B_g^T

The formulas are those of `rms_norm`, `layer_norm` and `lora_linear_group`; `joined` says what joining saves. Kept per
token: x (which the residual stream needs anyway), one or two numbers, and the adapters' s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import OPS
from .joined import joined
from .layer_norm import formula as layer_norm_formula
from .nf4 import Weight4bit
from .rms_norm import formula as rms_norm_formula


@dataclass(frozen=True)
class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) * (offset + weight) in out_dtype; inputs (x, weight)."""

    eps: float
    offset: float
    out_dtype: torch.dtype

    def forward(
        self,
        backend: str,
        inputs: Sequence[Any],
        A: Tensor | None,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        x, weight = inputs
        if A is None:
            y, rstd = OPS[backend].rms_norm(x, weight, self.eps, self.offset, self.out_dtype)
            return y, None, (rstd,)
        y, rstd, s = OPS[backend].rms_norm_shrink(x, weight, self.eps, self.offset, A, scaling, p, seed, self.out_dtype)
        return y, s, (rstd,)

    def again(self, backend: str, inputs: Sequence[Any], extras: Sequence[Tensor]) -> Tensor:
        return OPS[backend].rms_norm(*inputs, self.eps, self.offset, self.out_dtype)[0]

    def backward(
        self, backend: str, dn: Tensor, inputs: Sequence[Any], extras: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        x, weight = inputs
        found = OPS[backend].rms_norm_backward(dn, x, extras[0], weight, self.offset, None, needs[1])
        return _wanted(found, needs)

    def backward_rim(
        self,
        backend: str,
        dn: Tensor,
        ds: Tensor,
        inputs: Sequence[Any],
        extras: Sequence[Tensor],
        A: Tensor,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        x, weight = inputs
        dx, dA, d_weight = OPS[backend].rms_norm_shrink_backward(
            dn, ds, x, extras[0], weight, self.offset, A, scaling, p, seed, self.out_dtype, *needs
        )
        return _wanted((dx, d_weight), needs), dA

    def native(self, inputs: Sequence[Any]) -> Tensor:
        x, weight = inputs
        return rms_norm_formula(x, weight, self.eps, self.offset, self.out_dtype)


@dataclass(frozen=True)
class LayerNorm:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * (offset + weight) + bias in out_dtype; inputs (x, weight, bias)."""

    eps: float
    offset: float
    out_dtype: torch.dtype

    def forward(
        self,
        backend: str,
        inputs: Sequence[Any],
        A: Tensor | None,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        if A is None:
            y, *extras = OPS[backend].layer_norm(*inputs, self.eps, self.offset, self.out_dtype)
            return y, None, tuple(extras)
        y, mean, rstd, s = OPS[backend].layer_norm_shrink(
            *inputs, self.eps, self.offset, A, scaling, p, seed, self.out_dtype
        )
        return y, s, (mean, rstd)

    def again(self, backend: str, inputs: Sequence[Any], extras: Sequence[Tensor]) -> Tensor:
        return OPS[backend].layer_norm(*inputs, self.eps, self.offset, self.out_dtype)[0]

    def backward(
        self, backend: str, dn: Tensor, inputs: Sequence[Any], extras: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        x, weight, bias = inputs
        found = OPS[backend].layer_norm_backward(dn, x, *extras, weight, bias, self.offset, None, *needs[1:])
        return _wanted(found, needs)

    def backward_rim(
        self,
        backend: str,
        dn: Tensor,
        ds: Tensor,
        inputs: Sequence[Any],
        extras: Sequence[Tensor],
        A: Tensor,
        scaling: Sequence[float],
        p: float,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        x, weight, bias = inputs
        dx, dA, *d_parameters = OPS[backend].layer_norm_shrink_backward(
            dn, ds, x, *extras, weight, bias, self.offset, A, scaling, p, seed, self.out_dtype, *needs
        )
        return _wanted((dx, *d_parameters), needs), dA

    def native(self, inputs: Sequence[Any]) -> Tensor:
        x, weight, bias = inputs
        return layer_norm_formula(x, weight, bias, self.eps, self.offset, self.out_dtype)


def norm_linear(
    norm: RMSNorm | LayerNorm,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    weights: Sequence[Tensor | Weight4bit],
    biases: Sequence[Tensor | None],
    lora_A: Sequence[Tensor | None],
    lora_B: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    *,
    stacked_weight: Tensor | None = None,
    stacked_bias: Tensor | None = None,
    magnitudes: Sequence[Tensor] | None = None,
    told: Sequence[bool] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(n, outputs): the norm of x (..., K) and what its projections make of it, each (..., N_g).

    parameters: the norm's own, (weight,) or (weight, bias), each (K,) or None. The lists are those of
    `lora_linear_group`; base weights may be trained or frozen, and must have n's dtype or be of 4 bits. Autocast is
    not looked at.
    magnitudes: of DoRA adapters, which every projection then has (`dora_joined`). told: as in `dora_linear_group`.

    Raises ValueError on shapes that do not fit.
    """
    if any(w.shape[1] != x.shape[-1] for w in weights):
        raise ValueError(f"norm_linear: x is {tuple(x.shape)}, a weight is {tuple(weights[0].shape)}")
    return joined(
        norm,
        (x, *parameters),
        weights,
        biases,
        lora_A,
        lora_B,
        scaling,
        dropout_p,
        stacked_weight=stacked_weight,
        stacked_bias=stacked_bias,
        magnitudes=magnitudes,
        told=told,
    )


def _wanted(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [t if need else None for t, need in zip(found, needs)]
