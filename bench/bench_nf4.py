"""Decoding with 4-bit weights (NF4, nested scales): the products, and one token of a whole model.

    python bench/bench_nf4.py                      # both tables, one and two threads
    python bench/bench_nf4.py --only products --threads 2

Products: x (M, K) times a packed weight (N, K), in microseconds, medians of interleaved calls. *read*: the sum of the
packed bytes as int64, the time that a plain read of them takes. *memory* goes round weights of 256 MiB together,
*cache* uses one again and again. bitsandbytes has two ways on CPUs: `gemm_4bit` decodes the weight into a matrix and
multiplies in fp32; where the processor has bf16 arithmetic, a layer in evaluation is repacked for a kernel that
multiplies in bf16, scales rounded too (*repacked*).

Token: `generate` with a cache, greedy, batch 1, milliseconds from one token to the next, medians. PEFT + bitsandbytes
as a user meets it (repacked, where the processor is so), the same in fp32 throughout (repacking off), and PEFT's model
after `fastpeft.patch`, which also computes in fp32. `--detail`: where the patched model's time goes, by operator.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from bench_gemm import times as interleaved
from torch import Tensor

import fastpeft
from fastpeft.cli.models import PRESETS, four_bits
from fastpeft.layers.bnb import REPACKS
from fastpeft.ops.backend import OPS
from fastpeft.ops.nf4 import Weight4bit, weight_4bit

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (14336, 4096))
ROUND = 256 << 20  # bytes that the weights of a round have together, beyond any cache
PROMPT, MODEL = 16, "smollm2-6l"


def one_after_another(calls: Sequence[Callable[[], object]], rounds: int, repeat: int) -> list[float]:
    """Median seconds of each call, `repeat` of it in a row: its weight is in the cache."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, of_call in zip(calls, times):
            call()
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            of_call.append((time.perf_counter() - start) / repeat)
    return [statistics.median(t) for t in times]


class Weights:
    """Copies of one quantised weight, for each contender, and a call on the next of them."""

    def __init__(self, n: int, k: int, m: int, copies: int) -> None:
        from bitsandbytes.functional import (
            _convert_weight_packed_for_cpu,
            gemv_4bit,
            has_avx512bf16,
            quantize_4bit,
        )

        packed, state = quantize_4bit(torch.randn(n, k), blocksize=64, compress_statistics=True, quant_type="nf4")
        self.x = torch.randn(m, k)
        own: list[Weight4bit] = []
        states: list[tuple[Tensor, Any]] = []
        for _ in range(copies):
            data = packed.clone()
            states.append((data, state))
            own.append(weight_4bit(data, state))
        self.names = ["read", "fastpeft", "gemm_4bit"]
        reads, ours, theirs = cycle(states), cycle(own), cycle(states)
        self.calls: list[Callable[[], object]] = [
            lambda: next(reads)[0].view(-1).view(torch.int64).sum(),
            lambda: self._ours(next(ours)),
            lambda: self._gemm(*next(theirs)),
        ]
        if has_avx512bf16() and k % 64 == 0:
            again, fresh = quantize_4bit(torch.randn(n, k), blocksize=64, compress_statistics=True, quant_type="nf4")
            data, fresh = _convert_weight_packed_for_cpu(again, fresh)
            repacked = cycle([data.clone() for _ in range(copies)])
            self.names.append("repacked")
            self.calls.append(lambda: gemv_4bit(self.x, next(repacked), state=fresh))

    def _ours(self, w: Weight4bit) -> Tensor:
        return OPS["auto"].linear_4bit(self.x, *w.storage(), w.rows, None, None, None)

    def _gemm(self, data: Tensor, state: Any) -> Tensor:
        return torch.ops.bitsandbytes.gemm_4bit(
            self.x, data, state.shape, state.state2.absmax, state.blocksize, state.quant_type, None, state.absmax,
            state.state2.code, state.offset,
        )  # fmt: skip


@torch.no_grad()
def products(threads: Sequence[int], rows: Sequence[int], rounds: int) -> None:
    """The table of products."""
    print(
        "| threads | weights in | M | N | K | read | fastpeft | gemm_4bit | repacked | over read | gemm_4bit over it |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for where in ("cache", "memory"):
        for m in rows:
            for n, k in SHAPES:
                size = n * k // 2
                if where == "cache" and size > 4 << 20:
                    continue
                weights = Weights(n, k, m, 1 if where == "cache" else max(2, ROUND // size))
                for t in threads:
                    torch.set_num_threads(t)
                    if where == "cache":
                        found = one_after_another(weights.calls, rounds, 10)
                    else:
                        found = interleaved(weights.calls, rounds)
                    line = [f"{1e6 * t:.1f}" for t in found] + ["-"] * (4 - len(found))
                    ratios = f"{found[1] / found[0]:.2f} | {found[2] / found[1]:.1f}"
                    print(f"| {t} | {where} | {m} | {n} | {k} | {' | '.join(line)} | {ratios} |", flush=True)
                del weights


class Clock:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""

    def between(self) -> list[float]:
        """From one token to the next; the first call is the prompt's, the second token has the first's set-up."""
        return [b - a for a, b in zip(self.at[2:], self.at[3:])]


def decode(model: Any, tokens: int) -> tuple[list[float], list[int]]:
    """Seconds a token, and the tokens."""
    ids = torch.arange(PROMPT)[None] + 100
    clock = Clock()
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, streamer=clock, pad_token_id=0,
    )  # fmt: skip
    return clock.between(), out[0, PROMPT:].tolist()


def quantised_peft(folder: str, repacked: bool, r: int) -> Any:
    """The model of `folder` in 4 bits with a drawn LoRA on all linear layers, by peft, in evaluation."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits(torch.float32)
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(model, config).eval()
    for module in model.modules():
        if not repacked and REPACKS in module.__dict__:
            module.__dict__[REPACKS] = False
    return model


CATEGORIES = {
    "4-bit products": ("linear_4bit", "nf4"),
    "head": ("aten::mm", "aten::addmm", "aten::linear", "fastpeft::gemm", "fastpeft::linear_rows"),
    "adapters": ("lora_shrink", "lora_expand", "lora_linear"),
    "attention": ("attention", "rope"),
    "norms and activations": ("norm", "glu", "silu", "rsqrt"),
}


def breakdown(model: Any, tokens: int, total: float) -> None:
    """Self time of the operators by what they are for; what no operator has is Python's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        decode(model, tokens)
    found = dict.fromkeys([*CATEGORIES, "other operators"], 0.0)
    calls = 0
    for event in profile.key_averages():
        own = event.self_cpu_time_total / 1e3 / tokens
        for category, names in CATEGORIES.items():
            if any(name in event.key for name in names):
                found[category] += own
                break
        else:
            found["other operators"] += own
        calls += event.count
    print(f"\n{calls / tokens:.0f} operator calls a token (the prompt's among them); milliseconds a token:")
    for category, own in found.items():
        print(f"  {category}: {own:.2f}")
    print(f"  Python, and what the profiler adds to none of them: {total - sum(found.values()):.2f}")


def token(threads: Sequence[int], rounds: int, tokens: int, r: int, detail: bool) -> None:
    """The table of whole tokens."""
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(PRESETS[MODEL])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        if has_avx512bf16():
            models["PEFT, repacked"] = quantised_peft(folder, True, r)
        models["PEFT, fp32"] = quantised_peft(folder, False, r)
        models["fastpeft"] = fastpeft.patch(quantised_peft(folder, False, r))
    gc.collect()
    print(f"\n| threads | {' | '.join(models)} | PEFT in fp32 over it | as repacked |\n|{'---|' * (len(models) + 3)}")
    for t in threads:
        torch.set_num_threads(t)
        times: dict[str, list[float]] = {name: [] for name in models}
        written: dict[str, list[int]] = {}
        for i in range(rounds + 1):
            for name, model in models.items():
                between, written[name] = decode(model, tokens)
                if i:  # the first is for what is set up once
                    times[name] += between
        found = {name: 1e3 * statistics.median(of_model) for name, of_model in times.items()}
        over = [found[name] / found["fastpeft"] for name in ("PEFT, fp32", "PEFT, repacked") if name in found]
        print(f"| {t} | {' | '.join(f'{ms:.2f}' for ms in found.values())} | {' | '.join(f'{x:.2f}' for x in over)} |")
        same = sum(a == b for a, b in zip(written["PEFT, fp32"], written["fastpeft"]))
        print(f"{same} of {tokens} tokens are those of PEFT in fp32", flush=True)
        if detail:
            breakdown(models["fastpeft"], tokens, found["fastpeft"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("products", "token"), help="one of the tables")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--detail", action="store_true", help="where the patched model's time goes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only != "token":
        products(options.threads, options.rows, options.rounds)
    if options.only != "products":
        token(options.threads, max(2, options.rounds // 10), options.tokens, options.r, options.detail)


if __name__ == "__main__":
    main()
