"""Optimizers, by the names that Transformers has for them: what each keeps for a parameter.

8-bit and paged ones are bitsandbytes'. Its 8-bit states are one byte an element and an fp32 scale for 256 elements; a
parameter of fewer than 4,096 elements keeps fp32 states. A paged state (from 100,000 elements on) lies in memory
that the driver moves between host and GPU page by page; it counts as the host's, where it goes when the GPU is full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST_8BIT, SMALLEST_PAGED, BLOCK = 4096, 100_000, 256


@dataclass(frozen=True)
class Optimizer:
    """moments: states of a parameter's size. bits: 8, or 0 for the parameter's own dtype."""

    moments: int
    bits: int = 0
    paged: bool = False
    bitsandbytes: bool = False

    def state(self, elements: int, element_size: int) -> tuple[int, int]:
        """Bytes of one parameter's state on the GPU, and of what may be paged out."""
        if self.bits == 8 and elements >= SMALLEST_8BIT:
            size = self.moments * (elements + 4 * -(-elements // BLOCK))
        else:
            # bitsandbytes keeps its states in fp32 whatever the parameter's dtype.
            size = self.moments * elements * (4 if self.bitsandbytes else element_size)
        return (0, size) if self.paged and elements >= SMALLEST_PAGED else (size, 0)

    def states(self, parameters: Iterable[tuple[int, int]]) -> tuple[int, int]:
        """The sum of `state` over (elements, element size) of parameters."""
        sizes = [self.state(*p) for p in parameters]
        return sum(s[0] for s in sizes), sum(s[1] for s in sizes)


OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(2),
    "adamw_torch": Optimizer(2),
    "adamw_8bit": Optimizer(2, bits=8, bitsandbytes=True),
    "paged_adamw_32bit": Optimizer(2, paged=True, bitsandbytes=True),
    "paged_adamw_8bit": Optimizer(2, bits=8, paged=True, bitsandbytes=True),
    "lion_32bit": Optimizer(1, bitsandbytes=True),
    "lion_8bit": Optimizer(1, bits=8, bitsandbytes=True),
    "paged_lion_32bit": Optimizer(1, paged=True, bitsandbytes=True),
    "paged_lion_8bit": Optimizer(1, bits=8, paged=True, bitsandbytes=True),
    "sgd": Optimizer(0),
}
DEFAULT = "adamw_torch_fused"
