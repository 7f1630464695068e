"""What the model answers, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from fastpeft.cli.data import Example
from fastpeft.cli.encode import pad_id

_WORDS = 12


def default_prompts(examples: Sequence[Example], count: int) -> list[str]:
    """`count` different prompts spread over `examples`: the last question before an answer, or a text's first words."""
    prompts: list[str] = []
    for index in _spread(len(examples)):
        example = examples[index]
        questions = [message["content"] for message in example.prompt if message["role"] == "user"]
        prompt = questions[-1].strip() if questions else " ".join(example.text.split()[:_WORDS])
        if prompt and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) >= count:
            break
    return prompts


def _spread(length: int) -> list[int]:
    """0 … length-1, far apart ones first (bit-reversed order)."""
    bits = max(1, (length - 1).bit_length())
    order = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(2**bits))
    return [index for index in order if index < length]


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], dialogue: bool, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt, as an answer when `dialogue`, else as a text. Restores train mode."""
    training = model.training
    model.eval()
    answers = []
    try:
        for prompt in prompts:
            if dialogue:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
                batch = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                batch = tokenizer(prompt, return_tensors="pt")
            ids = batch["input_ids"].to(model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad_id(tokenizer),
                )
            answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    finally:
        model.train(training)
    return answers


def samples_table(samples: Sequence[dict[str, str]]) -> Table:
    """Prompt, answer before, answer after, side by side."""
    table = Table(box=box.ROUNDED, show_lines=True, border_style="faint", title="[bold]Answers[/bold]", expand=True)
    table.add_column("prompt", style="cyan", ratio=2, overflow="fold")
    table.add_column("before", style="faint", ratio=4, overflow="fold")
    table.add_column("after", ratio=4, overflow="fold")
    for sample in samples:
        table.add_row(*(Text(sample.get(key) or "∅") for key in ("prompt", "before", "after")))
    return table
