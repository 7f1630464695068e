"""Rows to tokens: the chat template, which tokens are learnt, and batches.

In a dialogue only the assistant's turns are learnt: what the model will have to produce after the template's generation
prompt, up to and including the special token that ends the turn. A template that marks those turns itself
(`{% generation %}`) is taken at its word; for any other the turns are found in the rendered text and mapped to tokens
by the tokenizer's offsets. A text is learnt whole; one longer than the maximal length becomes several rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpeft.cli.data import Example
from fastpeft.cli.errors import CommandError, DataError

IGNORED = -100


def default_chat_template(tokenizer: Any) -> str:
    """A plain template for a tokenizer without one: `### User:` and `### Assistant:` sections, eos after an answer."""
    bos = ""
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        bos = "{{ bos_token }}"
    end = "{{ eos_token }}" if tokenizer.eos_token is not None else ""
    return (
        bos + "{% for message in messages %}"
        "{{ '### ' + message['role'] | capitalize + ':\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}" + end + "{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
    )


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give `tokenizer` the default template if it has none; whether it needed it."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = default_chat_template(tokenizer)
    return True


@dataclass
class Encoded:
    """Tokens of the rows: `ids[i]` int32 and `learnt[i]` bool, both of row i's length."""

    ids: list[np.ndarray]
    learnt: list[np.ndarray]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[index], "learnt": self.learnt[index]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.ids]

    @property
    def learnt_tokens(self) -> int:
        """Tokens over all rows that the loss is taken on."""
        return int(sum(row[1:].sum() for row in self.learnt))


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], where: str, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except Exception as error:  # jinja's errors, and raise_exception() inside a template
        raise DataError(f"{where}: the model's chat template refuses this dialogue: {error}") from None


def _answer_spans(tokenizer: Any, example: Example, text: str) -> Iterator[tuple[int, int]]:
    """(start, end) in characters of each assistant turn in `text`, without what ends it."""
    position = 0
    for index, message in enumerate(example.messages):
        content = message["content"].strip()
        if message["role"] != "assistant":
            # A question may quote its answer: look for the answer only behind it.
            found = text.find(content, position)
            position = found + len(content) if found >= 0 else position
            continue
        opening = _render(tokenizer, example.messages[:index], example.where, add_generation_prompt=True)
        start = len(opening) if len(opening) >= position and text.startswith(opening) else None
        found = text.find(content, position if start is None else start)
        if found < 0:
            raise DataError(
                f'{example.where}: the chat template changes the text of "messages"[{index}], so its tokens cannot be '
                "told from the rest; use --loss-on all"
            )
        position = found + len(content)
        yield (found if start is None else start), position


def _encode_dialogue(tokenizer: Any, example: Example, completions_only: bool) -> tuple[list[int], np.ndarray]:
    if completions_only and "{% generation %}" in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}"):
        try:
            output = tokenizer.apply_chat_template(
                list(example.messages), return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise DataError(f"{example.where}: the model's chat template refuses this dialogue: {error}") from None
        return output["input_ids"], np.asarray(output["assistant_masks"], dtype=bool)

    text = _render(tokenizer, example.messages, example.where)
    if not completions_only:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, np.ones(len(ids), dtype=bool)
    if not tokenizer.is_fast:
        raise CommandError(
            f"{type(tokenizer).__name__} gives no character offsets, so answers cannot be told from questions; "
            "use --loss-on all"
        )
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = output["input_ids"], output["offset_mapping"]
    special = set(tokenizer.all_special_ids)
    learnt = np.zeros(len(ids), dtype=bool)
    token = 0
    for start, end in _answer_spans(tokenizer, example, text):
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        while token < len(ids) and offsets[token][0] < end:
            learnt[token] = True
            token += 1
        # The special token that ends the turn, with any blank the template puts before it.
        close = token
        while close < len(ids) and ids[close] not in special and not text[slice(*offsets[close])].strip():
            close += 1
        if close < len(ids) and ids[close] in special:
            learnt[token : close + 1] = True
            token = close + 1
    return ids, learnt


def _encode_text(tokenizer: Any, example: Example) -> list[int]:
    ids = tokenizer(example.text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int,
    completions_only: bool = True,
    on_row: Callable[[], None] | None = None,
) -> Encoded:
    """Tokenise `examples`.

    Args:
        tokenizer: with a chat template where there are dialogues (see `ensure_chat_template`).
        max_length: a dialogue is cut there, and dropped when nothing to learn is left; a text is divided there.
        completions_only: learn the assistant's turns only; False learns every token.
        on_row: called after each row, for a progress display.

    Raises:
        DataError: the template refuses a row, or no row is left.
        CommandError: the tokenizer cannot tell which tokens are the answers.
    """
    result = Encoded([], [])
    for example in examples:
        if example.messages:
            ids, learnt = _encode_dialogue(tokenizer, example, completions_only)
            result.truncated += len(ids) > max_length
            pieces = [(ids[:max_length], learnt[:max_length])]
        else:
            ids = _encode_text(tokenizer, example)
            pieces = [
                (ids[start : start + max_length], np.ones(len(ids[start : start + max_length]), dtype=bool))
                for start in range(0, len(ids), max_length)
            ]
        for piece, mask in pieces:
            if mask[1:].any():
                result.ids.append(np.asarray(piece, dtype=np.int32))
                result.learnt.append(mask)
            else:
                # The rest of a text may be a single token; a dialogue may lose its answer to the cut.
                result.dropped += bool(example.messages)
        if on_row is not None:
            on_row()
    if not result.ids:
        raise DataError(f"no row has anything to learn within {max_length} tokens; raise --max-length")
    return result


@dataclass
class Collator:
    """Rows to a batch: padded on the right to its longest row, rounded up to a multiple of `multiple`.

    Returns input_ids, attention_mask and labels, each (B, T) int64; labels are -100 where nothing is learnt. `tokens`,
    a plain int, counts the real ones.
    """

    pad_id: int
    multiple: int = 1

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor | int]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = row["input_ids"]
            mask[index, :length] = 1
            labels[index, :length] = np.where(row["learnt"], row["input_ids"], IGNORED)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "tokens": int(mask.sum()),
        }


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's pad, else eos, else 0 (padding is masked out everywhere)."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
