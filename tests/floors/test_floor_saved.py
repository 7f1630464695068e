"""The activations that a patched layer keeps for its backward, term by term."""

from __future__ import annotations

import pytest
import torch
from floors_layer import HEADS, HIDDEN, INTERMEDIATE, KV, RANK, TOKENS, measure

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def documented(size: int, p: float) -> float:
    """Bytes a token in an element size, as in docs/patch.md: what cannot be had again without a matrix product."""
    norms = 2 * (size * HIDDEN + 4)  # the layer's input and the residual stream between attention and MLP; rstd
    attention = size * (2 * HIDDEN + 2 * KV) + 4 * HEADS  # q and k after RoPE, v, the output; log-sum-exp
    swiglu = size * 2 * INTERMEDIATE  # gate, up
    s = size * 7 * RANK
    return norms + attention + swiglu + s + (4 * 8 / TOKENS if p else 0)  # a mask is its seed


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


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_a_layer_of_llama_3_8b(p: float) -> None:
    """What `documented` says of an eighth of the width, at the full width: at most 96,000 bytes a token."""
    hidden, intermediate, heads, kv = 4096, 14336, 32, 1024
    whole = 2 * (2 * hidden + 4) + 2 * (2 * hidden + 2 * kv) + 4 * heads + 4 * intermediate + 2 * 7 * RANK
    assert whole == 94_568
    patched = measure("peft", p, torch.bfloat16).saved
    # All but the log-sum-exp, the two rstd and s grows with the width, which is eight times that of the layer here.
    fixed = 4 * HEADS + 8 + 2 * 7 * RANK
    assert 8 * (patched - fixed) + fixed <= 96_000


def test_one_product_of_q_k_v_would_keep_more() -> None:
    """Why 'auto' keeps the base products of q, k and v apart in training: v's block would hold q and k before RoPE."""
    apart, together = measure("peft").saved, measure("peft", stack="always").saved
    assert together - apart == 4 * (HIDDEN + KV)
