"""In bf16 a patched model errs at most twice as much as the model itself does, against the same model in float64."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from test_parity import adapted
from tiny_configs import FAMILIES, Family
from torch import Tensor

import fastpeft

pytestmark = [pytest.mark.filterwarnings("ignore")]

DRAWS = 3  # models of other random weights: in a single one either side may happen to be nearly exact


def results(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and every gradient, in float64."""
    output = model(**batch)
    output.loss.backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": output.logits.detach().double()}


def in_dtype(family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in family.batch().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_error_in_bf16(name: str) -> None:
    """Of the logits and of each gradient, as the root mean square over models of several random weights."""
    family = FAMILIES[name]
    wide = torch.float32 if "experts" in str(family.options) else torch.float64  # torch multiplies experts in no other
    errors: dict[str, list[float]] = {}
    for draw in range(DRAWS):
        base = family.make()
        torch.manual_seed(draw)
        for parameter in base.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
        low = adapted(peft, base, family).to(torch.bfloat16)
        exact = results(copy.deepcopy(low).to(wide), in_dtype(family, wide))
        theirs = results(copy.deepcopy(low), in_dtype(family, torch.bfloat16))
        ours = results(fastpeft.patch(low), in_dtype(family, torch.bfloat16))
        for key, truth in exact.items():
            sums = errors.setdefault(key, [0.0, 0.0])
            for i, found in enumerate((ours, theirs)):
                sums[i] += ((found[key] - truth).norm() / truth.norm().clamp_min(1e-12)).item() ** 2
    worst = max(errors, key=lambda key: errors[key][0] / errors[key][1])
    mine, other = errors[worst]
    print(f"{name}: at most {(mine / other) ** 0.5:.2f} times the model's own error ({worst})")
    assert mine <= 2**2 * other
