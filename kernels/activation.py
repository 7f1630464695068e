"""The activations of `ops/activation.py` on blocks: `value` is the function, `both` the function and its derivative.

Blocks are fp32. ACT is the activation's name, known when the kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAMES = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "relu6", "hardswish", "tanh", "sigmoid")


@triton.jit
def _sigmoid(b_x):
    """σ(x) and 1 - σ(x), which is 0 instead of 1 where σ(x) is 0."""
    b_e = tl.exp(-b_x)
    b_s = 1.0 / (1.0 + b_e)
    return b_s, tl.minimum(b_e, 1e38) * b_s


@triton.jit
def _tanh(b_x):
    b_a = tl.abs(b_x)
    b_z = b_x * b_x
    b_p = -0.005905868485569954 * b_z + 0.02080538496375084
    b_p = b_p * b_z - 0.053786683827638626
    b_p = b_p * b_z + 0.13331958651542664
    b_p = b_p * b_z - 0.33333298563957214
    b_large = 1.0 - 2.0 / (tl.exp(2.0 * b_a) + 1.0)
    return tl.where(b_a < 0.6, b_x + b_x * b_z * b_p, tl.where(b_x < 0.0, -b_large, b_large))


@triton.jit
def value(b_x, ACT: tl.constexpr):
    """act(x)."""
    b_f, _ = both(b_x, ACT)
    return b_f


@triton.jit
def both(b_x, ACT: tl.constexpr):
    """act(x) and act'(x); where only one is used the compiler drops the other's arithmetic."""
    b_zero = tl.zeros(b_x.shape, tl.float32)
    if ACT == "silu" or ACT == "quick_gelu" or ACT == "gelu_tanh":
        # All three are x σ(u).
        if ACT == "silu":
            b_u = b_x
            b_slope = b_zero + 1.0
        elif ACT == "quick_gelu":
            b_u = 1.702 * b_x
            b_slope = b_zero + 1.702
        else:
            b_u = b_x * (0.0713548162726 * b_x * b_x + 1.5957691216057308)
            b_slope = 0.2140644488178 * b_x * b_x + 1.5957691216057308
        b_s, b_rest = _sigmoid(b_u)
        b_f = b_x * b_s
        b_d = b_s + b_f * b_rest * b_slope
    elif ACT == "gelu":
        b_phi = 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        b_f = b_x * b_phi
        b_d = b_phi + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
    elif ACT == "tanh":
        b_f = _tanh(b_x)
        b_d = 1.0 - b_f * b_f
    elif ACT == "sigmoid":
        b_f, b_rest = _sigmoid(b_x)
        b_d = b_f * b_rest
    elif ACT == "hardswish":
        b_inner = tl.where(b_x > -3.0, tl.where(b_x < 3.0, b_x + 3.0, 6.0), b_zero)
        b_f = tl.where(b_x == b_x, b_x * (b_inner / 6.0), b_x)
        b_d = tl.where(b_x > -3.0, tl.where(b_x < 3.0, b_x / 3.0 + 0.5, 1.0), b_zero)
    else:
        b_r = tl.where(b_x < 0.0, b_zero, b_x)  # NaN stays
        if ACT == "relu2":
            b_f = b_r * b_r
            b_d = 2.0 * b_r
        elif ACT == "relu6":
            b_f = tl.where(b_r > 6.0, 6.0, b_r)
            b_d = tl.where((b_x > 0.0) & (b_x < 6.0), 1.0, b_zero)
        else:
            tl.static_assert(ACT == "relu", "unknown activation")
            b_f = b_r
            b_d = tl.where(b_x > 0.0, 1.0, b_zero)
    return b_f, b_d
