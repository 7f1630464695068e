"""Philox4x32: the counter-based random numbers behind every dropout mask.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A block of four 32-bit words is a
pure function of a 128-bit counter and a 64-bit key, so any kernel may tile a mask as it likes and nothing is kept for
the backward but the seed. The paper finds 7 rounds to pass BigCrush; fastpeft uses 7.

The mask of a group of projections (member g, row m, column c) is

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (c // 8, m, g, 0)
    value   = half c % 2 (0: low 16 bits, 1: high) of word (c % 8) // 2
    keep    = value >= threshold,  threshold = round(p * 65536)

so the probability realised is `threshold / 65536`, and `keep_scale` is 1/(1 - that).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The 16-bit value below which an element is dropped. Raises ValueError unless 0 <= p <= 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """1/(1 - p) for the probability realised; 0 where everything is dropped."""
    kept = 65536 - threshold(p)
    return 65536 / kept if kept else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """One int64, shape (1,), from the generator of `device`: replaying its state (checkpointing) replays the mask."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, each in an int64 tensor, for broadcastable int64 counters and keys below 2**32.

    The 64-bit products wrap in int64, which keeps their bits; the high half is therefore masked after the shift.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, member: int, rows: int, columns: int, p: float) -> Tensor:
    """The boolean mask (rows, columns) of one member of a group: True where the element is kept.

    seed: int64 tensor of one element; the mask is on its device.
    """
    device = seed.device
    seed = seed.reshape(())
    key = (seed & _WORD, (seed >> 32) & _WORD)
    block = torch.arange((columns + 7) // 8, device=device)[None, :]
    row = torch.arange(rows, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((block, row, zero + member, zero), key)
    halves = [half.expand(rows, block.shape[1]) for word in words for half in (word & 0xFFFF, word >> 16)]
    values = torch.stack(halves, dim=-1).reshape(rows, block.shape[1] * 8)
    return values[:, :columns] >= threshold(p)
