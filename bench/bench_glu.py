"""Activations, forward and backward, ours beside eager PyTorch, in microseconds of thread time.

    python bench/bench_glu.py [--threads 1] [--rounds 15]

Contenders are interleaved; medians, and ours as a part of eager's. The margin form also makes the adapter's s, and in
the backward dA and the rim: beside it stand eager's activation and the products it replaces, from fastpeft's operators.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

OPS = torch.ops.fastpeft


def contenders(rows: int, width: int, dtype: torch.dtype, r: int = 16) -> dict[str, tuple[Callable, Callable]]:
    """name -> (eager, ours)"""
    import fastpeft.ops  # noqa: F401

    gate, up, dh = (torch.randn(rows, width, dtype=dtype) for _ in range(3))
    A, ds = torch.randn(r, width, dtype=dtype), torch.randn(rows, r, dtype=dtype)
    seed, c = torch.tensor([5]), [2.0]
    act = F.silu(gate)

    def eager_backward() -> None:
        torch.ops.aten.silu_backward(dh * up, gate)
        dh * act

    def eager_margin() -> None:
        OPS.lora_shrink(F.silu(gate) * up, A, c, 0.05, seed)

    def eager_margin_backward() -> None:
        h, total = act * up, dh.clone()  # clone: the product that made dh would have been free to be added to
        OPS.lora_shrink_backward(ds, h, A, c, 0.05, seed, total)
        torch.ops.aten.silu_backward(total * up, gate)
        total * act

    return {
        "forward": (lambda: F.silu(gate) * up, lambda: OPS.glu(gate, up, "silu")),
        "backward": (eager_backward, lambda: OPS.glu_backward(dh, gate, up, "silu")),
        "forward with s": (eager_margin, lambda: OPS.glu_shrink(gate, up, "silu", A, c, 0.05, seed)),
        "backward with dA and rim": (
            eager_margin_backward,
            lambda: OPS.glu_shrink_backward(dh, ds, gate, up, "silu", A, c, 0.05, seed, True),
        ),
    }


def compare(pairs: dict[str, tuple[Callable, Callable]], rounds: int, label: str) -> None:
    """Medians of interleaved calls, a Markdown row each."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for name, (eager, ours) in pairs.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds + 2):
            for function, taken in zip((eager, ours), times):
                start = clock()
                function()
                taken.append(clock() - start)
        e, o = (statistics.median(taken[2:]) * 1e6 for taken in times)
        print(f"| {label} | {name} | {e:.0f} | {o:.0f} | {o / e:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| shape | what | eager | ours | ratio |\n|---|---|---|---|---|")
    with torch.no_grad():
        for width in (1536, 14336):
            for dtype in (torch.float32, torch.bfloat16):
                label = f"(512, {width}) {str(dtype)[6:]}"
                compare(contenders(512, width, dtype), options.rounds, label)


if __name__ == "__main__":
    main()
