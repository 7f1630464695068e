"""The Triton embedding against the float64 reference; the gradient of A adds up the tokens of an index in one order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastpeft.kernels.lora_embedding import lora_embedding, lora_embedding_backward

from fastpeft.ops.lora_embedding import embedding_backward_reference, embedding_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    "tokens, vocabulary, width, r, padding, dtype, adapter, index",
    [
        (37, 11, 40, 4, 3, FP32, FP32, torch.int64),
        (37, 50, 130, 16, -1, BF16, BF16, torch.int32),
        (150, 3, 33, 8, -1, BF16, FP32, torch.int64),  # runs longer than a block
        (20, 9, 33, 200, -1, FP16, FP16, torch.int64),
    ],
)
def test_equals_the_reference(tokens, vocabulary, width, r, padding, dtype, adapter, index, device):
    indices = torch.randint(0, vocabulary, (tokens,), device=device).to(index)
    weight = torch.randn(vocabulary, width, device=device).to(dtype)
    A, B = (torch.randn(*shape, device=device).to(adapter) for shape in ((r, vocabulary), (width, r)))
    dy = torch.randn(tokens, width, device=device).to(dtype)

    def all_three(forward, backward, cast=lambda t: t):
        y = forward(indices, cast(weight), cast(A), cast(B), 2.0, padding)
        return y, *backward(cast(dy), indices, cast(A), cast(B), 2.0, padding)

    exact = all_three(embedding_reference, embedding_backward_reference, torch.Tensor.double)
    eager = all_three(embedding_reference, embedding_backward_reference)
    ours = all_three(lora_embedding, lora_embedding_backward)
    for got, reference, truth in zip(ours, eager, exact, strict=True):
        assert got.dtype == reference.dtype
        error, allowed = ((t.double() - truth).norm() for t in (got, reference))
        assert error <= max(2 * allowed, torch.finfo(got.dtype).eps / 2 * truth.norm())
    if padding >= 0:
        assert not ours[1][:, padding].any()


def test_no_tokens(device):
    weight, A, B = (torch.ones(*shape, device=device) for shape in ((5, 6), (2, 5), (6, 2)))
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert lora_embedding(none, weight, A, B, 1.0).shape == (0, 6)
    dA, dB = lora_embedding_backward(torch.empty(0, 6, device=device), none, A, B, 1.0)
    assert not dA.any() and not dB.any()
