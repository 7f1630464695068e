"""How far a replacement may be from what it replaces: both are measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Ours may err at most this many times as much as the original does.
FACTOR = 2.0

# An original further than this from float64 does not compute the formula at all (fp32 may be TF32 inside).
FORMULA = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative root-mean-square error; infinite where there is a NaN."""
    truth = truth.double()
    error = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")
