"""A model that is not there: its config, its layers once each kind on the meta device, and what they count to."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .counting import Counts, count
from .install import find_layers

SHAPES = Path(__file__).parent / "shapes"
METHODS = ("full", "lora", "dora", "qlora")
IMPLEMENTATIONS = ("fastpeft", "eager", "peft")

# bitsandbytes' NF4: two weights a byte; a scale for 64 weights, itself one byte with an fp32 scale for 256 of them.
NF4_BLOCK, NF4_NESTED = 64, 256


@dataclass(frozen=True)
class Method:
    """What is trained, and by which code."""

    name: str = "lora"
    r: int = 16
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    dtype: torch.dtype = torch.bfloat16
    implementation: str = "fastpeft"


def shapes() -> dict[str, dict[str, Any]]:
    """The shipped configs by name."""
    return {k: v for path in sorted(SHAPES.glob("*.json")) for k, v in json.loads(path.read_text("utf-8")).items()}


def shape(name: str) -> Any:
    """A shipped config as a Transformers config. Raises KeyError."""
    from transformers import AutoConfig

    fields = dict(shapes()[name])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@dataclass(frozen=True)
class Sizes:
    """Parameters as (elements, element size, is trained, is quantised)."""

    layers: list[list[tuple[int, int, bool, bool]]]  # of each layer
    rest: list[tuple[int, int, bool, bool]]


class StandIn:
    """The model of a config under a method, on the meta device, with as few layers as have different kinds.

    Adapters lie there in the dtype of the computation, as autocast makes them; `sizes` has them in fp32, as they are
    kept.
    """

    def __init__(self, config: Any, method: Method) -> None:
        self.method = method
        self.config = config
        text = config.get_text_config()
        self._kinds = _kinds(text)
        few = copy.deepcopy(config)
        short = few.get_text_config()
        self._first = _first_of_each(self._kinds)
        length = max(self._first.values()) + 1
        short.num_hidden_layers = length
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(short, name, value[:length])
        self.model = _build(few, method)
        self._layers = [m for _, m in find_layers(self.model)]
        if len(self._layers) != length:
            raise ValueError(
                f"a {type(self.model).__name__} has {len(self._layers)} layers where its config says {length}"
            )

    @property
    def sizes(self) -> Sizes:
        """Of all parameters of the whole model."""
        inside: set[int] = set()
        kinds = []
        for layer in self._layers:
            inside.update(id(p) for p in layer.parameters())
            kinds.append(self._sizes(layer))
        rest = self._sizes(self.model, inside)
        return Sizes([kinds[self._first[k]] for k in self._kinds], rest)

    def _sizes(self, module: nn.Module, without: Any = ()) -> list[tuple[int, int, bool, bool]]:
        found = []
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        for p in module.parameters():
            if id(p) in without:
                continue
            adapter = id(p) in trained and self.method.name != "full"
            state = getattr(p, "quant_state", None)
            elements = p.numel() if state is None else state.shape.numel()
            found.append((elements, 4 if adapter else p.element_size(), id(p) in trained, state is not None))
        return found

    def count(self, batch: int, seq: int, modes: Any) -> Counts:
        """Of all layers, at batch rows of seq tokens, without padding."""
        ids = torch.empty((batch, seq), dtype=torch.int64, device="meta")
        counts = count(self.model, {"input_ids": ids, "labels": ids, "use_cache": False}, modes)
        where = [self._first[kind] for kind in self._kinds]
        return Counts(
            [counts.layers[i] for i in where],
            [counts.gradients[i] for i in where],
            counts.head,
            counts.head_gradients,
            counts.shared,
        )


def _kinds(text: Any) -> list[Any]:
    """What tells a layer from others, for each: the entries of every list in the config that has one a layer."""
    count = text.num_hidden_layers
    lists = [v for k, v in sorted(vars(text).items()) if isinstance(v, list) and len(v) == count]
    return [tuple(str(v[i]) for v in lists) for i in range(count)]


def _first_of_each(kinds: list[Any]) -> dict[Any, int]:
    first: dict[Any, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    return first


def _build(config: Any, method: Method) -> Any:
    from transformers import AutoModelForCausalLM

    import fastpeft

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=method.dtype)
    if method.name == "qlora":
        _quantise(model, method.dtype)
    if method.name != "full":
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "r": method.r,
            "lora_alpha": 2 * method.r,
            "lora_dropout": method.dropout,
            "target_modules": method.target_modules,
            "use_dora": method.name == "dora",
        }
        if method.implementation == "peft":
            import peft

            with torch.device("meta"):
                model = peft.get_peft_model(model, peft.LoraConfig(**fields), low_cpu_mem_usage=True)
        else:
            model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(**fields))
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(method.dtype)
    if method.implementation == "fastpeft":
        fastpeft.patch(model, verify=False)
    return model.train()


def _quantise(model: Any, dtype: torch.dtype) -> None:
    """Put bitsandbytes' NF4 layers with nested scales, without numbers too, where loading in 4 bits puts them.

    Raises ImportError if bitsandbytes is not installed.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    for _, layer in find_layers(model):
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            with torch.device("meta"):
                blocks = -(-linear.weight.numel() // NF4_BLOCK)
                scales = -(-blocks // NF4_NESTED)
                nested = QuantState(
                    torch.empty(scales), code=torch.empty(256), blocksize=NF4_NESTED, dtype=torch.float32
                )
                state = QuantState(
                    torch.empty(blocks, dtype=torch.uint8),
                    shape=linear.weight.shape,
                    code=torch.empty(16),
                    blocksize=NF4_BLOCK,
                    quant_type="nf4",
                    dtype=dtype,
                    offset=torch.empty(()),
                    state2=nested,
                )
                packed = torch.empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8)
                sizes = (linear.in_features, linear.out_features)
                new = Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4")
            new.weight = Params4bit(
                packed, quant_state=state, blocksize=NF4_BLOCK, quant_type="nf4", bnb_quantized=True, module=new
            )
            new.quant_state, new.bias = state, linear.bias
            parent, _, key = name.rpartition(".")
            setattr(layer.get_submodule(parent), key, new)
    model.is_loaded_in_4bit = True


def nf4_bytes(elements: int) -> int:
    """A weight of this many elements in NF4 with nested scales."""
    blocks = -(-elements // NF4_BLOCK)
    return -(-elements // 2) + blocks + 4 * -(-blocks // NF4_NESTED)
