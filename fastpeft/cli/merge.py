"""`fastpeft merge`: base model and adapter become one ordinary model."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

import fastpeft
from fastpeft.cli.console import console, facts, number, quiet_libraries, warn
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import replacing_folder
from fastpeft.cli.models import (
    DTYPES,
    ensure_peft_names,
    four_bits,
    is_missing_folder,
    load_model,
    load_tokenizer,
    stored_config,
)
from fastpeft.cli.options import RUN_FILE
from fastpeft.errors import PeftWarning


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


def _trained_in_4_bits(adapter: str) -> bool:
    """`fastpeft finetune --method qlora` made it: the base model's weights were quantised as they were loaded."""
    try:
        stored = json.loads((Path(adapter).expanduser() / RUN_FILE).read_text("utf-8"))
        return bool(stored["options"]["method"] == "qlora")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load(base: str, dtype: str, into: str) -> Any:
    """The base model, in 4 bits where the adapter is to be added to those.

    Raises:
        CommandError: it cannot be loaded, or it is stored in 4 bits and `into` does not say what is to become of them.
    """
    config = stored_config(base)
    stored = getattr(config, "quantization_config", None) is not None
    if into == "base" and stored:
        raise CommandError(
            f"{base} is stored quantised: say with --into whether the sum is kept as it is (decoded) or quantised "
            "again (4bit)"
        )
    if into == "base" or stored:
        return load_model(base, DTYPES.get(dtype, "auto"))
    wanted = DTYPES.get(dtype) or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return load_model(base, wanted, quantization=four_bits(wanted, f"--into {into}"))


def _merged(wrapped: Any, into: str) -> tuple[Any, str | None]:
    """The merged model, and how far quantising the sums has moved them."""
    if into != "4bit":
        return wrapped.merge_and_unload(dequantize=into == "decoded"), None
    layers = [module for module in wrapped.modules() if hasattr(module, "moved_by")]
    with warnings.catch_warnings():  # a line a layer, whose number is shown below
        warnings.filterwarnings("ignore", message=".*quantising the sum moved it.*", category=PeftWarning)
        model = wrapped.merge_and_unload()
    moved = [layer.moved_by for layer in layers if layer.moved_by is not None]
    return model, f"quantising moved the sums by {min(moved):.1%} to {max(moved):.1%} of their norms"


def merge(adapter: str, out: Path, model: str | None, dtype: str, into: str, overwrite: bool) -> None:
    """Write base model + adapter to `out`, after comparing the logits of the two on a few tokens.

    into: "base", the weights as they are stored; "decoded", these quantised to 4 bits as finetune does and decoded
    again; "4bit", the same with the sum in 4 bits.

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
        loaded = _load(base, dtype, into)
        loaded.eval()
    with console.status("merging"):
        wrapped = fastpeft.PeftModel.from_pretrained(loaded, adapter)
        wrapped.eval()
        before = _logits(wrapped)
        merged, moved = _merged(wrapped, into)
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
    if into == "4bit":
        bits += ", linear layers in 4 bits"
    if into == "base" and _trained_in_4_bits(adapter):
        warn(
            "the adapter was trained on weights of 4 bits, and this is its sum with the ones they were made from: "
            "--into decoded gives the model that was trained"
        )
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
                **({} if moved is None else {"lost": moved}),
            },
            style="green",
        )
    )
