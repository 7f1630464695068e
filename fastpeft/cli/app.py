"""The options of every command. Nothing heavy is imported here, so that `fastpeft --help` answers at once."""

from __future__ import annotations

import enum
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

import fastpeft

app = typer.Typer(
    name="fastpeft",
    help="Parameter-efficient fine-tuning with PEFT's files and none of its cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Device(str, enum.Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(str, enum.Enum):
    """Number format of the frozen weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Schedule(str, enum.Enum):
    """Learning rate over the run, after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class LossOn(str, enum.Enum):
    """Which tokens of a dialogue are learnt."""

    completions = "completions"
    all = "all"


class Method(str, enum.Enum):
    """The adapters that `bench` can compare."""

    lora = "lora"
    dora = "dora"
    qlora = "qlora"


class TrainMethod(str, enum.Enum):
    """What `finetune` trains."""

    lora = "lora"
    qlora = "qlora"


class Into(str, enum.Enum):
    """What `merge` adds the adapter to, and what becomes of the sum."""

    base = "base"
    decoded = "decoded"
    quantised = "4bit"


class Checkpoint(str, enum.Enum):
    """What layers keep between the forward and the backward."""

    none = "none"
    selective = "selective"
    mlp = "mlp"
    block = "block"
    offload = "offload"


class EstimatedCheckpoint(str, enum.Enum):
    """Checkpoint modes to estimate."""

    all = "all"
    auto = "auto"
    none = "none"
    selective = "selective"
    mlp = "mlp"
    block = "block"
    offload = "offload"


class MethodName(str, enum.Enum):
    """What is trained."""

    full = "full"
    lora = "lora"
    dora = "dora"
    qlora = "qlora"


class Optim(str, enum.Enum):
    """The optimizer, as Transformers calls it; 8-bit, paged and lion are bitsandbytes'."""

    adamw_torch_fused = "adamw_torch_fused"
    adamw_torch = "adamw_torch"
    adamw_8bit = "adamw_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    lion_32bit = "lion_32bit"
    lion_8bit = "lion_8bit"
    paged_lion_32bit = "paged_lion_32bit"
    paged_lion_8bit = "paged_lion_8bit"
    sgd = "sgd"


class Parallel(str, enum.Enum):
    """How several GPUs share the work."""

    ddp = "ddp"
    fsdp2 = "fsdp2"


class Implementation(str, enum.Enum):
    """Whose code runs the layers."""

    fastpeft = "fastpeft"
    eager = "eager"
    peft = "peft"


@contextmanager
def explained() -> Iterator[None]:
    """A user's mistake becomes one sentence on stderr and exit code 2; Ctrl-C exit code 130."""
    from fastpeft.errors import FastpeftError

    try:
        yield
    except FastpeftError as error:
        from rich.text import Text

        from fastpeft.cli.console import errors

        errors.print(Text.assemble(("error: ", "bad"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        from fastpeft.cli.console import errors

        errors.print("interrupted", style="warn")
        raise typer.Exit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastpeft {fastpeft.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Parameter-efficient fine-tuning with PEFT's files and none of its cost."""


_DATA, _ADAPTER, _TRAINING, _RUN, _SHOW = "Data", "Adapter", "Training", "Run", "Answers"


@app.command()
def finetune(
    ctx: typer.Context,
    out: Annotated[Path, Option(help="Folder for the adapter, the tokenizer, the log and the checkpoints.")],
    model: Annotated[str | None, Option(help="Model folder or Hub id.")] = None,
    data: Annotated[
        str | None,
        Option(
            help="Rows: .jsonl or .json (messages, instruction + output, prompt + completion, text), .txt, a folder "
            "of `datasets`, or a Hub id; NAME#SPLIT for a split other than train."
        ),
    ] = None,
    eval_data: Annotated[str | None, Option(help="Rows to evaluate on.", rich_help_panel=_DATA)] = None,
    eval_split: Annotated[
        float, Option(min=0.0, help="Rows held back: a share below 1, a number from 1.", rich_help_panel=_DATA)
    ] = 0.0,
    loss_on: Annotated[
        LossOn, Option(help="Learn the answers of dialogues only, or every token.", rich_help_panel=_DATA)
    ] = LossOn.completions,
    max_length: Annotated[
        int | None,
        Option(
            min=2,
            help="Tokens at which a dialogue is cut and a text divided. [default: 1024, or what the model has]",
            rich_help_panel=_DATA,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, Option(help="Jinja file in place of the tokenizer's chat template.", rich_help_panel=_DATA)
    ] = None,
    method: Annotated[
        TrainMethod, Option(help="lora, or qlora: the frozen weights in 4 bits.", rich_help_panel=_ADAPTER)
    ] = TrainMethod.lora,
    r: Annotated[int, Option("--r", min=1, help="Rank.", rich_help_panel=_ADAPTER)] = 16,
    alpha: Annotated[int | None, Option(help="Scale is alpha / r. [default: 2 r]", rich_help_panel=_ADAPTER)] = None,
    dropout: Annotated[
        float, Option(min=0.0, max=0.99, help="Dropout on the adapter's input.", rich_help_panel=_ADAPTER)
    ] = 0.0,
    target_modules: Annotated[
        str, Option(help="all-linear, names separated by commas, or a regular expression.", rich_help_panel=_ADAPTER)
    ] = "all-linear",
    rslora: Annotated[bool, Option("--rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=_ADAPTER)] = False,
    lr: Annotated[float, Option(min=0.0, help="Peak learning rate.", rich_help_panel=_TRAINING)] = 2e-4,
    schedule: Annotated[Schedule, Option(help="After warm-up.", rich_help_panel=_TRAINING)] = Schedule.cosine,
    warmup: Annotated[
        float, Option(min=0.0, help="A share of the steps below 1, a number from 1.", rich_help_panel=_TRAINING)
    ] = 0.03,
    weight_decay: Annotated[float, Option(min=0.0, help="AdamW's weight decay.", rich_help_panel=_TRAINING)] = 0.0,
    max_grad_norm: Annotated[
        float, Option(min=0.0, help="Clip gradients at this norm; 0 for not.", rich_help_panel=_TRAINING)
    ] = 1.0,
    epochs: Annotated[float, Option(min=0.0, help="Passes over the rows.", rich_help_panel=_TRAINING)] = 1.0,
    steps: Annotated[
        int | None, Option(min=1, help="Optimizer steps, in place of --epochs.", rich_help_panel=_TRAINING)
    ] = None,
    batch: Annotated[int, Option(min=1, help="Rows a pass.", rich_help_panel=_TRAINING)] = 8,
    grad_accum: Annotated[int, Option(min=1, help="Passes an optimizer step.", rich_help_panel=_TRAINING)] = 1,
    seed: Annotated[int, Option(min=0, help="Of everything random.", rich_help_panel=_TRAINING)] = 0,
    device: Annotated[Device, Option(help="Where to compute.", rich_help_panel=_RUN)] = Device.auto,
    dtype: Annotated[
        Dtype, Option(help="Of the frozen weights; auto: bfloat16 on a GPU, else float32.", rich_help_panel=_RUN)
    ] = Dtype.auto,
    patch: Annotated[bool, Option(help="Fused kernels, or plain layers.", rich_help_panel=_RUN)] = True,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_RUN)
    ] = False,
    checkpoint: Annotated[
        Checkpoint,
        Option(help="What layers keep for the backward.", rich_help_panel=_RUN),
    ] = Checkpoint.none,
    optim: Annotated[
        Optim, Option(help="Optimizer; 8-bit, paged ones and lion need bitsandbytes.", rich_help_panel=_TRAINING)
    ] = Optim.adamw_torch_fused,
    eval_steps: Annotated[
        int, Option(min=0, help="Evaluate every so many steps; 0: before and after.", rich_help_panel=_RUN)
    ] = 0,
    save_steps: Annotated[
        int, Option(min=0, help="Checkpoint every so many steps; 0: at the end.", rich_help_panel=_RUN)
    ] = 200,
    keep_checkpoints: Annotated[int, Option(min=1, help="Checkpoints kept.", rich_help_panel=_RUN)] = 1,
    resume: Annotated[
        bool, Option("--resume", help="Continue the run in --out, with its options.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.", rich_help_panel=_RUN)] = False,
    samples: Annotated[
        int, Option(min=0, help="Answers shown before and after, to prompts from the data.", rich_help_panel=_SHOW)
    ] = 3,
    prompt: Annotated[
        list[str] | None, Option(help="A prompt to answer before and after; repeatable.", rich_help_panel=_SHOW)
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer.", rich_help_panel=_SHOW)] = 48,
) -> None:
    """Train a LoRA adapter on a file of dialogues or text.

    [bold]fastpeft finetune --model ./SmolLM2-135M-Instruct --data dialogues.jsonl --out adapter[/bold]

    Ctrl-C saves a checkpoint; [bold]fastpeft finetune --resume --out adapter[/bold] continues to the same numbers.
    The adapter loads in PEFT, vLLM and TGI as it is.
    """
    with explained():
        from fastpeft.cli.errors import CommandError
        from fastpeft.cli.options import FinetuneOptions, resolve_resume

        given = {key: value.value if isinstance(value, enum.Enum) else value for key, value in ctx.params.items()}
        given["prompt"] = list(prompt or [])
        # By name: depending on its version typer uses click or a click of its own, each with its own enumeration.
        explicit = {key for key in given if getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"}
        if resume:
            options = resolve_resume(given, explicit)
        else:
            for name in ("model", "data"):
                if given[name] is None:
                    raise CommandError(f"--{name} is missing (only --resume knows it from the run it continues)")
            options = FinetuneOptions(**given)
        from fastpeft.cli.finetune import finetune as run

        code = run(options)
    raise typer.Exit(code)


@app.command()
def merge(
    adapter: Annotated[str, Option(help="Adapter folder or Hub id.")],
    out: Annotated[Path, Option(help="Folder for the merged model and its tokenizer.")],
    model: Annotated[str | None, Option(help="Base model, where the adapter's own record of it is not right.")] = None,
    dtype: Annotated[Dtype, Option(help="Of the merged weights; auto: the base model's.")] = Dtype.auto,
    into: Annotated[
        Into,
        Option(
            help="base: the base model's weights as they are stored. For an adapter of finetune --method qlora also: "
            "decoded: the 4-bit weights it was trained on, decoded, so that nothing is lost; 4bit: the sum is "
            "quantised again, and what that loses is shown."
        ),
    ] = Into.base,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is in --out.")] = False,
) -> None:
    """Add an adapter into its base model's weights and save an ordinary model."""
    with explained():
        from fastpeft.cli.merge import merge as run

        run(adapter, out, model, dtype.value, into.value, overwrite)


@app.command()
def doctor(json: Annotated[bool, Option("--json", help="Print JSON in place of tables.")] = False) -> None:
    """Say what is installed, which backend each operator will use, and what is wrong (exit code 1 if something is)."""
    with explained():
        from fastpeft.cli.doctor import doctor as run

        code = run(json)
    raise typer.Exit(code)


@app.command()
def bench(
    ctx: typer.Context,
    model: Annotated[str | None, Option(help="Model folder, Hub id, or preset: smollm2-6l.")] = None,
    config: Annotated[Path | None, Option(help="A config.json, in place of --model: random weights.")] = None,
    baseline: Annotated[
        str,
        Option(
            help="peft: the real one; compile: the same under torch.compile; eager: our layers in plain PyTorch; none. "
            "Several with commas."
        ),
    ] = "peft",
    products: Annotated[
        bool, Option("--products", help="Also time the base model's matrix products alone: the floor.")
    ] = False,
    method: Annotated[Method, Option(help="The adapter; qlora: LoRA on weights of 4 bits.")] = Method.lora,
    out: Annotated[Path, Option(help="Folder for bench.json and bench.png.")] = Path("fastpeft-bench"),
    layers: Annotated[int | None, Option(min=1, help="Only the first layers.")] = None,
    batch: Annotated[int, Option(min=1, help="Rows a step.")] = 2,
    seq: Annotated[int, Option(min=2, help="Tokens a row.")] = 256,
    r: Annotated[int, Option("--r", min=1, help="Rank.")] = 16,
    dropout: Annotated[float, Option(min=0.0, max=0.99, help="Dropout on the adapter's input.")] = 0.0,
    target_modules: Annotated[str, Option(help="As in finetune.")] = "all-linear",
    steps: Annotated[int, Option(min=1, help="Timed steps of each contender.")] = 20,
    warmup: Annotated[int, Option(min=0, help="Steps before timing.")] = 3,
    lr: Annotated[float, Option(min=0.0, help="Learning rate.")] = 1e-3,
    seed: Annotated[int, Option(min=0, help="Of weights, adapters and data.")] = 0,
    device: Annotated[Device, Option(help="Where to compute.")] = Device.auto,
    dtype: Annotated[Dtype, Option(help="Of the frozen weights.")] = Dtype.auto,
    threads: Annotated[int | None, Option(min=1, help="CPU threads.")] = None,
    gradient_checkpointing: Annotated[bool, Option("--gradient-checkpointing", help="In every contender.")] = False,
    checkpoint: Annotated[Checkpoint, Option(help="What layers keep, in every contender.")] = Checkpoint.none,
    report: Annotated[
        Path | None,
        Option(help="Sweep lengths, checkpoint modes and methods into a page, report.html in this folder, and PNGs."),
    ] = None,
    lengths: Annotated[str | None, Option(help="Of the sweep: tokens a row. [default: 64,128,256]")] = None,
    checkpoints: Annotated[str | None, Option(help="Of the sweep. [default: all modes]")] = None,
    methods: Annotated[str | None, Option(help="Of the sweep: lora, dora, qlora. [default: --method]")] = None,
    calibrate: Annotated[
        bool,
        Option("--calibrate", help="Only measure, and write down, how products and attention are best made here."),
    ] = False,
) -> None:
    """Time training steps against PEFT: same weights, same batches, interleaved step by step in one process.

    [bold]fastpeft bench --model smollm2-6l --dropout 0.05[/bold]
    """
    with explained():
        if calibrate:
            from fastpeft.cli.calibrate import calibrate as measure
            from fastpeft.cli.errors import CommandError

            if model is not None or config is not None:
                raise CommandError("--calibrate measures products of its own: leave --model and --config out")
            measure(device.value, threads)
            return
        from fastpeft.cli.bench import bench as run
        from fastpeft.cli.contenders import BenchOptions

        options = {k: v for k, v in ctx.params.items() if k != "calibrate"}
        run(BenchOptions(**{k: v.value if isinstance(v, enum.Enum) else v for k, v in options.items()}))


@app.command()
def estimate(
    ctx: typer.Context,
    model: Annotated[
        str | None, Option(help="A shipped shape (llama-3.1-8b, qwen3-4b, gemma-3-1b, …), a folder, or a Hub id.")
    ] = None,
    config: Annotated[Path | None, Option(help="A config.json, in place of --model.")] = None,
    method: Annotated[MethodName, Option(help="What is trained.")] = MethodName.lora,
    r: Annotated[int, Option("--r", min=1, help="Rank.")] = 16,
    dropout: Annotated[float, Option(min=0.0, max=0.99, help="Dropout on the adapter's input.")] = 0.0,
    target_modules: Annotated[str, Option(help="As in finetune.")] = "all-linear",
    batch: Annotated[int, Option(min=1, help="Rows a pass, on each GPU.")] = 1,
    seq: Annotated[int, Option(min=2, help="Tokens a row.")] = 4096,
    optim: Annotated[Optim, Option(help="Optimizer.")] = Optim.adamw_torch_fused,
    checkpoint: Annotated[
        EstimatedCheckpoint, Option(help="Checkpoint mode; auto: the plan that fits --fit.")
    ] = EstimatedCheckpoint.all,
    gpus: Annotated[int, Option(min=1, help="Number of GPUs.")] = 1,
    parallel: Annotated[Parallel, Option(help="With several GPUs.")] = Parallel.ddp,
    dtype: Annotated[Dtype, Option(help="Of the frozen weights and the computation.")] = Dtype.bfloat16,
    implementation: Annotated[
        Implementation, Option(help="fastpeft, its layers unpatched, or peft.")
    ] = Implementation.fastpeft,
    fit: Annotated[
        str | None, Option(help="A budget, as 24GiB: the longest rows that fit, for 1, 2, 4, … rows.")
    ] = None,
    json: Annotated[bool, Option("--json", help="Print JSON in place of the table.")] = False,
    out: Annotated[Path | None, Option(help="Folder for estimate.json and estimate.png.")] = None,
) -> None:
    """Count what a training step needs, from a config alone: no weights, no GPU.

    [bold]fastpeft estimate --model llama-3.1-8b --method qlora --seq 4096[/bold]
    """
    with explained():
        from fastpeft.cli.estimate import EstimateOptions
        from fastpeft.cli.estimate import estimate as run

        given = {k: v.value if isinstance(v, enum.Enum) else v for k, v in ctx.params.items()}
        if given["dtype"] == "auto":
            given["dtype"] = "bfloat16"
        run(EstimateOptions(**given))


def main() -> None:
    """Entry point of the `fastpeft` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets question marks, not a traceback
    app()


if __name__ == "__main__":
    main()
