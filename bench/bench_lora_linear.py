"""A training step (forward and backward) of LoRA linears at SmolLM2-135M's shapes, batch 2 x 256, r = 16.

    pytest bench/bench_lora_linear.py --benchmark-only        one contender at a time
    python bench/bench_lora_linear.py [--threads 1] [--dtype float32] [--rounds 30] [--ops]

As a script the contenders are interleaved, so that a slow moment of the machine hits all of them, and medians and their
ratios to the frozen layers are printed: the table of docs/bordered_weight.md. With one thread, times are thread time.
--ops times the single operators against the same products by PyTorch: the table of fastpeft/ops/steps.py.

Contenders: frozen (the base layers alone), peft (peft's own layers), plain and bordered (lora_linear_group's forms;
bordered copies x and dy into rows with room for the rim), rim given (bordered, with x and dy already in such rows).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.ops import lora_linear_group, steps
from fastpeft.ops.bordered import BorderedWeight

ROWS, RANK, SCALING = 512, 16, 2.0
SHAPES = {"q/k/v": (576, (576, 192, 192)), "o": (576, (576,)), "gate/up": (576, (1536, 1536)), "down": (1536, (576,))}
Steps = dict[str, Callable[[], Any]]


def peft_layers(bases: list[nn.Linear], p: float) -> list[nn.Module]:
    """PEFT's layers on the same bases, or none where peft is not installed."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError:
        return []
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=p)
    layers = [Linear(base, "default", config, r=RANK, lora_alpha=int(SCALING * RANK)) for base in bases]
    for layer, base in zip(layers, bases):
        layer.to(base.weight.dtype).train()
        nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layers


def contenders(name: str, p: float, dtype: torch.dtype) -> Steps:
    """Forward and backward of one group of projections, one entry a contender."""
    k, splits = SHAPES[name]
    bases = [nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False) for n in splits]
    x = torch.randn(2, ROWS // 2, k, dtype=dtype, requires_grad=True)
    dys = [torch.randn(2, ROWS // 2, n, dtype=dtype) for n in splits]
    lora_A = [(torch.randn(RANK, k) / k**0.5).to(dtype).requires_grad_() for _ in splits]
    lora_B = [(torch.randn(n, RANK) * 0.02).to(dtype).requires_grad_() for n in splits]
    weights, none, scaling = [base.weight for base in bases], [None] * len(splits), [SCALING] * len(splits)
    stacked = torch.cat(weights)
    bordered = BorderedWeight(stacked, RANK * len(splits))
    layers = peft_layers(bases, p)
    leaves = [x, *lora_A, *lora_B, *(q for layer in layers for q in layer.parameters())]

    def backward(outputs: Any) -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(list(outputs), dys)

    def group(weight: Any, form: str) -> None:
        backward(lora_linear_group(x, weights, none, lora_A, lora_B, scaling, p, stacked_weight=weight, form=form))

    found: Steps = {"frozen": lambda: backward([base(x) for base in bases])}
    if layers:
        found["peft"] = lambda: backward([layer(x) for layer in layers])
    found["plain"] = lambda: group(stacked, "plain")
    found["bordered"] = lambda: group(bordered, "bordered")
    if p == 0.0:
        found["rim given"] = rim_given(bordered, x.detach().flatten(0, 1), dys, lora_A, lora_B, splits)
    return found


def rim_given(
    bordered: BorderedWeight, x: Tensor, dys: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], splits: tuple
) -> Callable[[], Any]:
    """The bordered form as it is where producers leave room for the rim: the products, the rims, and no copies."""
    n, k = bordered.weight.shape
    x_plus, dy_plus = x.new_empty(ROWS, k + bordered.rim), x.new_empty(ROWS, n + bordered.rim)
    x_plus[:, :k] = x
    dy_plus[:, :n] = torch.cat([dy.flatten(0, 1) for dy in dys], dim=1)
    dy_blocks = dy_plus[:, :n].split(splits, dim=1)
    lora_A, lora_B, scaling = [a.detach() for a in lora_A], [b.detach() for b in lora_B], [SCALING] * len(splits)

    def step() -> Any:
        bordered.fill_rim(lora_A, lora_B, splits)
        stacked = torch.cat(lora_A) if len(lora_A) > 1 else lora_A[0]
        s = steps.shrink("auto", x_plus[:, :k], stacked, scaling, 0.0, None)
        x_plus[:, k:] = s
        y = bordered.forward(x_plus)
        bordered.fill_rim(lora_A, lora_B, splits)
        rims = [
            steps.expand_backward("auto", dy, s[:, g * RANK : (g + 1) * RANK], lora_B[g])
            for g, dy in enumerate(dy_blocks)
        ]
        ds = torch.cat([part for part, _ in rims], dim=1)
        torch.mul(ds, SCALING, out=dy_plus[:, n:])
        dx = bordered.backward(dy_plus)
        return y, dx, steps.shrink_backward("auto", ds, x_plus[:, :k], stacked, scaling, 0.0, None, None)

    return step


def operators(dtype: torch.dtype) -> dict[str, Steps]:
    """Each operator, and the same product by PyTorch."""
    ops, k = torch.ops.fastpeft, 576
    x, dx, y = (torch.randn(ROWS, k, dtype=dtype) for _ in range(3))
    A, B, s = torch.randn(RANK, k, dtype=dtype), torch.randn(k, RANK, dtype=dtype), torch.randn(ROWS, RANK, dtype=dtype)
    seed, c = torch.tensor([1234567890123]), [SCALING]
    return {
        "shrink": {
            "ours": lambda: ops.lora_shrink(x, A, c, 0.0, None),
            "torch": lambda: torch.mm(x, A.t()).mul_(SCALING),
            "dropout": lambda: ops.lora_shrink(x, A, c, 0.05, seed),
        },
        "expand": {"ours": lambda: ops.lora_expand_(y, s, B, [k]), "torch": lambda: y.addmm_(s, B.t())},
        "expand_backward": {
            "ours": lambda: ops.lora_expand_backward(y, s, B),
            "torch": lambda: (torch.mm(y, B), torch.mm(y.t(), s)),
        },
        "shrink_backward": {
            "ours": lambda: ops.lora_shrink_backward(s, x, A, c, 0.0, None, dx),
            "torch": lambda: (torch.mm(s.t(), x).mul_(SCALING), dx.addmm_(s, A, alpha=SCALING)),
            "dropout": lambda: ops.lora_shrink_backward(s, x, A, c, 0.05, seed, dx),
        },
        "F.dropout": {"torch": lambda: F.dropout(x, 0.05)},
    }


def interleaved(contenders: Steps, rounds: int, clock: Callable[[], float], warm: bool = False) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 2):
        for name, step in contenders.items():
            if warm:
                step()
            start = clock()
            step()
            times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values[2:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--ops", action="store_true", help="single operators against PyTorch's products")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    dtype = getattr(torch, args.dtype)
    if args.ops:
        for name, each in operators(dtype).items():
            found = interleaved(each, args.rounds, clock, warm=True)
            print(f"{name:16s}", "  ".join(f"{key} {1e3 * value:.0f} us" for key, value in found.items()))
        return
    print(f"{args.dtype}, {args.threads} thread(s), {ROWS} rows, r = {RANK}: ms, and times the frozen layers'")
    for p in (0.0, 0.05):
        for name in SHAPES:
            found = interleaved(contenders(name, p, dtype), args.rounds, clock)
            cells = [f"{key} {value:.2f} ({value / found['frozen']:.3f})" for key, value in found.items()]
            print(f"p = {p:<4} {name:8s}", "  ".join(cells), flush=True)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("contender", ["frozen", "peft", "plain", "bordered"])
def test_training_step(benchmark: Any, name: str, p: float, contender: str) -> None:
    steps_of = contenders(name, p, torch.float32)
    if contender not in steps_of:
        pytest.skip("peft is not installed")
    benchmark.group = f"{name}, dropout {p}"
    benchmark(steps_of[contender])


if __name__ == "__main__":
    main()
