"""The whole path: load in 4 bits, prepare, adapt, patch, train with the Trainer, resume, save, load again, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_tiny import IDS, LIBRARIES, adapted, load, quietly
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft.layers.bnb import keep_scales
from fastpeft.ops.backend import cpu_extension

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(3, 403).view(10, 40) * 11 % 125 + 3]


def fresh(folder: Path, library: str, dropout: float = 0.0, **options: Any) -> Any:
    return adapted(LIBRARIES[library], load(folder, **options), lora_dropout=dropout, init_lora_weights=True)


def trained(model: Any, out: Path, resume: Path | None = None) -> Any:
    """The Trainer after six steps, having kept checkpoints of the third and the sixth."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=2,
        learning_rate=1e-2, seed=3, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("library", LIBRARIES)
def test_train_save_load_generate(folder: Path, tmp_path: Path, library: str) -> None:
    model = fastpeft.patch(fresh(folder, library))
    trainer = trained(model, tmp_path / "run")
    expected = losses(trained(fresh(folder, "peft"), tmp_path / "peft"))
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected), rtol=0, atol=2e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        files = {path.name for path in (tmp_path / "run" / checkpoint).iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files

    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved and all("lora_" in name and t.is_floating_point() for name, t in saved.items())

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    tokens = model.generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] > 5
    for reader in LIBRARIES.values():
        again = reader.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
        fastpeft.patch(again)
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(again.generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False), tokens)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_resumed_run_is_the_same_run(folder: Path, tmp_path: Path, library: str) -> None:
    """With dropout, whose masks hang on the random state that a checkpoint holds."""
    whole = fastpeft.patch(fresh(folder, library, dropout=0.1))
    wanted = losses(trained(whole, tmp_path / "run"))
    resumed = fastpeft.patch(fresh(folder, library, dropout=0.1))
    trainer = trained(resumed, tmp_path / "run", tmp_path / "run" / "checkpoint-3")
    assert losses(trainer)[-3:] == wanted[-3:]
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(resumed)[name], value), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_trl_trains_it(folder: Path, tmp_path: Path, library: str) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS])

    def train(model: Any, out: Path) -> list[float]:
        arguments = trl.SFTConfig(
            output_dir=str(out), max_steps=4, save_steps=4, logging_steps=1, per_device_train_batch_size=2,
            learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=word_tokenizer())
        trainer.train()
        return losses(trainer)

    wanted = train(fresh(folder, "peft"), tmp_path / "plain")
    found = train(fastpeft.patch(fresh(folder, library)), tmp_path / "patched")
    assert len(set(wanted)) == 4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=2e-3)
    files = {path.name for path in (tmp_path / "patched" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    config = json.loads((tmp_path / "patched" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(folder)


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w2", pad_token="w0", eos_token="w1")


def test_an_unadapted_model_is_refused_as_before(folder: Path, tmp_path: Path) -> None:
    """What the Trainer says of a quantised model without adapters is not hidden by a patch."""
    with pytest.raises(ValueError, match="quantized"):
        trained(fastpeft.patch(load(folder)), tmp_path)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(folder: Path, library: str, reentrant: bool) -> None:
    """Dropout is on: the masks of the second forward must be those of the first."""
    found = []
    for checkpointed in (False, True):
        model = adapted(LIBRARIES[library], load(folder), reentrant=reentrant, lora_dropout=0.2)
        if not checkpointed:
            model.gradient_checkpointing_disable()
        fastpeft.patch(model.train())
        torch.manual_seed(1)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 28
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_generating_in_a_cache_follows_the_model_without_one(folder: Path) -> None:
    """Single tokens take other kernels than whole prompts."""
    model = fastpeft.patch(fresh(folder, "peft")).eval()
    tokens = model.generate(input_ids=IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=True)
    slowly = quietly(model.generate, input_ids=IDS[:1, :6], max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(tokens, slowly)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("prompts", [1, 3])
def test_decoding_writes_the_tokens_of_the_model_that_was_not_patched(folder: Path, library: str, prompts: int) -> None:
    """One row a projection or a few: the operators for few rows, which write the same text."""
    model = adapted(LIBRARIES[library], load(folder)).eval()
    keep_scales(model)
    ids, written = IDS.view(-1, 8)[:prompts], []
    for _ in range(2):
        model.generation_config.eos_token_id = None
        written.append(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False))
        fastpeft.patch(model)
    assert torch.equal(*written)
    names: list[str] = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func._schema.name)
            return func(*args, **kwargs or {})

    with Called(), torch.no_grad():
        model(input_ids=ids[:, :1])
    if cpu_extension() is not None:
        assert names.count("fastpeft::lora_linear_4bit") == 14  # a projection, an operator
