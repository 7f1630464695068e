"""Training rows from files: what is in them, checked before anything is loaded.

A row is a dialogue or a text:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"instruction": "…", "input": "…", "output": "…"}                   input may be missing or empty
    {"prompt": "…", "completion": "…"}                                  or lists of messages
    {"text": "…"}

from a .jsonl file (a row a line), a .json file (a list of rows), a .txt file (one text), a folder written by
`datasets`' save_to_disk, or a dataset on the Hub. Every error names the file, the line and the key.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError, DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHOWN = 5
_KINDS = '"messages", "instruction" + "output", "prompt" + "completion", or "text"'


@dataclass(frozen=True)
class Example:
    """One row: a dialogue (`messages`) or a plain text, and where it stood."""

    where: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""

    @property
    def prompt(self) -> tuple[dict[str, Any], ...]:
        """The dialogue up to its first answer; empty for a text."""
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                return self.messages[:index]
        return ()


class _Problem(Exception):
    """A row that cannot be used; the message is put behind the row's place."""


def _string(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise _Problem(f'"{key}" must be a string, not {_kind(value)}')
    if not empty and not value.strip():
        raise _Problem(f'"{key}" is empty')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _messages(row: dict[str, Any], key: str) -> tuple[dict[str, Any], ...]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise _Problem(f'"{key}" must be a list of messages, not {"an empty list" if value == [] else _kind(value)}')
    for index, message in enumerate(value):
        place = f'"{key}"[{index}]'
        if not isinstance(message, dict):
            raise _Problem(f'{place} must be an object with "role" and "content", not {_kind(message)}')
        for wanted in ("role", "content"):
            if wanted not in message:
                raise _Problem(f'{place} has no "{wanted}" (it has {_keys(message)})')
        if message["role"] not in ROLES:
            raise _Problem(f"{place}: unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise _Problem(f'{place}: "content" must be a string, not {_kind(message["content"])}')
    return tuple(value)


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in row) or "no keys"


def _dialogue(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if "messages" in row:
        messages = _messages(row, "messages")
    elif "instruction" in row:
        instruction, output = _string(row, "instruction"), _string(row, "output")
        extra = _string(row, "input", empty=True) if row.get("input") is not None else ""
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": output})
    elif isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        messages = _messages(row, "prompt") + _messages(row, "completion")
    else:
        messages = (
            {"role": "user", "content": _string(row, "prompt")},
            {"role": "assistant", "content": _string(row, "completion")},
        )
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise _Problem('no message has the role "assistant": there is nothing to learn from this row')
    if not any(message["content"].strip() for message in answers):
        raise _Problem("every assistant message is empty: there is nothing to learn from this row")
    return messages


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise _Problem(f"a row must be an object, not {_kind(row)}")
    # A data set with columns that some rows do not use has them as null there.
    row = {key: value for key, value in row.items() if value is not None}
    for first, second in (("instruction", "output"), ("prompt", "completion")):
        if "messages" not in row and first in row and second not in row:
            raise _Problem(f'"{first}" without "{second}" (it has {_keys(row)})')
    if "messages" in row or "instruction" in row or "prompt" in row:
        return Example(where, messages=_dialogue(row))
    if "text" in row:
        return Example(where, text=_string(row, "text"))
    raise _Problem(f"no key that can be trained on: found {_keys(row)}; expected {_KINDS}")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield where, _Problem(f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})")
            continue
        if not text.strip():
            continue
        try:
            yield where, json.loads(text)
        except json.JSONDecodeError as error:
            yield where, _Problem(f"not JSON: {error.msg} at column {error.colno}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, found {_kind(rows)}; name it .jsonl if it has a row a line")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); convert it, e.g. with iconv") from None
    yield str(path), {"text": text}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise CommandError("this needs the `datasets` package: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def _named(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row


def _pick_split(loaded: Any, name: str, split: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of one split of a Dataset or DatasetDict."""
    if not isinstance(loaded, dict):
        return _named(loaded, name)
    split = split or "train"
    if split not in loaded:
        raise DataError(f'{name}: no split "{split}"; it has {", ".join(loaded)} (choose with NAME#SPLIT)')
    return _named(loaded[split], f"{name}#{split}")


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of everything in `source`; a row that could not be parsed is a _Problem in its place."""
    name, _, split = source.partition("#")
    path = Path(name)
    readers = {".jsonl": _jsonl, ".json": _json, ".txt": _text}
    if path.is_file():
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path}: cannot tell the format from {path.suffix!r}; use .jsonl, .json or .txt")
        return reader(path)
    if path.is_dir():
        if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json", "state.json")):
            raise DataError(f"{path}: not a folder written by datasets' save_to_disk (no dataset_info.json in it)")
        return _pick_split(_datasets().load_from_disk(str(path)), name, split or None)
    if path.suffix.lower() in readers or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"{path}: no such file")
    try:
        loaded = _datasets().load_dataset(name)
    except CommandError:
        raise
    except Exception as error:  # the Hub's own exceptions are many and change
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{name}: no such file here, and as a data set of the Hub it could not be loaded: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None
    return _pick_split(loaded, name, split or None)


def load_examples(source: str) -> list[Example]:
    """Every row of `source`, checked.

    Args:
        source: a .jsonl, .json or .txt file, a `datasets` folder or the name of a data set on the Hub; the last two
            may carry `#split` (default: train).

    Raises:
        DataError: the source cannot be read or rows in it cannot be used; the first few are listed.
        CommandError: the `datasets` package is needed and missing.
    """
    examples: list[Example] = []
    problems: list[str] = []
    count = 0
    for where, row in _rows(source):
        try:
            if isinstance(row, _Problem):
                raise row
            examples.append(_example(row, where))
        except _Problem as problem:
            count += 1
            if len(problems) < _SHOWN:
                problems.append(f"{where}: {problem}")
    if count:
        rest = f"\n… and {count - len(problems)} more rows with problems" if count > len(problems) else ""
        raise DataError("\n".join(problems) + rest)
    if not examples:
        raise DataError(f"{source}: no rows in it")
    return examples


def split_examples(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): `share` of the rows, drawn with `seed`, held back; both keep their order.

    Args:
        share: below 1 a fraction, from 1 a number of rows.

    Raises:
        CommandError: nothing would be left to train on, or nothing to evaluate.
    """
    if share <= 0:
        return examples, []
    held = round(share * len(examples)) if share < 1 else int(share)
    if not 0 < held < len(examples):
        raise CommandError(f"--eval-split {share:g} of {len(examples)} rows leaves {held} to evaluate; choose another")
    chosen = set(random.Random(seed).sample(range(len(examples)), held))
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]
