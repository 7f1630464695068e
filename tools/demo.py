"""The demo (`make demo`): fine-tune SmolLM2-135M on small talk with fastpeft's own commands, then compare with PEFT.

Everything it shows is measured while it runs. Needs the extra `demo`; downloads nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported: the GGUF reader has a bar of its own

import torch
from demo_assets import default_cache, small_talk, smollm2
from rich.rule import Rule

from fastpeft.cli.console import console, duration, quiet_libraries, size
from fastpeft.cli.errors import CommandError

PROMPTS = ("Hello, how are you?", "Do you have feelings?", "Tell me a joke")


def _title(text: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{text}[/bold]", style="cyan", align="left"))


def _fastpeft(*arguments: str) -> None:
    """Run the command line in a process of its own, as a user would, and show what was typed."""
    console.print(f"[faint]$[/faint] [bold]fastpeft {shlex.join(arguments)}[/bold]", highlight=False)
    # The installed script, not `python -m`: that would put this folder, and so kernels/, on the import path, where
    # libraries that look for the package `kernels` of PyPI would find it.
    done = subprocess.run([Path(sysconfig.get_path("scripts")) / "fastpeft", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M on small talk and compare with PEFT.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where everything is written")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the converted model is kept")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: one pass over the dialogues; two on a GPU)"
    )
    parser.add_argument("--bench-steps", type=int, help="timed steps of each contender (default: 8; 30 on a GPU)")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora", help="qlora: the model in 4 bits")
    parser.add_argument("--layers", type=int, help="layers of the model in the comparison (default: all)")
    return parser.parse_args()


def main() -> None:
    """Model and data, fine-tuning, comparison, summary."""
    options = _arguments()
    quiet_libraries()
    start = time.perf_counter()
    gpu = torch.cuda.is_available()
    _title("1  A model and some dialogues, out of two packages of PyPI")
    with console.status("SmolLM2-135M-Instruct: GGUF to safetensors (once; cached)"):
        model = smollm2(options.cache)
    data = options.out / "small_talk.jsonl"
    counts = small_talk(data)
    console.print(f"model  [bold]{model}[/bold]  [faint]{size((model / 'model.safetensors').stat().st_size)}[/faint]")
    console.print(f"data   [bold]{data}[/bold]  [faint]{counts['rows']} dialogues, {counts['turns']} turns[/faint]")

    _title("2  Fine-tune")
    adapter = options.out / "adapter"
    length = ["--steps", str(options.steps)] if options.steps else ["--epochs", "2" if gpu else "1"]
    _fastpeft(
        *("finetune", "--model", str(model), "--data", str(data), "--out", str(adapter), "--overwrite"),
        *("--r", "16", "--dropout", "0.05", "--lr", "1e-3", "--batch", "8", "--max-length", "128"),
        *("--eval-split", "40", "--eval-steps", "25", "--method", options.method, *length),
        *(part for prompt in PROMPTS for part in ("--prompt", prompt)),
    )

    _title("3  The same steps with PEFT")
    steps = options.bench_steps or (30 if gpu else 8)
    layers = ["--layers", str(options.layers)] if options.layers else []
    shape = ["--batch", "8", "--seq", "1024"] if gpu else ["--batch", "2", "--seq", "256"]
    bench = options.out / "bench"
    _fastpeft(
        *("bench", "--model", str(model), "--baseline", "peft", "--dropout", "0.05", *shape, *layers),
        *("--steps", str(steps), "--warmup", "2", "--out", str(bench), "--method", options.method),
    )

    metrics = json.loads((adapter / "metrics.json").read_text("utf-8"))["summary"]
    versus = json.loads((bench / "bench.json").read_text("utf-8"))["comparison"]
    _title(f"Done in {duration(time.perf_counter() - start)}")
    console.print(
        f"eval loss          {metrics['first_eval_loss']:.3f} → [bold]{metrics['final_eval_loss']:.3f}[/bold]"
    )
    console.print(f"speed              [bold]{versus['speedup']:.2f}×[/bold] PEFT's")
    console.print(f"saved activations  [bold]{versus['saved_activation_ratio']:.2f}×[/bold] PEFT's")
    console.print(f"pictures           {adapter / 'loss.png'}  {bench / 'bench.png'}")


if __name__ == "__main__":
    try:
        main()
    except CommandError as error:
        raise SystemExit(f"demo: {error}") from None
