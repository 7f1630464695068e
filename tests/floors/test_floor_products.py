"""How many products and passes over large tensors a patched layer makes: of four groups, three of them made with
their input."""

from __future__ import annotations

import pytest
from floors_layer import Measured, measure

import fastpeft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def lora_calls(measured: Measured) -> dict[str, int]:
    calls = measured.forward + measured.backward
    return {name.partition("::")[2]: n for name, n in calls.items() if name.startswith("fastpeft")}


# The passes that make s and dA: with the norm that makes q, k and v's input and gate and up's, with the activation that
# makes down's, and alone for o, whose input the attention makes.
SHRINKS = {
    "rms_norm_shrink": 2,
    "glu_shrink": 1,
    "lora_shrink": 1,
    "rms_norm_shrink_backward": 2,
    "glu_shrink_backward": 1,
    "lora_shrink_backward": 1,
}


@pytest.mark.parametrize("library", ["peft", "fastpeft"])
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_products_of_a_layer(library: str, p: float) -> None:
    """q-k-v, o, gate-up and down: x is read once a group for the adapters, every dy once for its adapter."""
    with fastpeft.backend("reference"):
        ours = measure(library, p)
    theirs = measure("peft", p, patched=False)
    assert (theirs.products("forward"), theirs.products("backward")) == (21, 35)
    assert (ours.products("forward"), ours.products("backward")) == (7, 7)  # the base model's own
    assert lora_calls(ours) == SHRINKS | {"lora_expand_": 7, "lora_expand_backward": 7, "rope": 2}


def test_base_products_of_stacked_weights() -> None:
    with fastpeft.backend("reference"):
        ours = measure("peft", stack="always")
    assert (ours.products("forward"), ours.products("backward")) == (4, 7)
    assert lora_calls(ours) == SHRINKS | {"lora_expand_": 4, "lora_expand_backward": 7, "rope": 2}


def test_fewer_operator_calls_than_peft_altogether() -> None:
    ours, theirs = measure("peft", 0.05), measure("peft", 0.05, patched=False)
    calls = [sum((m.forward + m.backward).values()) for m in (ours, theirs)]
    print(f"operator calls of a layer, forward and backward: {calls[0]}, PEFT {calls[1]}")
    assert calls[0] < 0.75 * calls[1]
