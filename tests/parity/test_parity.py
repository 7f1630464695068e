"""LoRA equals PEFT 0.21, unpatched and patched: logits, every gradient, a training curve, and files both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_configs import FAMILIES, Family
from torch import Tensor, nn

import fastpeft

pytestmark = [pytest.mark.filterwarnings("ignore")]

LOGITS, GRADIENTS, CURVE = 1e-4, 1e-3, 1e-4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family: Family) -> nn.Module:
    return family.make()


def adapted(library: Any, base: nn.Module, family: Family, **options: Any) -> Any:
    """A copy of the base with an adapter, drawn from the same seed."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": family.target_modules, "init_lora_weights": False}
    config = library.LoraConfig(**(settings | family.options | options))
    torch.manual_seed(5)
    return library.get_peft_model(copy.deepcopy(base), config)


def contenders(base: nn.Module, family: Family, **options: Any) -> Iterator[tuple[str, Any]]:
    """fastpeft's model, unpatched and patched, and PEFT's, patched."""
    yield "fastpeft", adapted(fastpeft, base, family, **options)
    yield "fastpeft, patched", fastpeft.patch(adapted(fastpeft, base, family, **options))
    yield "peft, patched", fastpeft.patch(adapted(peft, base, family, **options))


def logits_of(model: Any, family: Family) -> Tensor:
    return model(**family.batch()).logits


def gradients(model: Any, family: Family) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(**family.batch())
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def curve(model: Any, family: Family) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)
    losses = []
    for _ in range(4):
        loss = model(**family.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_logits(ours: Tensor, theirs: Tensor, who: str) -> None:
    assert (ours - theirs).abs().max() <= LOGITS * max(1.0, theirs.abs().max().item()), who


def test_logits_and_gradients(family: Family, base: nn.Module) -> None:
    theirs = adapted(peft, base, family)
    logits, expected = gradients(theirs, family)
    assert expected
    parameters = dict(theirs.named_parameters())
    for who, model in contenders(base, family):
        for name, parameter in model.named_parameters():  # the same names, the same random numbers
            assert torch.equal(parameter, parameters[name]), f"{who}: {name}"
        ours, found = gradients(model, family)
        assert_logits(ours, logits, who)
        assert found.keys() == expected.keys(), who
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error <= GRADIENTS, f"{who}: {name} {error:.1e}"


def test_curve(family: Family, base: nn.Module) -> None:
    theirs = curve(adapted(peft, base, family, init_lora_weights=True), family)
    assert theirs[-1] < theirs[0]
    for who, model in contenders(base, family, init_lora_weights=True):
        assert curve(model, family) == pytest.approx(theirs, abs=CURVE), who


def test_files_both_ways(family: Family, base: nn.Module, tmp_path: Path) -> None:
    models = {"peft": adapted(peft, base, family), "fastpeft": adapted(fastpeft, base, family)}
    expected = logits_of(models["peft"], family).detach()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    fastpeft.patch(models["fastpeft"]).save_pretrained(tmp_path / "patched")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in (*models, "patched")]
    assert configs[1] == configs[0] and configs[2] == configs[0]
    for writer, reader in (("peft", fastpeft), ("fastpeft", peft), ("patched", peft)):
        model = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / writer)
        assert_logits(logits_of(model, family), expected, f"written by {writer}")
        fastpeft.patch(model)
        assert_logits(logits_of(model, family), expected, f"written by {writer}, patched")


def test_groups_are_found(family: Family, base: nn.Module) -> None:
    model = fastpeft.patch(adapted(peft, base, family))
    report = fastpeft.report(model)
    assert report.note is None
    losses = [row.fused for row in report.rows if row.kind.startswith("head")]
    assert losses == ([] if family.model_type == "vit" else ["linear_cross_entropy"])
    assert family.model_type == "vit" or model(**family.batch()).logits.pending
    groups = {getattr(m.__dict__.get("forward"), "group", None) for m in model.modules()} - {None}
    assert sum(len(group.members) > 1 for group in groups) == family.groups
    assert family.joined == sum("is not kept" in (row.form or "") for row in report.rows)
    assert all("no fused form" in row.reason for row in report.left), report.left
