"""A training step (forward and backward) of a mixture's experts with LoRA of r = 16 on both stacked parameters.

    pytest bench/bench_experts.py --benchmark-only        one contender at a time
    python bench/bench_experts.py [--threads 1] [--dtype float32] [--rounds 5] [--only mixtral] [--decode | --rim]

As a script the contenders are interleaved: the median time of each, as a ratio to the frozen experts, and the most
bytes that were alive in a step beyond the weights (fastpeft.measure.LiveMemory), in units of the two stacks: the tables
of docs/experts.md. Contenders: frozen (the experts alone), peft (its ParamWrapper), patched (the same after
fastpeft.patch), fastpeft (its own layer).

The module is Transformers' MixtralExperts, run by each of its implementations: one expert after another (eager), and
all in one torch._grouped_mm, which Transformers takes by default. Tokens are routed at random.

--decode: the forward of one token without a graph. --rim: a step of `lora_experts` on one projection, what of that
torch._grouped_mm takes, and what the adapters' products take expert by expert and (a bound of what one call for all
experts could take) as batched products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.measure import LiveMemory
from fastpeft.ops import steps
from fastpeft.ops.lora_experts import lora_experts

RANK, ALPHA = 16, 32
NAMES = ("gate_up_proj", "down_proj")
# Experts, of which a token takes k; hidden, intermediate; tokens.
SHAPES = {
    "mixtral": (8, 2, 1024, 1792, 512),
    "mixtral, few": (8, 2, 1024, 1792, 64),
    "qwen3_moe": (64, 8, 1024, 384, 512),
    "qwen3_moe, few": (64, 8, 1024, 384, 64),
}
IMPLEMENTATIONS = ("eager", "grouped_mm")
Steps = dict[str, Callable[[], Any]]


class Holder(nn.Module):
    """A model of nothing but experts, as the libraries and `patch` take one."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def experts_of(shape: tuple[int, ...], implementation: str, dtype: torch.dtype) -> Holder:
    """Frozen experts with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    count, _, hidden, intermediate, _ = shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=count)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return Holder(experts).to(dtype).requires_grad_(False)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and the experts that each takes with their weights."""
    count, k, hidden, _, tokens = shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    scores, index = torch.rand(tokens, count, generator=generator).topk(k, dim=-1)
    return x, index, (scores / scores.sum(-1, keepdim=True)).to(dtype)


def adapted(library: Any, base: Holder) -> Any:
    """With an adapter on both parameters, B not zero."""
    targets = [f"experts.{name}" for name in NAMES]
    config = library.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[], init_lora_weights=False, target_parameters=targets
    )
    torch.manual_seed(2)
    model = library.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return model


def contenders(shape: tuple[int, ...], implementation: str, dtype: torch.dtype, decode: bool = False) -> Steps:
    """Forward and backward, one entry a contender; or the forward of one token."""
    inputs = inputs_of((*shape[:4], 1) if decode else shape, dtype)

    def step_of(model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def forward() -> None:
            model(*inputs)

        def step() -> None:
            inputs[0].grad = None
            model.zero_grad(set_to_none=True)
            y = model(*inputs)
            y.backward(y.detach())

        return forward if decode else step

    models: dict[str, Any] = {"frozen": experts_of(shape, implementation, dtype)}
    try:
        import peft
    except ImportError:
        pass
    else:
        models["peft"] = adapted(peft, experts_of(shape, implementation, dtype))
        patched = adapted(peft, experts_of(shape, implementation, dtype))
        models["patched"] = fastpeft.patch(patched, example_inputs=tuple(t.detach() for t in inputs))
    models["fastpeft"] = adapted(fastpeft, experts_of(shape, implementation, dtype))
    return {name: step_of(model) for name, model in models.items()}


def peak(step: Callable[[], Any]) -> int:
    """The most bytes alive in a step."""
    step()
    with LiveMemory() as memory:
        step()
    return memory.peak


def rim(shape: tuple[int, ...], dtype: torch.dtype) -> Steps:
    """A step of one projection, of its base product alone, and of the adapters' products alone; rows evenly spread."""
    count, k, hidden, intermediate, tokens = shape
    rows = tokens * k // count
    weight = torch.randn(count, 2 * intermediate, hidden).mul_(0.02).to(dtype).mT
    A = (torch.randn(count, RANK, hidden) * 0.02).to(dtype).requires_grad_()
    B = (torch.randn(count, 2 * intermediate, RANK) * 0.02).to(dtype).requires_grad_()
    x = torch.randn(count * rows, hidden).to(dtype).requires_grad_()
    dy = torch.randn(count * rows, 2 * intermediate).to(dtype)
    offsets = (torch.arange(1, count + 1) * rows).int()
    xs, dys = x.detach().view(count, rows, -1), dy.view(count, rows, -1)
    ys, dxs, a, b = torch.zeros_like(dys), torch.zeros_like(xs), A.detach(), B.detach()

    def operator() -> None:
        x.grad = A.grad = B.grad = None
        lora_experts(x, weight, A, B, 2.0, offsets).backward(dy)

    def grouped() -> None:
        x.grad = None
        torch._grouped_mm(x, weight, offs=offsets).backward(dy)

    def by_expert() -> None:
        for e in range(count):
            s = steps.shrink("auto", xs[e], a[e], (2.0,), 0.0, None)
            steps.expand_("auto", ys[e], s, b[e], (ys.shape[2],))
            ds, _ = steps.expand_backward("auto", dys[e], s, b[e])
            steps.shrink_backward("auto", ds, xs[e], a[e], (2.0,), 0.0, None, dxs[e])

    def batched() -> None:
        s = torch.bmm(xs, a.mT)
        ys.baddbmm_(s, b.mT)
        ds = torch.bmm(dys, b)
        torch.bmm(dys.mT, s)
        dxs.baddbmm_(ds, a)
        torch.bmm(ds.mT, xs)

    return {"lora_experts": operator, "_grouped_mm": grouped, "rim, by expert": by_expert, "rim, batched": batched}


def interleaved(contenders: Steps, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(rounds + 1):
        for who, step in contenders.items():
            start = clock()
            step()
            times[who].append(clock() - start)
    return {who: 1e3 * statistics.median(values[1:]) for who, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=list(SHAPES), action="append", help="these shapes only")
    parser.add_argument("--decode", action="store_true", help="the forward of one token, without a graph")
    parser.add_argument("--rim", action="store_true", help="the parts of a step of lora_experts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    dtype = getattr(torch, args.dtype)
    if args.rim:
        for name in args.only or SHAPES:
            found = interleaved(rim(SHAPES[name], dtype), args.rounds, clock)
            print(f"{name:15s}", "  ".join(f"{key} {ms:.1f} ms" for key, ms in found.items()), flush=True)
        return
    print(f"{args.dtype}, {args.threads} thread(s), r = {RANK}: times the frozen experts', peak bytes in stacks")
    for name in args.only or SHAPES:
        count, k, hidden, intermediate, tokens = shape = SHAPES[name]
        stacks = 3 * count * hidden * intermediate * dtype.itemsize
        for implementation in IMPLEMENTATIONS:
            each = contenders(shape, implementation, dtype, args.decode)
            peaks = {who: peak(step) / stacks for who, step in each.items()}
            found = interleaved(each, args.rounds, clock)
            cells = [f"{who} {ms / found['frozen']:.2f} ({ms:.1f} ms, {peaks[who]:.2f})" for who, ms in found.items()]
            rows = "one token" if args.decode else f"{tokens * k // count:4d} rows an expert"
            print(f"{name:15s} {rows}, {implementation:10s}", "  ".join(cells), flush=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral, few", "qwen3_moe, few"])
@pytest.mark.parametrize("contender", ["frozen", "peft", "patched", "fastpeft"])
def test_training_step(benchmark: Any, name: str, implementation: str, contender: str) -> None:
    found = contenders(SHAPES[name], implementation, torch.float32)
    if contender not in found:
        pytest.skip("peft is not installed")
    benchmark.group = f"{name}, {implementation}"
    benchmark(found[contender])


if __name__ == "__main__":
    main()
