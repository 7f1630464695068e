"""Loss of a language model's head and its gradient: eager, its two matrix products alone, and linear_cross_entropy.

    pytest bench/bench_linear_cross_entropy.py --benchmark-only      one contender at a time
    python bench/bench_linear_cross_entropy.py [--threads 2] [--dtype float32] [--rows 512] [--columns 256 1024]

As a script contenders are interleaved and medians printed: the table of docs/linear_cross_entropy.md. "products"
are logits = h W^T and dh = logits W, done whole. "trained": the head's weight has a gradient too. --columns: also with
tiles so wide, instead of those that the shapes give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.measure.steps import Contender, interleave
from fastpeft.ops import linear_cross_entropy

WIDTH, VOCABULARY = 576, 49152  # SmolLM2-135M's


def contenders(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A forward and backward of each."""
    h = torch.randn(rows, WIDTH).to(dtype).requires_grad_()
    frozen = (torch.randn(VOCABULARY, WIDTH) * WIDTH**-0.5).to(dtype)
    trained = frozen.clone().requires_grad_()
    labels = torch.randint(VOCABULARY, (rows,))

    def eager(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), labels)

    def step(loss: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        h.grad = weight.grad = None
        loss(weight).backward()

    def products() -> Tensor:
        with torch.no_grad():
            return F.linear(h, frozen) @ frozen

    def ours(weight: Tensor) -> Tensor:
        return linear_cross_entropy(h, weight, labels)

    return {
        "products": products,
        "eager": lambda: step(eager, frozen),
        "ours": lambda: step(ours, frozen),
        "eager, trained": lambda: step(eager, trained),
        "ours, trained": lambda: step(ours, trained),
    }


@pytest.mark.parametrize("name", ["products", "eager", "ours", "eager, trained", "ours, trained"])
def test_loss(benchmark: Any, name: str) -> None:
    benchmark(contenders(512, torch.float32)[name])


def with_tiles(columns: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with tiles of that many columns."""
    sweep: Any = sys.modules["fastpeft.ops.cross_entropy_sweep"]
    usual = sweep.tile_shape

    def run() -> None:
        sweep.tile_shape = lambda rows, _, device: (min(rows, 2048), columns)
        try:
            call()
        finally:
            sweep.tile_shape = usual

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--columns", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = contenders(options.rows, getattr(torch, options.dtype))
    calls |= {f"ours, {n} columns": with_tiles(n, calls["ours"]) for n in options.columns}
    steps = [Contender(name, lambda _, call=call: call()) for name, call in calls.items()]
    times = interleave(steps, options.rounds, warmup=1)
    for name, measured in times.items():
        factor = measured.speedup_over(times["eager"])
        print(f"{name:20} {1e3 * measured.median:8.1f} ms   {factor:.2f} times as fast as eager")


if __name__ == "__main__":
    main()
