"""Transformers' Trainer with what the command line adds: a display, a polite Ctrl-C, and an order of rows that
a resumed run can reproduce."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from fastpeft.cli.console import console, duration, number, size, warn
from fastpeft.cli.errors import CommandError
from fastpeft.measure import PeakMemory, resident_bytes


class Interrupts:
    """Within the block the first SIGINT or SIGTERM only sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.on_first: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.on_first is not None:
            self.on_first()

    def __enter__(self) -> Interrupts:
        for sign in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[sign] = signal.signal(sign, self._handle)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)


class EpochSampler(Sampler[int]):
    """Rows in an order that depends on the seed and the epoch alone, neighbours of similar length.

    The Trainer's own length-grouping sampler draws from the global generator, whose state at the start of an epoch a
    run resumed inside that epoch cannot know. Here 50 batches' worth of shuffled rows at a time are sorted by length
    and the batches shuffled, so that little is padded.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self._epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = 50 * self.batch
        batches = []
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda row: (-self.lengths[row], row))
            batches += [chunk[i : i + self.batch] for i in range(0, len(chunk), self.batch)]
        short = [group for group in batches if len(group) < self.batch]
        full = [group for group in batches if len(group) == self.batch]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + short
        return iter([row for group in shuffled for row in group])


class RowTrainer(Trainer):
    """The Trainer over `Encoded` rows: counts real tokens without a device sync, samples reproducibly."""

    lengths: list[int]
    update_steps_per_epoch: int = 1

    def _epoch(self) -> int:
        return self.state.global_step // self.update_steps_per_epoch

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(self.lengths, self.args.per_device_train_batch_size, self.args.seed, self._epoch)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.state.num_input_tokens_seen += inputs.pop("tokens")
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("tokens", None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate takes the base model's parameters for trained ones."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["tokens"] = self.state.num_input_tokens_seen
        super().log(logs, *args, **kwargs)


class TrainingDisplay(TrainerCallback):
    """A live bar with loss, tokens per second and memory; on a pipe, some twenty plain lines instead.

    Also stops a run whose loss is no longer a number, and hands the Ctrl-C of `interrupts` to the Trainer.
    """

    def __init__(self, device: torch.device, interrupts: Interrupts) -> None:
        self.device = device
        self.interrupts = interrupts
        interrupts.on_first = self._say_stopping
        self.seconds = 0.0
        self.tokens = 0
        self.memory = PeakMemory(device)
        self.loss = math.nan
        self._marks: list[tuple[float, int]] = []
        self._bar: Progress | None = None
        self._first_step = 0

    def _rate(self) -> float:
        """Tokens per second over the last steps; the first, which warms caches, is left out when it can be."""
        marks = self._marks[1:] if len(self._marks) > 2 else self._marks
        marks = marks[-16:]
        if len(marks) < 2 or marks[-1][0] == marks[0][0]:
            return 0.0
        return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])

    def _say_stopping(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description="[yellow]stopping")
        else:
            warn("finishing this step, then saving a checkpoint (again: quit at once)")

    def _line(self) -> dict[str, Any]:
        loss = "–" if math.isnan(self.loss) else f"{self.loss:.3f}"
        rate = self._rate()
        return {
            "loss": loss,
            "rate": f"{number(rate)} tok/s" if rate else "… tok/s",
            "memory": size(resident_bytes(self.device)),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step = state.global_step
        self.memory.__enter__()
        self._start = time.perf_counter()
        self._tokens_before = state.num_input_tokens_seen
        self._marks = [(self._start, state.num_input_tokens_seen)]
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}[/bold]"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                TextColumn("loss [bold]{task.fields[loss]}[/bold]"),
                TextColumn("[cyan]{task.fields[rate]}"),
                TextColumn("[faint]{task.fields[memory]}"),
                TimeElapsedColumn(),
                TextColumn("[faint]<"),
                Remaining(),
                console=console,
                expand=True,
            )
            self._bar.add_task("train", total=state.max_steps, completed=state.global_step, **self._line())
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append((time.perf_counter(), state.num_input_tokens_seen))
        if self.interrupts.asked and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            self.stop()
            raise CommandError(
                f"the loss became {logs['loss']} at step {state.global_step}: lower --lr, raise --warmup"
                + (", or use --dtype bfloat16 or float32" if args.fp16 else "")
            )
        self.loss = logs["loss"] if math.isnan(self.loss) else 0.8 * self.loss + 0.2 * logs["loss"]
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, **self._line())
        elif state.global_step % max(1, state.max_steps // 20) == 0 or state.global_step == state.max_steps:
            done = state.global_step - self._first_step
            left = (time.perf_counter() - self._start) / done * (state.max_steps - state.global_step)
            fields = self._line()
            console.print(
                f"step {state.global_step}/{state.max_steps}  loss {fields['loss']}  {fields['rate']}  "
                f"{fields['memory']}  {duration(left)} left"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in metrics:
            loss = f"[bold]{metrics['eval_loss']:.3f}[/bold]"
            console.print(f"  step {state.global_step}: eval loss {loss}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self.tokens = state.num_input_tokens_seen - self._tokens_before
        self.memory.__exit__(None, None, None)
        self.stop()

    def stop(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return max((c for c in _checkpoints(folder) if _complete(c)), key=checkpoint_step, default=None)


def remove_incomplete(folder: Path) -> None:
    """Delete checkpoints whose writing was cut short: the Trainer would keep one of those and delete a complete one,
    since it counts folders, newest last, and orders those made within a second by their step."""
    for checkpoint in _checkpoints(folder):
        if not _complete(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if checkpoint_step(path) >= 0]


def _complete(checkpoint: Path) -> bool:
    """trainer_state.json is written last."""
    return (checkpoint / "trainer_state.json").exists() and (checkpoint / "optimizer.pt").exists()


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if it has none."""
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1
