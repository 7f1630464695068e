"""What Python costs: a LoRA layer's call on a small input, and what is done to all adapters of a model.

    python bench/bench_python_cost.py                 # both tables, fastpeft and, where installed, peft
    python bench/bench_python_cost.py --only layer

Everything is thread time on one thread. Layers: medians of interleaved rounds, as the ratio to the base layer's own
call. The model has 224 targets (32 Llama layers of width 64), where nothing but Python is left.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import fastpeft

SHAPES = ((1, 64), (4, 64), (2, 4, 64), (1, 576), (8, 576))
FIELDS = {"r": 16, "lora_alpha": 32}


def medians(calls: Sequence[Callable[[], object]], repeat: int, rounds: int) -> list[float]:
    """Microseconds of each call, in rounds of `repeat` calls whose order rotates."""
    for call in calls:
        for _ in range(repeat):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        for j in range(len(calls)):
            k = (i + j) % len(calls)
            start = time.thread_time_ns()
            for _ in range(repeat):
                calls[k]()
            times[k].append((time.thread_time_ns() - start) / repeat / 1e3)
    return [statistics.median(t) for t in times]


def layer(library: Any, width: int, patched: bool = False) -> Any:
    """A LoRA layer of `library` on a linear layer without bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model = library.get_peft_model(model, library.LoraConfig(target_modules=["0"], **FIELDS))
    if patched:
        fastpeft.patch(model, example_inputs=torch.randn(32, width))
        assert "forward" in model.base_model.model[0].__dict__, fastpeft.report(model)
    return model.base_model.model[0]


def layers(libraries: dict[str, Any], rounds: int) -> None:
    """The table of layer calls."""
    columns = ["fastpeft"]
    if "peft" in libraries:
        columns += ["peft layer, patched", "peft"]
    print("| input | graph | base call, us | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for shape in SHAPES:
        made = [layer(fastpeft, shape[-1])]
        if "peft" in libraries:
            made += [layer(libraries["peft"], shape[-1], patched=True), layer(libraries["peft"], shape[-1])]
        base = made[0].base_layer
        for graph, grad, input_grad in (("none", False, False), ("adapter", True, False), ("adapter, x", True, True)):
            x = torch.randn(shape, requires_grad=input_grad)
            with torch.set_grad_enabled(grad):
                own, *rest = medians([partial(module, x) for module in (base, *made)], 50, rounds)
            print(f"| {shape} | {graph} | {own:.1f} | " + " | ".join(f"{t / own:.2f}x" for t in rest) + " |")


def tiny_llama() -> nn.Module:
    """32 layers of width 64: 224 linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def milliseconds(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e6


def off_and_on(model: Any) -> None:
    with model.disable_adapter():
        pass


def whole_model(library: Any, rounds: int) -> dict[str, str]:
    """What is done to all adapters of the model, in milliseconds."""
    config = library.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **FIELDS)
    made = statistics.median(milliseconds(partial(library.get_peft_model, tiny_llama(), config)) for _ in range(rounds))
    model = library.get_peft_model(tiny_llama(), config)
    off_first = medians([partial(off_and_on, model)], 3, rounds)[0] / 1e3
    added = [milliseconds(partial(model.add_adapter, f"more{i}", config)) for i in range(7)]
    off_last = medians([partial(off_and_on, model)], 3, rounds)[0] / 1e3
    model.eval()
    ids, names = torch.arange(8 * 16).view(8, 16) % 128, ["default", *(f"more{i}" for i in range(7))]
    with torch.no_grad():
        one, mixed = medians([partial(model, ids), partial(model, ids, adapter_names=names)], 1, rounds)
    return {
        "get_peft_model, ms": f"{made:.0f}",
        "disable_adapter with 1 adapter, ms": f"{off_first:.1f}",
        "disable_adapter with 8 adapters, ms": f"{off_last:.1f}",
        "add_adapter, the 2nd to the 8th, ms": " ".join(f"{t:.0f}" for t in added),
        "8 samples of 8 adapters over 8 of one": f"{mixed / one:.2f}x",
    }


def models(libraries: dict[str, Any], rounds: int) -> None:
    """The table of what is done to a whole model."""
    found = {name: whole_model(library, rounds) for name, library in libraries.items()}
    print(f"| 224 targets | {' | '.join(found)} |")
    print("|---" * (1 + len(found)) + "|")
    for row in found["fastpeft"]:
        print(f"| {row} | {' | '.join(values[row] for values in found.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("layer", "model"), help="one of the tables")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    libraries: dict[str, Any] = {"fastpeft": fastpeft}
    try:
        libraries["peft"] = importlib.import_module("peft")
    except ImportError:
        print("peft is not installed: fastpeft alone")
    if options.only != "model":
        layers(libraries, options.rounds)
    if options.only is None:
        print()
    if options.only != "layer":
        models(libraries, max(options.rounds // 4, 3))


if __name__ == "__main__":
    main()
