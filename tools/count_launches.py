"""Kernels launched per decoder layer, forward and backward: fastpeft's against PEFT's, without a GPU.

    python tools/count_launches.py                  # Llama, LoRA on all seven projections, r = 16, bf16, a table
    python tools/count_launches.py --rows           # every operator that launches, by name

Two models of the same shape, one with a layer more, run a training step on tiny CPU tensors; the difference is the
layer, whatever is fused across its ends. Our operators take their Triton route: launchers run as they are, and each
launch is recorded instead of started. Everything else is what the dispatcher sees: one launch for each operator that is
neither a view nor an allocation, matrix products by the vendor and attention apart (both libraries call the same
attention, which counts as one). Dropout counts as on a GPU, where it is one kernel. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: launches are recorded, nothing is interpreted

import fastpeft.kernels
import torch
from fastpeft.kernels import _launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import fastpeft

FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::detach", "aten::_unsafe_view", "aten::set_", "aten::resize_", "aten::lift_fresh", "aten::is_same_size",
    "aten::_reshape_alias", "aten::_version",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear"}


def launchers() -> dict[str, Callable[..., Any]]:
    """The launcher of each operator that has a Triton kernel, by the operator's name."""
    found: dict[str, Callable[..., Any]] = {}
    for module in pkgutil.iter_modules(fastpeft.kernels.__path__):
        if module.name.startswith("_"):
            continue
        for name, value in vars(importlib.import_module(f"fastpeft.kernels.{module.name}")).items():
            if callable(value) and not isinstance(value, JITFunction):
                found.setdefault(name, value)
    return found


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: ("product" | "attention" | "triton" | "other", name)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._launchers = launchers()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("fastpeft"):
            launcher = self._launchers.get(name.split("::")[1])
            if launcher is None:
                self.calls["other", f"{name} (no Triton kernel)"] += 1
                return func(*args, **(kwargs or {}))
            with self:  # its launches and the operators around them
                return launcher(*args, **(kwargs or {}))
        if "scaled_dot_product" in name:
            self.calls["attention", name] += 1
        elif name in PRODUCTS:
            self.calls["product", name] += 1
        elif name not in FREE and not is_view(func) and any_elements(args):
            self.calls["other", name] += 1
        return func(*args, **(kwargs or {}))

    def record(self, kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        """Stands in for JITFunction.run."""
        self.calls["triton", kernel.__name__.strip("_").removesuffix("_kernel")] += 1


def is_view(func: Any) -> bool:
    """The result aliases an argument that is not written to."""
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def any_elements(args: Any) -> bool:
    """Some tensor among the arguments, or none at all (a factory): what has no elements is not launched."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return not tensors or any(t.numel() for t in tensors)


def gpu_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout as on a GPU: one kernel that keeps a mask."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


@contextmanager
def counting() -> Iterator[Launches]:
    """Within, operators are counted and Triton launches recorded."""
    mode = Launches()
    run, limits, dropout = JITFunction.run, _launch._limits, torch.nn.functional.dropout
    JITFunction.run = lambda self, *args, **kwargs: mode.record(self, *args, **kwargs)
    _launch._limits = lambda kind, index: _launch.Limits(132, 227 * 1024)
    torch.nn.functional.dropout = gpu_dropout
    try:
        with mode:
            yield mode
    finally:
        JITFunction.run, _launch._limits, torch.nn.functional.dropout = run, limits, dropout


def llama(layers: int, dtype: torch.dtype) -> Any:
    """Llama-3's layer, narrow."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapted(name: str, layers: int, p: float) -> Any:
    """The model of one contender; "… fp32" keeps PEFT's default of fp32 adapters over the bf16 base."""
    fields: dict[str, Any] = {
        "r": 16, "lora_alpha": 32, "lora_dropout": p, "target_modules": "all-linear", "task_type": "CAUSAL_LM"
    }  # fmt: skip
    cast = name.endswith("fp32 adapters")
    if name.startswith("PEFT"):
        import peft

        model = peft.get_peft_model(
            llama(layers, torch.bfloat16), peft.LoraConfig(**fields), autocast_adapter_dtype=cast
        )
    else:
        model = fastpeft.get_peft_model(
            llama(layers, torch.bfloat16), fastpeft.LoraConfig(**fields), autocast_adapter_dtype=cast
        )
        fastpeft.patch(model)
    return model.train()


def step(name: str, layers: int, p: float) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """What one training step launches, forward and backward."""
    model = adapted(name, layers, p)
    ids = torch.randint(256, (2, 32))
    route = "reference" if name.startswith("PEFT") else "triton"
    with fastpeft.backend(route), counting() as mode:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        forward = mode.calls.copy()
        loss.backward()
    return forward, mode.calls - forward


def per_layer(name: str, p: float) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """The launches of one layer: those of three layers less those of two, an inner layer."""
    more, less = step(name, 3, p), step(name, 2, p)
    for big, small in zip(more, less):
        big.subtract(small)
    return more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="every operator, by name")
    options = parser.parse_args()
    kinds = ("product", "attention", "triton", "other")
    print("| layer | dropout | | vendor products | attention | Triton | other kernels | all |")
    print("|---|---|---|---|---|---|---|---|")
    for p in (0.0, 0.05):
        for name in ("PEFT", "PEFT, fp32 adapters", "fastpeft, patched", "fastpeft, patched, fp32 adapters"):
            total = 0
            for which, calls in zip(("forward", "backward"), per_layer(name, p)):
                counts = [sum(n for (kind, _), n in calls.items() if kind == k) for k in kinds]
                total += sum(counts)
                cells = " | ".join(map(str, counts))
                whole = f"{sum(counts)}" if which == "forward" else f"{sum(counts)} (both: {total})"
                print(f"| {name} | {p:g} | {which} | {cells} | {whole} |")
                if options.rows:
                    for (kind, operator), n in sorted(calls.items()):
                        if n:
                            print(f"| · {kind} | | `{operator}` {n} | | | | | |")


if __name__ == "__main__":
    main()
