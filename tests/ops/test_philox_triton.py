"""Dropout masks made by Triton are the reference's, bit for bit: a forward and its backward may run on two backends."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels import philox as kernel

from fastpeft.ops import philox


@pytest.mark.parametrize("rows, columns, member, p", [(1, 1, 0, 0.5), (17, 515, 2, 0.05), (40, 256, 5, 0.999)])
@pytest.mark.parametrize("seed", [0, 1234567890123456789, 2**63 - 1])
def test_mask_is_the_references(rows, columns, member, p, seed, device):
    seed = torch.tensor([seed], device=device)
    expected = philox.keep_mask(seed, member, rows, columns, p)
    assert torch.equal(kernel.dropout_mask(seed, rows, columns, member, p), expected)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 1 / 3, 0.9, 1.0])
def test_realised_probability_is_the_references(p):
    assert kernel.threshold(p) == philox.threshold(p)
    assert kernel.kept_scale(3.0, p) == pytest.approx(3.0 * philox.keep_scale(p), rel=1e-12)
