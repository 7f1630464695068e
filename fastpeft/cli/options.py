"""The options of `fastpeft finetune`, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.cli.errors import CommandError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.json"
CURVE_FILE = "loss.png"
INTERRUPTED = 130  # the shell's code for a command ended by Ctrl-C

# What a resumed run may change: how often something is saved or shown, never a number of the training.
_FREE_ON_RESUME = {"save_steps", "keep_checkpoints", "samples", "prompt", "max_new_tokens"}


@dataclass
class FinetuneOptions:
    """The options of `fastpeft finetune`, by the names they have there."""

    model: str
    data: str
    out: Path
    eval_data: str | None = None
    eval_split: float = 0.0
    loss_on: str = "completions"
    max_length: int | None = None
    chat_template: Path | None = None
    method: str = "lora"
    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: str = "all-linear"
    rslora: bool = False
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 8
    grad_accum: int = 1
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    patch: bool = True
    gradient_checkpointing: bool = False
    checkpoint: str = "none"
    optim: str = "adamw_torch_fused"
    eval_steps: int = 0
    save_steps: int = 200
    keep_checkpoints: int = 1
    resume: bool = False
    overwrite: bool = False
    samples: int = 3
    prompt: list[str] = field(default_factory=list)
    max_new_tokens: int = 48

    def as_json(self) -> dict[str, Any]:
        """Every option in JSON's types."""
        fields = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}


def resolve_resume(given: dict[str, Any], explicit: set[str]) -> FinetuneOptions:
    """The options of the run in `given["out"]`, with those that the user gave and that may differ.

    Raises:
        CommandError: there is no run to resume, or an option that decides the numbers is given with another value.
    """
    path = Path(given["out"]) / RUN_FILE
    try:
        stored = json.loads(path.read_text("utf-8"))["options"]
    except (OSError, ValueError, KeyError):
        raise CommandError(f"nothing to resume: {path} is missing or damaged; start without --resume") from None
    options = FinetuneOptions(**{**stored, "out": Path(given["out"]), "resume": True})
    if options.chat_template is not None:
        options.chat_template = Path(options.chat_template)
    asked = FinetuneOptions(**given).as_json()
    for name in explicit - {"out", "resume", "overwrite"}:
        if name in _FREE_ON_RESUME:
            setattr(options, name, getattr(FinetuneOptions(**given), name))
        elif asked[name] != stored.get(name):
            flag = "--" + name.replace("_", "-")
            raise CommandError(
                f"{flag} {asked[name]} differs from the run being resumed ({stored.get(name)}): leave {flag} out to "
                "continue that run, or start a new one with another --out"
            )
    return options
