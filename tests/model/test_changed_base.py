"""Adapters whose initialisation changes the base weights do not go together with others."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

import fastpeft


@pytest.mark.parametrize("first, second", [("pissa", True), (True, "olora"), (True, True)])
def test_a_second_adapter_beside_a_changed_base_warns(first: bool | str, second: bool | str) -> None:
    def config(method: bool | str) -> fastpeft.LoraConfig:
        return fastpeft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=method)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one adapter alone is fine
        model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config(first))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_adapter("other", config(second))
    found = [str(w.message) for w in caught if "changes the base weights" in str(w.message)]
    assert len(found) == (0 if first is second is True else 1)
