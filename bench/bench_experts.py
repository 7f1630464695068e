"""A training step (forward and backward) of a mixture's experts with LoRA of r = 16 on both stacked parameters.

    pytest bench/bench_experts.py --benchmark-only        one contender at a time
    python bench/bench_experts.py [--threads 1] [--dtype float32] [--rounds 5] [--only mixtral]

As a script the contenders are interleaved: the median time of each, as a ratio to the frozen experts, and the most
bytes that were alive in a step beyond the weights (fastpeft.measure.LiveMemory), in units of the two stacks: the tables
of docs/experts.md. Contenders: frozen (the experts alone), peft (its ParamWrapper), patched (the same after
fastpeft.patch), fastpeft (its own layer).

The module is Transformers' MixtralExperts, run by each of its implementations: one expert after another (eager), and
all in one torch._grouped_mm, which Transformers takes by default. Tokens are routed at random.
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


def contenders(shape: tuple[int, ...], implementation: str, dtype: torch.dtype) -> Steps:
    """Forward and backward, one entry a contender."""
    inputs = inputs_of(shape, dtype)

    def step_of(model: Any) -> Callable[[], Any]:
        def step() -> None:
            inputs[0].grad = None
            model.zero_grad(set_to_none=True)
            y = model(*inputs)
            y.backward(y.detach())

        return step

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", choices=list(SHAPES), action="append", help="these shapes only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    dtype = getattr(torch, args.dtype)
    print(f"{args.dtype}, {args.threads} thread(s), r = {RANK}: times the frozen experts', peak bytes in stacks")
    for name in args.only or SHAPES:
        count, k, hidden, intermediate, tokens = shape = SHAPES[name]
        stacks = 3 * count * hidden * intermediate * dtype.itemsize
        for implementation in IMPLEMENTATIONS:
            steps = contenders(shape, implementation, dtype)
            peaks = {who: peak(step) / stacks for who, step in steps.items()}
            times: dict[str, list[float]] = {who: [] for who in steps}
            for _ in range(args.rounds):
                for who, step in steps.items():
                    start = clock()
                    step()
                    times[who].append(clock() - start)
            found = {who: 1e3 * statistics.median(values) for who, values in times.items()}
            cells = [f"{who} {ms / found['frozen']:.2f} ({ms:.0f} ms, {peaks[who]:.2f})" for who, ms in found.items()]
            print(f"{name:15s} {tokens * k / count:4.0f} an expert, {implementation:10s}", "  ".join(cells), flush=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral, few", "qwen3_moe, few"])
@pytest.mark.parametrize("contender", ["frozen", "peft", "patched", "fastpeft"])
def test_training_step(benchmark: Any, name: str, implementation: str, contender: str) -> None:
    steps = contenders(SHAPES[name], implementation, torch.float32)
    if contender not in steps:
        pytest.skip("peft is not installed")
    benchmark.group = f"{name}, {implementation}"
    benchmark(steps[contender])


if __name__ == "__main__":
    main()
