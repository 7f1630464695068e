"""`fastpeft merge`: base model and adapter become one ordinary model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

import fastpeft
from fastpeft.cli.console import console, facts, number, quiet_libraries
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import replacing_folder
from fastpeft.cli.models import DTYPES, ensure_peft_names, is_missing_folder, load_model, load_tokenizer


def _base_name(adapter: str, model: str | None) -> str:
    if model is not None:
        return model
    path = Path(adapter).expanduser()
    if path.is_dir() and not (path / "adapter_config.json").exists():
        raise CommandError(f"{adapter}: no adapter_config.json in this folder, so it is not an adapter")
    try:
        if path.is_dir():
            name = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        else:
            name = fastpeft.PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise CommandError(f"{adapter}: its adapter_config.json cannot be read: {error}") from None
    if not name:
        raise CommandError(f"{adapter}: its adapter_config.json does not name the base model; give it with --model")
    return name


def _tokenizer(adapter: str, base: str) -> Any:
    if (Path(adapter) / "tokenizer_config.json").exists():
        return load_tokenizer(adapter)
    try:
        return load_tokenizer(base)
    except CommandError:
        return None


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (1, 16), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits.float()


def merge(adapter: str, out: Path, model: str | None, dtype: str, overwrite: bool) -> None:
    """Write base model + adapter to `out`, after comparing the logits of the two on a few tokens.

    Raises:
        CommandError: something cannot be loaded, `out` is in use, or the merged weights are not finite.
    """
    if is_missing_folder(adapter):
        raise CommandError(f"{adapter}: no such folder")
    ensure_peft_names()
    quiet_libraries()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not overwrite:
        raise CommandError(f"{out} is not empty: choose another --out, or replace it with --overwrite")
    base = _base_name(adapter, model)
    with console.status(f"loading {base}"):
        loaded = load_model(base, DTYPES.get(dtype, "auto"))
        loaded.eval()
    with console.status("merging"):
        wrapped = fastpeft.PeftModel.from_pretrained(loaded, adapter)
        wrapped.eval()
        before = _logits(wrapped)
        merged = wrapped.merge_and_unload()
        after = _logits(merged)
    worst = (after - before).abs().max().item()
    if not math.isfinite(worst):
        raise CommandError(f"{adapter}: the merged model's logits are not finite; is the adapter for {base}?")
    with console.status(f"writing {out}"), replacing_folder(out) as draft:
        merged.save_pretrained(draft)
        tokenizer = _tokenizer(adapter, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
    bits = str(next(merged.parameters()).dtype).removeprefix("torch.")
    console.print(
        facts(
            "Merged",
            {
                "base": escape(base),
                "adapter": escape(adapter),
                "model": f"[bold]{escape(str(out))}[/bold]  [faint]{number(merged.num_parameters())} parameters, {bits}"
                + ("" if tokenizer is not None else ", no tokenizer found")
                + "[/faint]",
                "check": f"logits differ from base + adapter by at most {worst:.1e}  "
                f"[faint](of {before.abs().max().item():.3g})[/faint]",
            },
            style="green",
        )
    )
