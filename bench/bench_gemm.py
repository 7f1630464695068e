"""Products of matrices on the CPU, ours beside the vendor's; medians of interleaved calls.

    python bench/bench_gemm.py [--threads 2] [--rounds 21] [--rows 16 32 64 512]
    python bench/bench_gemm.py --few [--dtype bfloat16] [--rows 1 2 4 8 16 31]

The first, fp32, in GFLOP/s. Forward: x (M, K) W (N, K)ᵀ. Backward: dy (M, N) W. Onto: dx += dy W. Weights and inputs
are in the caches. The second, few rows, in microseconds: x Wᵀ by the vendor and by `linear_rows`, and the sum of the
weight's bytes as int64, the time of a plain read. Weights of more than 16 MiB come from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fastpeft.ops.backend import OPS

WEIGHTS = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192))


def times(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call, interleaved."""
    for call in calls:
        call()
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, one in zip(calls, found):
            start = time.perf_counter()
            call()
            one.append(time.perf_counter() - start)
    return [statistics.median(one) for one in found]


def few(rows: list[int], dtype: torch.dtype, rounds: int) -> None:
    """The table of few rows."""
    own = OPS["auto"].linear_rows
    print("| M | K | N | plain read | vendor | ours |\n|---|---|---|---|---|---|")
    for m in rows:
        for k, n in (*WEIGHTS, (576, 49152)):
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            found = times(
                [
                    lambda w=w: w.view(torch.int64).sum(),
                    lambda x=x, w=w: torch.nn.functional.linear(x, w),
                    lambda x=x, w=w: own(x, w, None),
                ],
                rounds,
            )
            print(f"| {m} | {k} | {n} | " + " | ".join(f"{1e6 * t:.0f}" for t in found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--few", action="store_true", help="few rows: linear_rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="with --few")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.few:
        few(options.rows or [1, 2, 4, 8, 16, 31], getattr(torch, options.dtype), options.rounds)
        return
    ours, ours_onto = OPS["auto"].gemm, OPS["auto"].gemm_
    print("| M | K | N | forward | ours | backward | ours | onto | ours |\n|---|---|---|---|---|---|---|---|---|")
    for m in options.rows or [16, 32, 64, 512]:
        for k, n in WEIGHTS:
            x, w, dy, dx = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n), torch.zeros(m, k)

            def onto(dx: torch.Tensor = dx, dy: torch.Tensor = dy, w: torch.Tensor = w) -> None:
                ours_onto(dx, dy, w, True)

            found = times(
                [
                    lambda x=x, w=w: torch.mm(x, w.t()),
                    lambda x=x, w=w: ours(x, w.t()),
                    lambda dy=dy, w=w: torch.mm(dy, w),
                    lambda dy=dy, w=w: ours(dy, w),
                    lambda dx=dx, dy=dy, w=w: dx.addmm_(dy, w),
                    onto,
                ],
                options.rounds if m * k * n < 1e9 else max(5, options.rounds // 3),
            )
            print(f"| {m} | {k} | {n} | " + " | ".join(f"{2e-9 * m * n * k / t:.0f}" for t in found) + " |", flush=True)


if __name__ == "__main__":
    main()
