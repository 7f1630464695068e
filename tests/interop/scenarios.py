"""What users do with the libraries around PEFT, on tiny random models.

Run in pytest's own process with the real peft installed, and by `main()` in a process that has no peft (see
`test_without_peft.py`), where it prints one JSON line per scenario.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "b", "c", "the", "cat", "sat", "on", "mat", "user", "assistant", "yes", "no", "good", "bad", ".", "!"]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def tokenizer() -> Any:
    """A word-level tokenizer of a few words, with the special tokens and the chat template that trainers ask for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    return made


def model() -> Any:
    """A Llama of two layers, always with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).eval()


def config(**options: Any) -> Any:
    import fastpeft

    return fastpeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def peft_model() -> Any:
    import fastpeft

    torch.manual_seed(1)
    return fastpeft.get_peft_model(model(), config())


def arguments(kind: Any, out: Path, **options: Any) -> Any:
    """Training arguments for a few quiet steps on the CPU."""
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "bf16": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    return kind(**{**settings, **options})


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Token rows for the plain Trainer."""
    torch.manual_seed(2)
    ids = torch.randint(4, len(WORDS), (count, 6))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def adapter(of: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights."""
    return {name: p.detach().clone() for name, p in of.named_parameters() if "lora_" in name}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    assert before.keys() == after.keys()
    return any(not torch.equal(before[name], after[name]) for name in before)


def trainer_saves_resumes_and_loads_the_best(out: Path) -> None:
    """Checkpoints hold adapter files and no base model; a resumed run ends where the uninterrupted one does."""
    from transformers import Trainer, TrainingArguments

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    net = peft_model()
    before = adapter(net)
    args = arguments(TrainingArguments, out / "run", **options)
    whole = Trainer(model=net, args=args, train_dataset=rows(), eval_dataset=rows(4))
    whole.train()
    assert changed(before, adapter(net))
    step2, step4 = out / "run/checkpoint-2", out / "run/checkpoint-4"
    names = {path.name for path in step2.iterdir()}
    assert names >= ADAPTER_FILES and not any(
        "model-0" in n or n in ("model.safetensors", "config.json") for n in names
    )
    best = Path(whole.state.best_model_checkpoint)
    from safetensors.torch import load_file

    import fastpeft

    held = {name: t.clone() for name, t in fastpeft.get_peft_model_state_dict(net).items()}
    stored = load_file(best / "adapter_model.safetensors")
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in held)

    resumed_net = peft_model()
    again = Trainer(
        model=resumed_net,
        args=arguments(TrainingArguments, out / "run2", **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )
    again.train(resume_from_checkpoint=str(step2))
    one, two = (
        load_file(step4 / "adapter_model.safetensors"),
        load_file(out / "run2/checkpoint-4/adapter_model.safetensors"),
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def sft_takes_a_peft_model(out: Path) -> None:
    """TRL's SFTTrainer trains the adapter of a fastpeft model and saves only that."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    net = peft_model()
    before = adapter(net)
    data = Dataset.from_list([{"text": "the cat sat on the mat . a b c"}] * 8)
    args = arguments(SFTConfig, out / "sft", max_length=16, dataset_num_proc=None)
    trainer = SFTTrainer(model=net, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert trainer.accelerator.unwrap_model(trainer.model) is net and changed(before, adapter(net))
    trainer.save_model(str(out / "saved"))
    assert {path.name for path in (out / "saved").iterdir()} >= ADAPTER_FILES
    assert not (out / "saved/model.safetensors").exists()


def sft_takes_a_config(out: Path) -> None:
    """`SFTTrainer(peft_config=fastpeft.LoraConfig(…))` makes the adapter itself; fastpeft loads what it saves."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import fastpeft

    data = Dataset.from_list([{"text": "the cat sat on the mat . a b c"}] * 8)
    args = arguments(SFTConfig, out / "sft", max_length=16)
    trainer = SFTTrainer(
        model=model(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=config()
    )
    before = adapter(trainer.model)
    trainer.train()
    assert before and changed(before, adapter(trainer.model))
    trainer.save_model(str(out / "saved"))
    loaded = fastpeft.PeftModel.from_pretrained(model(), str(out / "saved"))
    ids = torch.randint(4, 20, (2, 5))
    trainer.model.eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def _preferences() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "the cat sat", "chosen": " good yes .", "rejected": " bad no !"}] * 8)


def dpo_takes_a_peft_model(out: Path) -> None:
    """TRL's DPOTrainer takes the frozen base model as its reference and trains the adapter."""
    from trl import DPOConfig, DPOTrainer

    net = peft_model()
    before = adapter(net)
    args = arguments(DPOConfig, out / "dpo", max_length=16)
    trainer = DPOTrainer(model=net, args=args, train_dataset=_preferences(), processing_class=tokenizer())
    trainer.train()
    assert trainer.ref_model is None
    after = adapter(net)
    assert changed(before, {name: after[name] for name in before})


def dpo_takes_a_config(out: Path) -> None:
    """`DPOTrainer(peft_config=fastpeft.LoraConfig(…))`."""
    from trl import DPOConfig, DPOTrainer

    args = arguments(DPOConfig, out / "dpo", max_length=16)
    trainer = DPOTrainer(
        model=model(), args=args, train_dataset=_preferences(), processing_class=tokenizer(), peft_config=config()
    )
    before = adapter(trainer.model)
    trainer.train()
    after = adapter(trainer.model)
    assert before and changed(before, {name: after[name] for name in before})


def accelerate_prepares_unwraps_and_saves(out: Path) -> None:
    """Accelerate wraps, gives the model back, and its state survives a round trip."""
    from accelerate import Accelerator

    net = peft_model()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    prepared, optimizer = accelerator.prepare(net, optimizer)
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("input_ids", "labels", "attention_mask")}
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
    accelerator.save_state(str(out / "state"))
    kept = adapter(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    accelerator.load_state(str(out / "state"))
    assert not changed(kept, adapter(net))
    unwrapped = accelerator.unwrap_model(prepared)
    assert unwrapped is net
    unwrapped.save_pretrained(str(out / "adapter"), save_function=accelerator.save)
    assert {path.name for path in (out / "adapter").iterdir()} >= ADAPTER_FILES


def add_adapter_on_a_transformers_model(out: Path) -> None:
    """`PreTrainedModel.add_adapter(fastpeft.LoraConfig(…))`: add, train, disable, save, load, delete."""
    net = model()
    ids = torch.randint(4, 20, (2, 5))
    base = net(input_ids=ids).logits
    net.add_adapter(config(init_lora_weights=False))
    assert net.active_adapters() == ["default"] and adapter(net)
    adapted = net(input_ids=ids).logits
    assert not torch.allclose(base, adapted)
    net.disable_adapters()
    assert torch.equal(net(input_ids=ids).logits, base)
    net.enable_adapters()
    assert torch.equal(net(input_ids=ids).logits, adapted)
    net.train()
    net(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "lora_" in name)
    assert all(p.grad is None for name, p in net.named_parameters() if "lora_" not in name)
    net.eval()
    net.add_adapter(config(init_lora_weights=False), adapter_name="other")
    net.set_adapter("other")
    assert not torch.allclose(net(input_ids=ids).logits, adapted)
    net.delete_adapter("other")
    net.set_adapter("default")
    net.save_pretrained(str(out / "adapter"))
    assert {path.name for path in (out / "adapter").iterdir()} >= ADAPTER_FILES
    fresh = model()
    fresh.load_adapter(str(out / "adapter"))
    torch.testing.assert_close(fresh(input_ids=ids).logits, adapted, atol=1e-6, rtol=1e-6)


def generate_with_and_without_the_adapter(out: Path) -> None:
    """`generate()` uses the cache, follows the adapter, and `disable_adapter()` gives the base model's text."""
    net = peft_model()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0)
    net.eval()
    ids = torch.tensor([[2, 5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    adapted = net.generate(input_ids=ids, **settings)
    assert torch.equal(adapted, net.generate(input_ids=ids, use_cache=False, **settings))
    plain = model().generate(input_ids=ids, **settings)
    with net.disable_adapter():
        assert torch.equal(net.generate(input_ids=ids, **settings), plain)
    merged = net.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, **settings), adapted)


SCENARIOS = {
    function.__name__: function
    for function in (
        trainer_saves_resumes_and_loads_the_best,
        sft_takes_a_peft_model,
        sft_takes_a_config,
        dpo_takes_a_peft_model,
        dpo_takes_a_config,
        accelerate_prepares_unwraps_and_saves,
        add_adapter_on_a_transformers_model,
        generate_with_and_without_the_adapter,
    )
}


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    import fastpeft

    fastpeft.install_as_peft()
    for name, scenario in SCENARIOS.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                scenario(Path(folder))
            error = None
        except Exception:
            error = traceback.format_exc()
        print("RESULT " + json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    main()
