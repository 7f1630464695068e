"""What a fine-tuning run leaves for its reader: the panels on the screen, metrics.json and the loss curve."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

import fastpeft
from fastpeft.cli.console import console, duration, facts, number, size, warn
from fastpeft.cli.options import CURVE_FILE, METRICS_FILE, FinetuneOptions
from fastpeft.status import count_parameters


def show_start(
    options: FinetuneOptions,
    rows: Any,
    model: Any,
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: Any,
    checkpoint: Path | None,
) -> None:
    trainable, total = count_parameters(model)
    where = f"{device} × {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    train = rows.train
    share = 100 * trainable / total
    lengths = sorted(train.lengths)
    facts_of_data = [f"{len(train):,} rows"]
    if rows.held:
        facts_of_data.append(f"{len(rows.held)} held back")
    facts_of_data.append(f"{number(sum(lengths))} tokens ({number(train.learnt_tokens)} learnt)")
    facts_of_data.append(f"median {lengths[len(lengths) // 2]}")
    facts_of_data.append(f"longest {lengths[-1]}")
    counts = {"cut short": train.truncated, "dropped as too long": train.dropped}
    facts_of_data += [f"{count} {what}" for what, count in counts.items() if count]
    console.print(
        facts(
            "fastpeft finetune",
            {
                "model": f"[bold]{escape(options.model)}[/bold]  [faint]{number(total - trainable)} parameters, "
                f"{str(dtype).removeprefix('torch.')} on {where}[/faint]",
                "data": f"[bold]{escape(options.data)}[/bold]  [faint]{', '.join(facts_of_data)}[/faint]",
                **({"template": f"[faint]{escape(template)}[/faint]"} if rows.dialogue else {}),
                "adapter": f"LoRA r={options.r} on {escape(options.target_modules)}  "
                f"[faint]{number(trainable)} trainable ({share:.2f}%), dropout {options.dropout:g}[/faint]",
                "fused": _patch_line(options, model),
                "schedule": f"{arguments.max_steps} steps of {options.batch}"
                + (f" × {options.grad_accum}" if options.grad_accum > 1 else "")
                + f"  [faint]lr {options.lr:g}, {options.schedule}, {arguments.warmup_steps} warm-up[/faint]",
                **({"resuming": f"[yellow]{escape(str(checkpoint))}[/yellow]"} if checkpoint else {}),
            },
        )
    )


def _patch_line(options: FinetuneOptions, model: Any) -> str:
    if not options.patch:
        return "[faint]nothing (--no-patch)[/faint]"
    report = fastpeft.report(model)
    line = f"{len(report.fused)} of {len(report.rows)} modules"
    reasons = list(dict.fromkeys(row.reason for row in report.left if row.reason))
    if reasons:
        more = f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
        line += f"  [faint]left: {escape(reasons[0])}{more}[/faint]"
    return line


def patch_summary(model: Any) -> dict[str, Any]:
    """What `patch` did, in JSON's types: counts, and why modules were left."""
    report = fastpeft.report(model)
    return {
        "fused": len(report.fused),
        "left": len(report.left),
        "reasons": list(dict.fromkeys(row.reason for row in report.left if row.reason)),
    }


def metrics_of(
    options: FinetuneOptions,
    rows: Any,
    model: Any,
    trainer: Any,
    display: Any,
    samples: list[dict[str, str]],
    device: torch.device,
    dtype: torch.dtype,
    done: bool,
) -> dict[str, Any]:
    import transformers

    trainable, total = count_parameters(model)
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")
    train = [{key: row.get(key) for key in keys} for row in trainer.state.log_history if "loss" in row]
    evals = [{"step": row["step"], "loss": row["eval_loss"]} for row in trainer.state.log_history if "eval_loss" in row]
    losses = [row["loss"] for row in train]
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "status": "finished" if done else "interrupted",
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "fastpeft": fastpeft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "options": options.as_json(),
        "patched": patch_summary(model) if options.patch else None,
        "parameters": {"total": total, "trainable": trainable},
        "data": {
            "rows": len(rows.train),
            "held_back_rows": len(rows.held) if rows.held else 0,
            "tokens_per_epoch": sum(rows.train.lengths),
            "learnt_tokens_per_epoch": rows.train.learnt_tokens,
            "truncated": rows.train.truncated,
            "dropped": rows.train.dropped,
            "sha256": rows.fingerprint,
        },
        "summary": {
            "steps": trainer.state.global_step,
            "max_steps": trainer.state.max_steps,
            "tokens": trainer.state.num_input_tokens_seen,
            "first_loss": losses[0] if losses else None,
            "final_loss": sum(tail) / len(tail) if tail else None,
            "first_eval_loss": evals[0]["loss"] if evals else None,
            "final_eval_loss": evals[-1]["loss"] if evals else None,
            "train_seconds": display.seconds,
            "tokens_per_second": display.tokens / display.seconds if display.seconds else None,
            "peak_memory_bytes": display.memory.bytes,
        },
        "train": train,
        "eval": evals,
        "samples": samples,
    }


def draw(options: FinetuneOptions, metrics: dict[str, Any]) -> bool:
    from fastpeft.cli.plots import loss_curve

    drawn = loss_curve(
        options.out / CURVE_FILE,
        [(row["step"], row["loss"]) for row in metrics["train"]],
        [(row["step"], row["loss"]) for row in metrics["eval"]],
        f"{Path(options.model).name} on {Path(options.data).name}",
    )
    if not drawn and metrics["train"]:
        warn("no loss curve drawn: matplotlib is not installed (pip install matplotlib)")
    return drawn


def show_end(options: FinetuneOptions, metrics: dict[str, Any], curve: bool) -> None:
    from fastpeft.cli.plots import terminal_curve

    summary, out = metrics["summary"], escape(str(options.out))
    lines = terminal_curve([row["loss"] for row in metrics["train"]], width=min(64, console.width - 16))
    if lines and console.encoding.startswith("utf"):
        console.print(Panel(Text(lines, "cyan"), title="[bold]Loss[/bold]", title_align="left", expand=False))
    evals = ""
    if summary["first_eval_loss"] is not None:
        evals = f"   eval {summary['first_eval_loss']:.3f} → [bold]{summary['final_eval_loss']:.3f}[/bold]"
    console.print(
        facts(
            "Done",
            {
                "loss": f"{summary['first_loss']:.3f} → [bold]{summary['final_loss']:.3f}[/bold]{evals}",
                "speed": f"{number(summary['tokens_per_second'] or 0)} tokens/s, {duration(summary['train_seconds'])}, "
                f"peak memory {size(summary['peak_memory_bytes'])}",
                "adapter": f"[bold]{out}[/bold]",
                "log": f"{out}/{METRICS_FILE}" + (f", {out}/{CURVE_FILE}" if curve else ""),
                "merge": f"fastpeft merge --adapter {out} --out {out}-merged",
            },
            style="green",
        )
    )
