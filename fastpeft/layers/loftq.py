"""LoftQ (arXiv:2310.08659): a low-rank adapter that makes up for what quantising the weight loses.

Alternating: Q = quantised(W - B A), then B A = the r greatest singular triples of W - Q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def loftq_factors(weight: Tensor, bits: int, r: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantised weight (N, K), decoded, in fp32, and the fp32 factors A (r, K) and B (N, r).

    weight: (N, K), floating. bits: 4 (NF4, blocks of 64) or 8 (int8, a scale for each row).

    Raises ValueError for other bits, for less than one iteration, and without bitsandbytes, which does the quantising.
    """
    if bits not in (4, 8):
        raise ValueError("Only nf4 and int8 quantization is supported")
    if iterations <= 0:
        raise ValueError("Number of iterations must be greater than 0")
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise ValueError("bitsandbytes is not available, please install it to use LoftQ.") from error
    weight = weight.float().contiguous()
    rest = weight
    for _ in range(iterations):
        quantised = _round_trip(bnb, rest, bits)
        A, B = residual_factors(weight, quantised, r)
        rest = weight - B @ A
    return quantised, A, B


def residual_factors(weight: Tensor, quantised: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r): the r greatest singular triples of weight - quantised, each root on its side."""
    U, S, Vh = torch.linalg.svd(weight - quantised, full_matrices=False)
    root = S[:r].sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


def _round_trip(bnb: Any, weight: Tensor, bits: int) -> Tensor:
    if bits == 4:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        return bnb.dequantize_4bit(packed, state)
    packed, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return bnb.int8_vectorwise_dequant(packed, scales).float()
