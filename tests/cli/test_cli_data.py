"""Rows from files: every format is read, and a bad row is named by file, line and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tiny import rows, write_rows

from fastpeft.cli.data import load_examples, split_examples
from fastpeft.cli.errors import CommandError, DataError

DIALOGUE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": list(DIALOGUE), "id": 3}, DIALOGUE),
        ({"instruction": "a", "output": "b"}, DIALOGUE),
        ({"instruction": "a", "input": "", "output": "b"}, DIALOGUE),
        ({"instruction": "a", "input": "x", "output": "b"}, ({"role": "user", "content": "a\n\nx"}, DIALOGUE[1])),
        ({"prompt": "a", "completion": "b"}, DIALOGUE),
        ({"prompt": [DIALOGUE[0]], "completion": [DIALOGUE[1]]}, DIALOGUE),
        ({"messages": None, "text": None, "prompt": "a", "completion": "b"}, DIALOGUE),
    ],
)
def test_dialogues(tmp_path: Path, row: dict, messages: tuple) -> None:
    (example,) = load_examples(str(write_rows(tmp_path / "a.jsonl", [row])))
    assert example.messages == messages and example.prompt == messages[:1]


def test_texts(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert [e.text for e in load_examples(str(tmp_path / "a.jsonl"))] == ["one", "two"]
    (tmp_path / "a.txt").write_text("\ufeffline 1\n\nline 2\n", "utf-8")
    assert [e.text for e in load_examples(str(tmp_path / "a.txt"))] == ["line 1\n\nline 2\n"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}]))
    assert [e.text for e in load_examples(str(tmp_path / "a.json"))] == ["one"]


def test_windows_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\\u2028"}\r\n')
    examples = load_examples(str(tmp_path / "a.jsonl"))
    assert [e.text for e in examples] == ["one", "two\u2028"]
    assert examples[1].where.endswith("a.jsonl:3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [}', "not JSON: Expecting value at column 15"),
        ('["a"]', "a row must be an object, not a list"),
        ('{"question": "a"}', 'found "question"; expected "messages"'),
        ('{"messages": "a"}', '"messages" must be a list of messages, not a string'),
        ('{"messages": []}', '"messages" must be a list of messages, not an empty list'),
        ('{"messages": [{"role": "user"}]}', '"messages"[0] has no "content" (it has "role")'),
        ('{"messages": [{"from": "human", "value": "a"}]}', '"messages"[0] has no "role" (it has "from", "value")'),
        ('{"messages": [{"role": "human", "content": "a"}]}', "\"messages\"[0]: unknown role 'human'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', '"messages"[0]: "content" must be a string, not a list'),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'no message has the role "assistant"'),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "every assistant message is empty"),
        ('{"instruction": "a"}', '"instruction" without "output"'),
        ('{"prompt": "a", "text": "b"}', '"prompt" without "completion" (it has "prompt", "text")'),
        ('{"instruction": "a", "output": 3}', '"output" must be a string, not a number'),
        ('{"text": "  "}', '"text" is empty'),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError) as caught:
        load_examples(str(path))
    assert str(caught.value).startswith(f"{path}:2: ") and said in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 7 more rows with problems"):
        load_examples(str(write_rows(tmp_path / "a.jsonl", [{"x": 1}] * 12)))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not UTF-8 \(byte 14 of the line is 0xe9\)"):
        load_examples(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.jsonl", "no such file"),
        ("a.csv", "cannot tell the format"),
        ("empty.jsonl", "no rows"),
        (".", "save_to_disk"),
    ],
)
def test_a_source_that_is_none(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=said):
        load_examples(str(tmp_path / name))


def test_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(rows(6))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "both"))
    assert len(load_examples(str(tmp_path / "one"))) == 6
    assert len(load_examples(str(tmp_path / "both"))) == 6
    assert len(load_examples(f"{tmp_path / 'both'}#test")) == 1
    with pytest.raises(DataError, match='no split "dev"; it has train, test'):
        load_examples(f"{tmp_path / 'both'}#dev")


def test_split_is_drawn_with_the_seed(tmp_path: Path) -> None:
    examples = load_examples(str(write_rows(tmp_path / "a.jsonl", rows(20))))
    train, held = split_examples(examples, 0.25, seed=1)
    assert len(train) == 15 and len(held) == 5 and not set(map(id, train)) & set(map(id, held))
    assert split_examples(examples, 5, seed=1) == (train, held)
    assert split_examples(examples, 5, seed=2) != (train, held)
    with pytest.raises(CommandError, match="leaves 20 to evaluate"):
        split_examples(examples, 20, seed=1)
