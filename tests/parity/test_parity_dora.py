"""DoRA equals PEFT's on every family: logits and gradients, without dropout and with the masks exchanged, and training.

A norm left over from before an optimiser's step would show after the first one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from masks import exchanged_masks
from test_parity import GRADIENTS, _one_thread, adapted, assert_logits, gradients  # noqa: F401
from tiny_configs import FAMILIES, Family
from torch import Tensor, nn

import fastpeft

pytestmark = [pytest.mark.filterwarnings("ignore")]

OPTIMISERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3),
    "paged": lambda parameters: bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-3),
}


NAMES = [name for name, family in FAMILIES.items() if not family.options]  # PEFT refuses DoRA on stacked experts


def dora(library: Any, base: nn.Module, family: Family, p: float = 0.0, **options: Any) -> Any:
    """A copy of the base with DoRA whose magnitudes have moved; with dropout in the adapters alone."""
    model = adapted(library, base, family, use_dora=True, lora_dropout=p, **options)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape, generator=generator) * 0.6 + 0.7
    for layer in model.modules():
        if p and hasattr(layer, "lora_dropout"):
            layer.train()
    return model


def contenders(base: nn.Module, family: Family, p: float) -> Iterator[tuple[str, Any]]:
    yield "fastpeft", dora(fastpeft, base, family, p)
    yield "peft, patched", fastpeft.patch(dora(peft, base, family, p))


def exchanged(theirs: nn.Module, model: nn.Module) -> AbstractContextManager[None]:
    """`exchanged_masks`, by the places of the model's layers in their groups."""
    places = {n: m.__dict__["forward"].index for n, m in model.named_modules() if in_group(m)}
    return exchanged_masks(theirs, model, member=lambda name: places.get(name, 0))


def in_group(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "group", None) is not None and hasattr(module, "lora_dropout")


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str, p: float) -> None:
    family = FAMILIES[name]
    base = family.make()
    theirs = dora(peft, base, family, p)
    models = list(contenders(base, family, p))
    for who, model in models:
        with exchanged(theirs, model):
            logits, expected = gradients(theirs, family)
            theirs.zero_grad()
            ours, found = gradients(model, family)
        assert any("magnitude" in n for n in expected)
        assert_logits(ours, logits, who)
        assert found.keys() == expected.keys(), who
        for n, gradient in expected.items():
            error = (found[n] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error <= GRADIENTS, f"{who}: {n} {error:.1e}"
    if p == 0.0:
        rows = fastpeft.report(models[1][1]).rows
        assert all((row.fused or "").startswith("dora_linear") for row in rows if row.kind == "peft Linear"), rows


def trained(model: Any, family: Family, optimiser: str, steps: int) -> Tensor:
    """The losses of some steps, and the logits afterwards."""
    optimizer = OPTIMISERS[optimiser]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        loss = model(**family.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("name", "optimiser", "p"),
    [*((n, o, 0.0) for n in ("llama", "gpt2") for o in OPTIMISERS), ("llama", "fused", 0.05), ("llama", "8bit", 0.05)],
)
def test_twenty_steps(name: str, optimiser: str, p: float) -> None:
    family = FAMILIES[name]
    base = family.make()
    for who, model in contenders(base, family, p):
        peers = dora(peft, base, family, p)
        with exchanged(peers, model):
            theirs = trained(peers, family, optimiser, 20)
            ours = trained(model, family, optimiser, 20)
        assert theirs[-1] < theirs[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=who)


@pytest.mark.parametrize(
    ("name", "optimiser", "p"),
    [
        *((name, "fused", p) for name in ("llama", "qwen2", "gpt2", "bert") for p in (0.0, 0.05)),
        ("llama", "8bit", 0.0),
        ("llama", "8bit", 0.05),
    ],
)
def test_bf16_is_no_less_accurate(name: str, optimiser: str, p: float) -> None:
    """Against the same model in float64: errors of logits, gradients and of twenty losses, at most twice PEFT's."""
    family = FAMILIES[name]
    base = family.make().to(torch.bfloat16)
    runs = {}
    for who, library in (("exact", peft), ("peft", peft), ("ours", fastpeft)):
        model = dora(library, base, family, p)
        if who == "exact":
            model = model.double()
        with exchanged_masks(model if library is peft else nn.Module()):
            logits, found = gradients(copy.deepcopy(model), family)
            losses = trained(model, family, optimiser, 20 if p == 0.0 or name == "llama" else 2)
        runs[who] = {"logits": logits, "losses": losses, **found}
    errors = {
        who: torch.stack([(runs[who][n].double() - truth).norm() / truth.norm() for n, truth in runs["exact"].items()])
        for who in ("peft", "ours")
    }
    named = list(runs["exact"])
    names = torch.tensor([n in ("logits", "losses") for n in named])
    magnitudes = torch.tensor(["magnitude" in n for n in named])
    for kind in (names, magnitudes, ~names & ~magnitudes):
        ours, theirs = (errors[who][kind].nan_to_num().square().mean().sqrt() for who in ("ours", "peft"))
        assert ours <= 2 * theirs, (ours, theirs)
