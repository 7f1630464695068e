"""A training step (forward and backward) of RMSNorm, weight frozen, against the models' own and PyTorch's.

    pytest bench/bench_rms_norm.py --benchmark-only           one contender at a time
    python bench/bench_rms_norm.py [--threads 1] [--rounds 30] [--margin]

As a script the contenders are interleaved and medians in microseconds are printed: the tables of docs/norms.md. With
one thread, times are thread time. --margin times the operators that make the narrow products of what the norm feeds
(r = 16) against the norm's and LoRA's operators one after the other.

Contenders: eager (LlamaRMSNorm of Transformers), F.rms_norm, ours.
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
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastpeft.ops import rms_norm

EPS, RANK, SCALING = 1e-5, 16, [2.0]
SHAPES, DTYPES = [(512, 576), (512, 4096)], [torch.float32, torch.bfloat16]
Steps = dict[str, Callable[[], Any]]


def contenders(rows: int, columns: int, dtype: torch.dtype) -> Steps:
    """Forward and backward, one entry a contender."""
    x, dy = torch.randn(rows, columns).to(dtype).requires_grad_(), torch.randn(rows, columns).to(dtype)
    eager = LlamaRMSNorm(columns, EPS).to(dtype).requires_grad_(False)
    w = eager.weight

    def step(norm: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(norm(x), x, dy)

    return {
        "eager": step(eager),
        "F.rms_norm": step(lambda x: F.rms_norm(x, (columns,), w, EPS)),
        "ours": step(lambda x: rms_norm(x, w, EPS)),
    }


def margin(rows: int, columns: int, dtype: torch.dtype, p: float) -> dict[str, Steps]:
    """The operators with the narrow products, and the same by operators that do one thing each."""
    ops, x, dy = torch.ops.fastpeft, *(torch.randn(rows, columns).to(dtype) for _ in range(2))
    w, A, ds = torch.ones(columns).to(dtype), torch.randn(RANK, columns).to(dtype), torch.randn(rows, RANK).to(dtype)
    y, rstd = ops.rms_norm(x, w, EPS, 0.0, dtype)
    dropout = (SCALING, p, torch.tensor([1234567890123]) if p else None)

    def backward_apart() -> Any:
        total = dy.clone()
        dA = ops.lora_shrink_backward(ds, y, A, *dropout, total)
        return dA, ops.rms_norm_backward(total, x, rstd, w, 0.0, None, False)

    return {
        "forward": {
            "apart": lambda: ops.lora_shrink(ops.rms_norm(x, w, EPS, 0.0, dtype)[0], A, *dropout),
            "together": lambda: ops.rms_norm_shrink(x, w, EPS, 0.0, A, *dropout, dtype),
        },
        "backward": {
            "apart": backward_apart,
            "together": lambda: ops.rms_norm_shrink_backward(dy, ds, x, rstd, w, 0.0, A, *dropout, dtype, True, False),
        },
    }


def show(title: str, found: dict[str, float]) -> None:
    print(f"{title:34s}", "  ".join(f"{name} {1e3 * value:.0f} us" for name, value in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--margin", action="store_true", help="the operators with the narrow products")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    for dtype in DTYPES:
        for shape in SHAPES:
            title = f"{str(dtype)[6:]} {shape}"
            if not args.margin:
                show(title, interleaved(contenders(*shape, dtype), args.rounds, clock, warm=True))
                continue
            for p in (0.0, 0.05):
                for name, each in margin(*shape, dtype, p).items():
                    show(f"{title} {name}, dropout {p}", interleaved(each, args.rounds, clock, warm=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("contender", ["eager", "F.rms_norm", "ours"])
def test_training_step(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype, contender: str) -> None:
    benchmark.group = f"rms_norm {shape} {dtype}"
    benchmark(contenders(*shape, dtype)[contender])


if __name__ == "__main__":
    main()
