"""Attention in fp32 on the CPU, forward and backward, ours beside PyTorch's, in microseconds of one step.

    python bench/bench_attention.py [--threads 2] [--rounds 21] [--tokens 16 64 256 1024] [--widths 32 64 128]

9 heads of q over 3 of k and v, batch 2, transposes of (2, T, H D) as projections leave them. Both are called as their
autograd functions are, without and with the gradients of q, k and v; contenders are interleaved, medians. GFLOP/s are
ours, of forward and backward, the products that a causal mask leaves out not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.measure import Contender, interleave
from fastpeft.ops.attention import computed

BATCH, HEADS, KV_HEADS = 2, 9, 3


def contenders(tokens: int, width: int, causal: bool) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """name -> (PyTorch's, ours)"""
    q, k, v = (
        torch.randn(BATCH, tokens, h * width).view(BATCH, tokens, h, width).transpose(1, 2).requires_grad_()
        for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    dout = torch.randn(BATCH, tokens, HEADS, width).transpose(1, 2)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def ours() -> Tensor:
        return computed(q, k, v, causal, width**-0.5)

    def without_graph(function: Callable[[], Tensor]) -> Callable[[], object]:
        def step() -> None:
            with torch.no_grad():
                function()

        return step

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (q, k, v), dout)

    return {"forward": (without_graph(theirs), without_graph(ours)), "both": (both(theirs), both(ours))}


def times(pair: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> tuple[float, float, float]:
    """Median seconds of PyTorch's and of ours, and how many times faster ours is."""
    found = interleave(
        [Contender("theirs", lambda _: pair[0]()), Contender("ours", lambda _: pair[1]())], steps=rounds, warmup=3
    )
    return found["theirs"].median, found["ours"].median, found["ours"].speedup_over(found["theirs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| D | T | mask | forward | ours | ratio | with backward | ours | ratio | GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for width in options.widths:
        for tokens in options.tokens:
            for causal in (True, False):
                cells = []
                rounds = options.rounds if tokens < 512 else max(5, options.rounds // 3)
                for pair in contenders(tokens, width, causal).values():
                    theirs, ours, faster = times(pair, rounds)
                    cells += [f"{1e6 * theirs:.0f}", f"{1e6 * ours:.0f}", f"{faster:.2f}"]
                pairs = tokens * (tokens + 1) / 2 if causal else tokens * tokens
                cells.append(f"{7 * 2 * BATCH * HEADS * pairs * width / ours * 1e-9:.0f}")
                print(f"| {width} | {tokens} | {'causal' if causal else '–'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
