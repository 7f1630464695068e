"""Rotary position embeddings on q and k, ours beside eager PyTorch, in microseconds of thread time.

    python bench/bench_rope.py [--threads 1] [--rounds 15]

Forward and backward of q and k as a Llama's attention has them: transposes of (2, 256, H D).
"""

from __future__ import annotations

import argparse

import torch
from bench_glu import compare

from fastpeft.ops import rope


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As Transformers' Llama."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (turned(q) * sin), (k * cos) + (turned(k) * sin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| shape | what | eager | ours | ratio |\n|---|---|---|---|---|")
    for heads, width in (((9, 3), 64), ((32, 8), 128)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.randn(2, 256, h * width, dtype=dtype).view(2, 256, h, width).transpose(1, 2) for h in heads)
            cos, sin = (torch.randn(1, 256, width, dtype=dtype) for _ in range(2))
            dq, dk = torch.randn_like(q), torch.randn_like(k)
            q.requires_grad_(), k.requires_grad_()

            def step(function, q=q, k=k, cos=cos, sin=sin, dq=dq, dk=dk) -> None:
                torch.autograd.grad(function(q, k, cos, sin), (q, k), (dq, dk))

            pairs = {
                "forward": (
                    lambda q=q, k=k, c=cos, s=sin: eager(q, k, c, s),
                    lambda q=q, k=k, c=cos, s=sin: rope(q, k, c, s),
                ),
                "forward and backward": (lambda s=step: s(eager), lambda s=step: s(rope)),
            }
            compare(pairs, options.rounds, f"H {heads[0]}/{heads[1]}, D {width}, {str(dtype)[6:]}")


if __name__ == "__main__":
    main()
