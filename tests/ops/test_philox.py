"""Dropout masks: the generator is the published one, and every implementation draws the same bits."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops import philox

# Known answers of Random123 (kat_vectors): rounds, counter, key, result.
KNOWN = [
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_known_answers(rounds: int, counter: tuple, key: tuple, expected: tuple) -> None:
    as_tensors = [torch.tensor(v) for v in (*counter, *key)]
    words = philox.philox4x32(tuple(as_tensors[:4]), tuple(as_tensors[4:]), rounds)
    assert tuple(int(w) for w in words) == expected


def test_a_mask_is_made_of_the_halves_of_the_words() -> None:
    seed, member, row, column = 0x0123456789ABCDEF, 2, 5, 19
    t = torch.tensor
    words = philox.philox4x32((t(column // 8), t(row), t(member), t(0)), (t(seed & 0xFFFFFFFF), t(seed >> 32)))
    value = int(words[column % 8 // 2]) >> 16 * (column % 2) & 0xFFFF
    for p in (value / 65536, (value + 1) / 65536):
        assert philox.keep_mask(t([seed]), member, 6, 20, p)[row, column] == (value >= philox.threshold(p))


def test_the_probability_is_realised_and_members_differ() -> None:
    seed = torch.tensor([77])
    first, second = (philox.keep_mask(seed, g, 400, 500, 0.1) for g in (0, 1))
    assert abs(first.double().mean() - 0.9) < 4 * (0.09 / first.numel()) ** 0.5
    assert abs((first ^ second).double().mean() - 0.18) < 0.005  # independent: 2 * 0.9 * 0.1
    assert torch.equal(first[:100, :300], philox.keep_mask(seed, 0, 100, 300, 0.1))  # of any tile the same


def test_the_scale_keeps_the_mean() -> None:
    assert philox.keep_scale(0.5) == 2.0
    assert philox.keep_scale(0.1) == 65536 / (65536 - 6554)  # of the probability realised, not the one asked for
    assert philox.keep_scale(1.0) == 0.0
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            philox.threshold(p)


def masks_of_the_kernels(seed: torch.Tensor, members: int, rows: int, columns: int, p: float) -> list[torch.Tensor]:
    """The masks lora_shrink uses: with x all ones and A the identity, s is the mask."""
    eye = torch.eye(columns).repeat(members, 1)
    s = torch.ops.fastpeft.lora_shrink(torch.ones(rows, columns), eye, [1.0] * members, p, seed)
    return [part != 0 for part in s.chunk(members, dim=1)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 2])
@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.97])
def test_every_instruction_set_draws_the_same_bits(isa: str, seed: int, p: float) -> None:
    seeds, rows, columns = torch.tensor([seed]), 27, 203
    for g, mask in enumerate(masks_of_the_kernels(seeds, 3, rows, columns, p)):
        assert torch.equal(mask, philox.keep_mask(seeds, g, rows, columns, p))


def test_everything_is_dropped_at_one(isa: str) -> None:
    assert not masks_of_the_kernels(torch.tensor([3]), 1, 5, 70, 1.0)[0].any()


def test_the_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, philox.draw_seed(torch.device("cpu")))
    assert first.dtype == torch.int64 and first.shape == (1,)
