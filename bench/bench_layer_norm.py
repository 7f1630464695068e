"""A training step (forward and backward) of LayerNorm, parameters frozen, against F.layer_norm.

    pytest bench/bench_layer_norm.py --benchmark-only         one contender at a time
    python bench/bench_layer_norm.py [--threads 1] [--rounds 30]

As a script the contenders are interleaved and medians in microseconds are printed: the table of docs/norms.md. With one
thread, times are thread time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_lora_linear import interleaved
from bench_rms_norm import DTYPES, EPS, SHAPES, show
from torch import Tensor

from fastpeft.ops import layer_norm


def contenders(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Forward and backward, one entry a contender."""
    x, dy = torch.randn(rows, columns).to(dtype).requires_grad_(), torch.randn(rows, columns).to(dtype)
    w, b = torch.ones(columns).to(dtype), torch.zeros(columns).to(dtype)

    def step(norm: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(norm(x), x, dy)

    return {
        "F.layer_norm": step(lambda x: F.layer_norm(x, (columns,), w, b, EPS)),
        "ours": step(lambda x: layer_norm(x, w, b, EPS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    for dtype in DTYPES:
        for shape in SHAPES:
            found = interleaved(contenders(*shape, dtype), args.rounds, clock, warm=True)
            show(f"{str(dtype)[6:]} {shape}", found)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("contender", ["F.layer_norm", "ours"])
def test_training_step(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    benchmark.group = f"layer_norm {shape} {dtype}"
    benchmark(contenders(*shape, dtype)[contender])


if __name__ == "__main__":
    main()
