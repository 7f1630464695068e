"""The activations that a patched layer keeps for its backward, term by term."""

from __future__ import annotations

import pytest
import torch
from floors_layer import HEADS, HIDDEN, INTERMEDIATE, KV, RANK, TOKENS, measure

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def documented(size: int, p: float) -> float:
    """Bytes a token in an element size, as in docs/patch.md. The norms and SwiGLU are still the model's own."""
    norms = 2 * (4 * HIDDEN + 4)  # x in fp32, rstd
    inputs = 2 * size * HIDDEN  # of q, k, v and of gate, up: the norms' outputs, once a group
    attention = size * (2 * HIDDEN + 2 * KV) + 4 * HEADS  # q and k after RoPE, v, the output; log-sum-exp
    swiglu = size * 4 * INTERMEDIATE  # gate, silu(gate), up, their product
    s = size * 7 * RANK
    return norms + inputs + attention + swiglu + s + (4 * 8 / TOKENS if p else 0)  # a mask is its seed


@pytest.mark.parametrize("library", ["peft", "fastpeft"])
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(library: str, p: float, dtype: torch.dtype) -> None:
    patched = measure(library, p, dtype).saved
    theirs = measure("peft", p, dtype, patched=False).saved
    floor = documented(dtype.itemsize, p)
    print(f"{library}, dropout {p}, {dtype}: {patched:.1f} bytes a token, documented {floor:.1f}, PEFT {theirs:.1f}")
    assert patched <= floor
    assert patched <= theirs


def test_one_product_of_q_k_v_would_keep_more() -> None:
    """Why 'auto' keeps the base products of q, k and v apart in training: v's block would hold q and k before RoPE."""
    apart, together = measure("peft").saved, measure("peft", stack="always").saved
    assert together - apart == 4 * (HIDDEN + KV)
