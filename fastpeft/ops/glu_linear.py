"""An activation, gated or not, and the projections that read it (`down`), gate and up kept for all of them.

    h = act(gate) * up, or act(gate)
    y_g = h W_g^T + bias_g + c_g dropout_g(h) A_g^T B_g^T

The formulas are those of `glu` and `lora_linear_group`; `joined` says what joining saves. Kept per token: gate, up and
the adapters' s, where eager code keeps act(gate) and h as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backend import OPS
from .glu import glu_reference
from .joined import joined
from .nf4 import Weight4bit


@dataclass(frozen=True)
class Glu:
    """h = act(gate) * up; inputs (gate, up), up may be None."""

    act: str

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
            return OPS[backend].glu(*inputs, self.act), None, ()
        h, s = OPS[backend].glu_shrink(*inputs, self.act, A, scaling, p, seed)
        return h, s, ()

    def again(self, backend: str, inputs: Sequence[Any], extras: Sequence[Tensor]) -> Tensor:
        return OPS[backend].glu(*inputs, self.act)

    def backward(
        self, backend: str, dn: Tensor, inputs: Sequence[Any], extras: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return OPS[backend].glu_backward(dn, *inputs, self.act)

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
        d_gate, d_up, dA = OPS[backend].glu_shrink_backward(dn, ds, *inputs, self.act, A, scaling, p, seed, True)
        return (d_gate, d_up), dA

    def native(self, inputs: Sequence[Any]) -> Tensor:
        gate, up = inputs
        return glu_reference(gate, up, self.act)


def glu_linear(
    gate: Tensor,
    up: Tensor | None,
    act: str,
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(h, outputs): act(gate) * up (..., K) and what the projections make of it, each (..., N_g).

    gate, up: (..., K) of one dtype, any strides; up may be None. act: as in `glu`. The lists are those of
    `lora_linear_group`; base weights may be trained or frozen, and must have gate's dtype or be of 4 bits. Autocast is
    not looked at.
    magnitudes: of DoRA adapters, which every projection then has (`dora_joined`).

    Raises ValueError on shapes that do not fit.
    """
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"glu_linear: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if any(w.shape[1] != gate.shape[-1] for w in weights):
        raise ValueError(f"glu_linear: gate is {tuple(gate.shape)}, a weight is {tuple(weights[0].shape)}")
    return joined(
        Glu(act),
        (gate, up),
        weights,
        biases,
        lora_A,
        lora_B,
        scaling,
        dropout_p,
        stacked_weight=stacked_weight,
        stacked_bias=stacked_bias,
        magnitudes=magnitudes,
    )
