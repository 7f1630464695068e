"""Which tokens are learnt: the answers, their end of turn, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cli_tiny import CHATML, make_tokenizer

from fastpeft.cli.data import Example
from fastpeft.cli.encode import Collator, encode, ensure_chat_template
from fastpeft.cli.errors import CommandError, DataError

TURNS = ("the cat sat", "then it ran", "and then it ran?", "fine thanks")
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ message['content'] + '<|im_end|>' }}{%- endif -%}{{ '\n' }}",
)
# Puts a thought before the last answer only, as some models' templates do: earlier turns are no prefix of the whole.
THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>\n'",
    "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>\n'",
)


def dialogue(*turns: str) -> Example:
    return Example(
        "a:1", tuple({"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns))
    )


def learnt_text(tokenizer: Any, example: Example) -> str:
    row = encode(tokenizer, [example], 1024)
    return tokenizer.decode(row.ids[0][row.learnt[0]])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_and_their_ends_are_learnt(template: str) -> None:
    assert learnt_text(make_tokenizer(template), dialogue(*TURNS)) == "then it ran<|im_end|>fine thanks<|im_end|>"


def test_a_template_that_treats_the_last_turn_differently() -> None:
    text = learnt_text(make_tokenizer(THINKING), dialogue(*TURNS))
    assert text == "then it ran<|im_end|><think></think>fine thanks<|im_end|>"


def test_an_answer_that_its_question_quotes(tokenizer: Any) -> None:
    assert learnt_text(tokenizer, dialogue("say fine", "fine", "say fine again", "fine")) == "fine<|im_end|>" * 2


def test_default_template() -> None:
    tokenizer = make_tokenizer(None)
    assert ensure_chat_template(tokenizer) and not ensure_chat_template(tokenizer)
    assert learnt_text(tokenizer, dialogue(*TURNS)) == "then it ran<|im_end|>fine thanks<|im_end|>"
    prompt = tokenizer.apply_chat_template(dialogue("hello").messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "### User:\nhello\n\n### Assistant:\n"


def test_every_token_on_request(tokenizer: Any) -> None:
    row = encode(tokenizer, [dialogue(*TURNS)], 1024, completions_only=False)
    assert row.learnt[0].all()


def test_a_template_that_changes_the_answer() -> None:
    tokenizer = make_tokenizer(CHATML.replace("message['content']", "message['content'] | upper"))
    with pytest.raises(DataError, match=r'a:1: .*"messages"\[1\].*--loss-on all'):
        encode(tokenizer, [dialogue("hello", "fine")], 1024)


def test_a_template_that_refuses_the_dialogue() -> None:
    tokenizer = make_tokenizer("{{ raise_exception('system first') }}")
    with pytest.raises(DataError, match="a:1: the model's chat template refuses this dialogue: system first"):
        encode(tokenizer, [dialogue("hello", "fine")], 1024)


def test_a_tokenizer_without_offsets(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(CommandError, match="--loss-on all"):
        encode(tokenizer, [dialogue("hello", "fine")], 1024)


def test_cut_and_dropped_dialogues(tokenizer: Any) -> None:
    long = dialogue(" ".join(["the cat"] * 20), "fine")
    rows = encode(tokenizer, [dialogue(*TURNS), long], 20)
    assert len(rows) == 1 and rows.dropped == 1 and rows.truncated == 2 and rows.lengths == [20]
    with pytest.raises(DataError, match="raise --max-length"):
        encode(tokenizer, [long], 20)


def test_a_long_text_is_divided_not_cut(tokenizer: Any) -> None:
    text = " ".join(["the cat sat"] * 30)
    rows = encode(tokenizer, [Example("a:1", text=text)], 16)
    assert max(rows.lengths) == 16
    assert tokenizer.decode(np.concatenate(rows.ids), skip_special_tokens=True) == text
    assert rows.ids[-1][-1] == tokenizer.eos_token_id


def test_batches_are_padded_and_masked() -> None:
    batch = Collator(pad_id=9, multiple=4)(
        [
            {"input_ids": np.array([1, 2, 3], np.int32), "learnt": np.array([False, True, True])},
            {"input_ids": np.array([1, 2, 3, 4, 5], np.int32), "learnt": np.array([False, False, True, False, True])},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5] and batch["tokens"] == 8
    assert batch["labels"].tolist() == [[-100, 2, 3] + [-100] * 5, [-100, -100, 3, -100, 5] + [-100] * 3]
