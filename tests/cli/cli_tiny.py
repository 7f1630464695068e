"""Dialogues and a tokenizer in a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the cat sat on a mat and then it ran to see what was there hello good day how are you fine thanks"
WORDS = TEXT.split()


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Dialogues of different lengths over a few words."""
    result = []
    for i in range(count):
        question = " ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(2 + i % 5))
        answer = " ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(3 + i % 7))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if i % 4 == 0:
            messages += [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": f"it ran {answer}"}]
        result.append({"messages": messages})
    return result


def write_rows(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def make_tokenizer(template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system"], trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
    )
    result.chat_template = template
    return result
