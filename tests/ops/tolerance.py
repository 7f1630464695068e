"""The tolerance of the operator tests."""

from __future__ import annotations

import torch
from torch import Tensor


def no_worse(ours: Tensor, torchs: Tensor, exact: Tensor, magnitude: Tensor | None = None) -> None:
    """Our error against float64 is at most twice that of PyTorch in the same dtype.

    One rounding of the largest value is granted besides, and one fp32 rounding of the largest sum of magnitudes where
    `magnitude` has those sums: PyTorch may happen to be exact.
    """
    assert ours.dtype == torchs.dtype and ours.shape == exact.shape
    if ours.numel() == 0:
        return
    theirs = (torchs.double() - exact).abs().max().item()
    unit = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    if magnitude is not None:
        unit += torch.finfo(torch.float32).eps * magnitude.abs().max().item()
    assert (ours.double() - exact).abs().max().item() <= 2 * theirs + unit
