"""The estimate, made on the meta device from a config, against real tensors on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from four_bits import in_4_bits
from transformers import AutoConfig, AutoModelForCausalLM

import fastpeft
from fastpeft.measure import LiveMemory, SavedActivations
from fastpeft.memory import MODES, find_layers, install
from fastpeft.memory.estimate import PARTS, Estimator
from fastpeft.memory.standin import IMPLEMENTATIONS, METHODS, Method, StandIn, nf4_bytes, shape, shapes
from fastpeft.ops import decisions

BATCH, LENGTH = 2, 96
SMALL = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 448, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 352, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 384, "num_key_value_heads": 2, "head_dim": 64},
    "mistral": {"intermediate_size": 448, "num_key_value_heads": 2, "sliding_window": None},
    "phi3": {"intermediate_size": 320, "num_key_value_heads": 4, "pad_token_id": 0},
    "gemma3_text": {"intermediate_size": 512, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 32},
}


def config_of(name: str, layers: int) -> Any:
    extra = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if "gemma" in name else {}
    return AutoConfig.for_model(name, **SMALL, **SHAPES[name], num_hidden_layers=layers, **extra)


def real(name: str, layers: int, mode: str, implementation: str = "fastpeft", method: str = "lora") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, layers))
    if method == "qlora":
        model = in_4_bits(model)
    if method != "full":
        config = fastpeft.LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_dropout=0.05, target_modules="all-linear", use_dora=method == "dora"
        )
        model = fastpeft.get_peft_model(model, config)
    model.train()
    if implementation == "fastpeft":
        return fastpeft.patch(model, verify=False, checkpoint=mode)
    install(model, [mode] * layers)
    return model


def loss_of(model: Any) -> Any:
    ids = torch.randint(0, 512, (BATCH, LENGTH))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def saved(model: Any) -> int:
    with SavedActivations(model) as kept:
        loss = loss_of(model)
    count = kept.bytes
    del loss
    return count


CASES = [
    *((name, "fastpeft", "lora") for name in SHAPES),
    ("llama", "eager", "lora"),
    ("gemma3_text", "eager", "lora"),
    *(("llama", "fastpeft", method) for method in ("full", "dora", "qlora")),
]


@pytest.mark.parametrize(("name", "implementation", "method"), CASES)
def test_activations_and_peak(name: str, implementation: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers' saved bytes within 2 %, the step's peak growth within 10 %, in every mode."""
    if name == "gemma3_text":
        # The estimate is of PyTorch's attention, whose result is kept twice where q does not lie by tokens, as after
        # Gemma's norms of q and k. Ours keeps it once: 3 % less of these layers.
        monkeypatch.setattr(decisions, "attention_tokens", lambda: float("inf"))
    stand_in = StandIn(config_of(name, 4), Method(method, 8, 0.05, "all-linear", torch.float32, implementation))
    counts = stand_in.count(BATCH, LENGTH, MODES)
    short, model = (real(name, layers, "none", implementation, method) for layers in (2, 4))
    for mode in MODES:
        for one in (short, model):
            install(one, [mode] * len(find_layers(one)))
        estimated = sum(layer[mode].kept for layer in counts.layers[:2])
        measured = saved(model) - saved(short)
        assert abs(estimated - measured) <= 0.02 * measured + 64, (mode, estimated, measured)
        model.zero_grad(set_to_none=True)
        with LiveMemory() as live:
            loss_of(model).backward()
        _, kept, alive, gradients = counts.peak([mode] * 4)
        assert abs(kept + alive + gradients - live.peak) <= 0.1 * live.peak, (mode, kept + alive, live.peak)


def test_llama_3_8b_layer_in_every_mode() -> None:
    """The floors, at dropout 0.05 in bf16, and what it costs: shares of a step's products."""
    stand_in = StandIn(shape("llama-3.1-8b"), Method(dropout=0.05))
    counts = stand_in.count(1, 2048, MODES)
    kept = {mode: counts.layers[0][mode].kept / 2048 for mode in MODES}
    again = {mode: counts.flops([mode] * 32) / counts.flops(["none"] * 32) - 1 for mode in MODES}
    print({mode: (round(kept[mode]), f"+{100 * again[mode]:.1f} %") for mode in MODES})
    assert kept["selective"] <= 96_000 and again["selective"] <= 0.002  # the adapters' first products
    assert kept["mlp"] <= 38_500 and again["mlp"] <= 0.27
    assert kept["block"] <= 8_500 and again["block"] <= 0.34
    assert kept["offload"] == 0


def llama_layer(hidden: int, wide: int, heads: int, keys: int, r: int) -> dict[str, int]:
    """Bytes a token that a layer of Llama's kind keeps in bf16, adapters on all seven projections."""
    block = 2 * hidden
    attention = 2 * (hidden + 2 * keys) + 2 * hidden + 4 * heads  # q, k, v; what it returns; log-sum-exp
    products = 2 * (2 * wide)  # gate and up
    thin = 2 * 6 * r + 2 * 4  # S of the adapters but o's, two rstd
    selective = 2 * block + attention + products + 2 * r
    return {"none": selective + thin, "selective": selective, "mlp": selective - products, "block": block, "offload": 0}


def test_the_formula_of_a_layer_counted_and_measured() -> None:
    """Llama-3-8B's layer counted without numbers, an eighth of it measured with."""
    assert llama_layer(4096, 14336, 32, 1024, 16)["none"] == 94_568
    counts = StandIn(shape("llama-3.1-8b"), Method(dropout=0.05)).count(1, 512, MODES)
    text = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 512, "hidden_size": 512}
    kept: dict[str, list[int]] = {mode: [] for mode in MODES}
    for layers in (1, 2):
        config = AutoConfig.for_model("llama", **text, intermediate_size=1792, num_hidden_layers=layers)
        adapter = fastpeft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.05, target_modules="all-linear")
        model = fastpeft.get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
        model = fastpeft.patch(model.to(torch.bfloat16).train(), verify=False)
        for mode in MODES:
            install(model, [mode] * layers)
            kept[mode].append(saved(model))
    for mode in MODES:
        assert counts.layers[0][mode].kept // 512 == llama_layer(4096, 14336, 32, 1024, 16)[mode], mode
        measured = (kept[mode][1] - kept[mode][0]) / (BATCH * LENGTH)
        assert abs(measured - llama_layer(512, 1792, 4, 128, 16)[mode]) < 1, mode


@pytest.mark.parametrize("name", sorted(shapes()))
def test_every_shipped_shape_is_a_config(name: str) -> None:
    config = shape(name)
    text = config.get_text_config()
    assert text.num_hidden_layers == shapes()[name]["num_hidden_layers"]
    assert len({str(k) for k in getattr(text, "layer_types", None) or ["one"]}) <= 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("smollm2-135m", 134_515_008),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_parameters_are_those_of_the_published_model(name: str, parameters: int) -> None:
    sizes = Estimator(shape(name), Method("full")).stand_in.sizes
    assert sum(p[0] for layer in sizes.layers for p in layer) + sum(p[0] for p in sizes.rest) == parameters


def test_methods_optimizers_and_parallel() -> None:
    config = config_of("llama", 4)
    made = {m: Estimator(config, Method(m, 8, dtype=torch.float32)).estimate(1, 64, "block") for m in METHODS}
    elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert made["full"].weights == made["full"].gradients == 4 * elements and made["full"].optimizer == 8 * elements
    assert made["lora"].weights == 4 * elements and made["lora"].optimizer == 2 * made["lora"].adapters
    assert made["dora"].adapters > made["lora"].adapters
    linear = [p for layer in Estimator(config, Method("qlora", 8)).stand_in.sizes.layers for p in layer if p[3]]
    assert made["lora"].weights - made["qlora"].weights == sum(4 * p[0] - nf4_bytes(p[0]) for p in linear)
    eight = Estimator(config, Method("full", dtype=torch.float32), "adamw_8bit").estimate(1, 64, "block")
    assert 0.25 < eight.optimizer / made["full"].optimizer < 0.27
    paged = Estimator(config, Method("full", dtype=torch.float32), "paged_adamw_8bit").estimate(1, 64, "block")
    assert paged.optimizer + paged.paged_out == eight.optimizer and paged.paged_out == 0  # all below 100,000 elements
    ddp = Estimator(config, Method("full"), gpus=4).estimate(1, 64, "block")
    assert ddp.communication == ddp.gradients
    sharded = Estimator(config, Method("full"), gpus=4, parallel="fsdp2").estimate(1, 64, "block")
    assert sharded.weights == ddp.weights // 4 and sharded.optimizer == ddp.optimizer // 4
    for wrong in ({"optim": "adamw"}, {"parallel": "tp"}, {"gpus": 0}):
        with pytest.raises(ValueError, match="must be"):
            Estimator(config, Method(), **wrong)
    assert set(IMPLEMENTATIONS) == {"fastpeft", "eager", "peft"}


def test_the_longest_rows_that_fit() -> None:
    estimator = Estimator(config_of("llama", 4), Method("lora", 8))
    budget = 12 << 20
    best = estimator.longest(2, "block", budget, 4096, multiple=16)
    assert best is not None and best.peak <= budget
    assert estimator.estimate(2, best.seq + 16, "block").peak > budget
    assert estimator.longest(1, "none", 1 << 20, 4096) is None


def test_command(fastpeft_command: Callable[..., Any], tmp_path: Path) -> None:
    common = ("estimate", "--model", "smollm2-135m", "--seq", 64)
    shown = fastpeft_command(*common, "--method", "qlora", "--out", tmp_path).output
    assert "selective" in shown and "weights" in shown and "estimate" in shown
    assert (tmp_path / "estimate.png").stat().st_size > 1000
    report = json.loads((tmp_path / "estimate.json").read_text())
    one = report["estimates"][0]
    assert one["peak"] == sum(one[part] for part in PARTS) and [e["checkpoint"] for e in report["estimates"]] == list(
        MODES
    )
    again = json.loads(fastpeft_command(*common, "--method", "qlora", "--json", "--checkpoint", "mlp").stdout)
    assert again["estimates"] == [report["estimates"][2]]
    fitting = fastpeft_command(*common, "--fit", "600MiB", "--checkpoint", "block", "--json").stdout
    assert all(e["peak"] <= 600 << 20 for e in json.loads(fitting)["estimates"])
    assert "with --fit" in fastpeft_command(*common, "--checkpoint", "auto", code=2).output
    assert "not even one row" in fastpeft_command(*common, "--fit", "1MiB", "--checkpoint", "block", code=2).output


def test_layers_of_the_same_kind_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.memory import counting

    calls = []
    count_layer = counting._count_layer
    monkeypatch.setattr(counting, "_count_layer", lambda *a: (calls.append(a[2]), count_layer(*a))[1])
    model = real("gemma3_text", 4, "none")
    counts = counting.count(model, {"input_ids": torch.ones(1, 40, dtype=torch.int64)}, ["block"])
    assert len(counts.layers) == len(find_layers(model)) == 4
    assert len(calls) == 4  # two kinds, two modes
