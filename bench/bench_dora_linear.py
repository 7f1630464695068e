"""A training step (forward and backward) of DoRA linears at SmolLM2-135M's shapes, batch 2 x 256, fp32, r = 16.

    python bench/bench_dora_linear.py [--threads 1] [--rounds 9]

Contenders, interleaved: frozen (the base layer alone), lora and dora (fastpeft's operators), peft (peft's DoRA layer),
each without dropout and with 0.05. Medians in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.ops import dora_linear, lora_linear

ROWS, RANK, SCALING = 512, 16, 2.0
SHAPES = {"o": (576, 576), "gate": (576, 1536), "down": (1536, 576)}


def peft_layer(base: nn.Linear, p: float) -> nn.Module:
    """PEFT's DoRA layer, with a B that is not zero."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    alpha = int(SCALING * RANK)
    config = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=p, use_dora=True)
    layer = Linear(base, "default", config=config, r=RANK, lora_alpha=alpha)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.train()


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """Forward and backward of one layer, by contender."""
    k, n = SHAPES[name]
    base = nn.Linear(k, n, bias=False).requires_grad_(False)
    x, dy = torch.randn(ROWS, k, requires_grad=True), torch.randn(ROWS, n)
    A, B = (torch.randn(RANK, k) / k**0.5).requires_grad_(), (torch.randn(n, RANK) * 0.02).requires_grad_()
    m = base.weight.norm(dim=1).detach().requires_grad_()
    forwards: dict[str, Callable[[], torch.Tensor]] = {"frozen": lambda: F.linear(x, base.weight)}
    for p in (0.0, 0.05):
        layer = peft_layer(base, p)
        forwards[f"lora {p}"] = lambda p=p: lora_linear(x, base.weight, None, A, B, SCALING, p)
        forwards[f"dora {p}"] = lambda p=p: dora_linear(x, base.weight, None, A, B, m, SCALING, p)
        forwards[f"peft {p}"] = lambda layer=layer: layer(x)
    return {name: lambda f=f: f().backward(dy) for name, f in forwards.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in SHAPES:
        steps = contenders(shape)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds + 1):  # the first round is not counted
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(seconds[1:]) * 1e3 for name, seconds in times.items()}
        print(f"{shape:5}", "  ".join(f"{name} {value:.1f}" for name, value in medians.items()))


if __name__ == "__main__":
    main()
