"""`fastpeft finetune`: from a model and a file of rows to an adapter, its curve and its answers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

import fastpeft
from fastpeft.cli.console import console, facts, quiet_libraries
from fastpeft.cli.data import Example, load_examples, split_examples
from fastpeft.cli.encode import Collator, Encoded, encode, ensure_chat_template, pad_id
from fastpeft.cli.errors import CommandError
from fastpeft.cli.files import write_json
from fastpeft.cli.models import (
    ensure_peft_names,
    four_bits,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    target_modules,
)
from fastpeft.cli.options import CURVE_FILE, INTERRUPTED, METRICS_FILE, RUN_FILE, FinetuneOptions
from fastpeft.cli.record import draw, metrics_of, show_end, show_start
from fastpeft.memory import find_layers, install
from fastpeft.memory.optimizers import OPTIMIZERS

_LENGTH = 1024


def _prepare_out(options: FinetuneOptions) -> None:
    if options.resume:
        return
    held = [name for name in ("adapter_config.json", RUN_FILE, "checkpoints") if (options.out / name).exists()]
    if held and not options.overwrite:
        raise CommandError(
            f"{options.out} already holds {held[0]}: continue that run with --resume, replace it with --overwrite, or "
            "choose another --out"
        )
    if held:
        shutil.rmtree(options.out / "checkpoints", ignore_errors=True)
        for name in (*held, METRICS_FILE, CURVE_FILE):
            if (options.out / name).is_file():
                (options.out / name).unlink()
    options.out.mkdir(parents=True, exist_ok=True)


@dataclass
class _Rows:
    train: Encoded
    held: Encoded | None
    dialogue: bool
    prompts: list[str]
    fingerprint: str


def _encode_with_bar(tokenizer: Any, examples: Sequence[Example], options: FinetuneOptions, limit: int) -> Encoded:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal or len(examples) < 2000) as bar:
        task = bar.add_task("tokenise", total=len(examples))
        return encode(tokenizer, examples, limit, options.loss_on == "completions", on_row=lambda: bar.advance(task))


def _load_rows(options: FinetuneOptions, tokenizer: Any, limit: int) -> _Rows:
    from fastpeft.cli.samples import default_prompts

    examples = load_examples(options.data)
    if options.eval_data is not None:
        train, held = examples, load_examples(options.eval_data)
    else:
        train, held = split_examples(examples, options.eval_split, options.seed)
    encoded = _encode_with_bar(tokenizer, train, options, limit)
    encoded_held = _encode_with_bar(tokenizer, held, options, limit) if held else None
    digest = hashlib.sha256()
    for part in (encoded, encoded_held):
        for ids, learnt in zip(part.ids, part.learnt) if part else ():
            digest.update(ids.tobytes() + learnt.tobytes())
    prompts = options.prompt or default_prompts(held or train, options.samples)
    return _Rows(encoded, encoded_held, any(row.messages for row in examples), prompts, digest.hexdigest())


def _tokenizer(options: FinetuneOptions) -> tuple[Any, str]:
    tokenizer = load_tokenizer(options.model)
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = options.chat_template.read_text("utf-8")
        except OSError as error:
            raise CommandError(f"--chat-template {options.chat_template}: {error.strerror}") from None
        return tokenizer, f"from {options.chat_template}"
    return tokenizer, "a plain default" if ensure_chat_template(tokenizer) else "the model's own"


def _length_limit(options: FinetuneOptions, model_config: Any) -> int:
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else _LENGTH
    if options.max_length is None:
        return min(longest, _LENGTH)
    if options.max_length > longest:
        raise CommandError(f"--max-length {options.max_length} is more than the model's {longest} positions")
    return options.max_length


def _training_arguments(options: FinetuneOptions, rows: _Rows, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import TrainingArguments

    batches = math.ceil(len(rows.train) / options.batch)
    per_epoch = math.ceil(batches / options.grad_accum)
    total = options.steps if options.steps is not None else max(1, math.ceil(options.epochs * per_epoch))
    warmup = round(options.warmup * total) if options.warmup < 1 else int(options.warmup)
    evaluate = rows.held is not None and options.eval_steps > 0
    fields: dict[str, Any] = {
        "output_dir": str(options.out / "checkpoints"),
        "max_steps": total,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "gradient_accumulation_steps": options.grad_accum,
        "learning_rate": options.lr,
        "lr_scheduler_type": "constant_with_warmup" if options.schedule == "constant" else options.schedule,
        "warmup_steps": warmup,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": _optimizer(options.optim, device),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": options.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would wait for the device every step, and hide what it finds
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": options.eval_steps if evaluate else None,
        "eval_on_start": rows.held is not None and not options.resume,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": options.save_steps if options.save_steps > 0 else total,
        "save_total_limit": options.keep_checkpoints,
        "dataloader_pin_memory": device.type == "cuda",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    if options.gradient_checkpointing:
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        fields |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(**fields)
    except ValueError as error:
        raise CommandError(f"Transformers refuses these options: {error}") from None
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs in sight would mean DataParallel
    return arguments, per_epoch


def _optimizer(name: str, device: torch.device) -> str:
    """The name for Transformers, if there is what it needs."""
    if name == "adamw_torch_fused" and device.type not in ("cpu", "cuda"):
        return "adamw_torch"
    optimizer = OPTIMIZERS[name]
    if optimizer.bitsandbytes:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise CommandError(f"--optim {name} needs bitsandbytes: pip install 'fastpeft[bitsandbytes]'")
        if optimizer.paged and device.type != "cuda":
            raise CommandError(f"--optim {name}: paged states need a CUDA GPU; take {name.removeprefix('paged_')}")
    return name


def _adapted(options: FinetuneOptions, model: Any) -> Any:
    from transformers import set_seed

    alpha = 2 * options.r if options.alpha is None else options.alpha
    if options.method == "qlora":
        model = fastpeft.prepare_model_for_kbit_training(
            model, options.gradient_checkpointing, {"use_reentrant": False}
        )
    set_seed(options.seed)
    config = fastpeft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=alpha,
        lora_dropout=options.dropout,
        target_modules=target_modules(options.target_modules),
        use_rslora=options.rslora,
    )
    try:
        model = fastpeft.get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        raise CommandError(f"--target-modules {options.target_modules}: {error}") from None
    if options.patch:
        fastpeft.patch(model, checkpoint=None if options.checkpoint == "none" else options.checkpoint)
    elif options.checkpoint != "none":
        install(model, [options.checkpoint] * len(find_layers(model)))
    return model


def _resume_command(options: FinetuneOptions) -> str:
    return f"fastpeft finetune --resume --out {shlex.quote(str(options.out))}"


def finetune(options: FinetuneOptions) -> int:
    """Train, save, and show; returns the exit code (0, or 130 after an interrupt that left a checkpoint).

    Raises:
        CommandError: something the user can mend; says what and how.
    """
    ensure_peft_names()
    quiet_libraries()
    _check_place()
    from transformers import AutoConfig
    from transformers.trainer_callback import TrainerState

    from fastpeft.cli import samples as answers
    from fastpeft.cli.training import (
        Interrupts,
        RowTrainer,
        TrainingDisplay,
        checkpoint_step,
        last_checkpoint,
        remove_incomplete,
    )

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.resume and _finished(options):
        console.print(f"The run in {options.out} is finished: there is nothing to continue.", markup=False)
        return 0
    _prepare_out(options)
    checkpoint = last_checkpoint(options.out / "checkpoints") if options.resume else None
    if options.resume and checkpoint is None:
        raise CommandError(
            f"{options.out / 'checkpoints'} has no complete checkpoint: start again, with --overwrite, not --resume"
        )
    remove_incomplete(options.out / "checkpoints")

    with console.status("loading the tokenizer and the rows"):
        tokenizer, template = _tokenizer(options)
        model_config = AutoConfig.from_pretrained(options.model)
        rows = _load_rows(options, tokenizer, _length_limit(options, model_config))
    _check_run(options, rows)
    with console.status(f"loading {options.model}"):
        quantization = four_bits(dtype) if options.method == "qlora" else None
        model = load_model(options.model, dtype, quantization=quantization).to(device)
    arguments, per_epoch = _training_arguments(options, rows, device, dtype)

    with console.status("adding the adapter" + (", fusing, and verifying what was fused" if options.patch else "")):
        model = _adapted(options, model)
    before = _earlier_samples(options, rows.prompts) if checkpoint else None
    if before is None and rows.prompts:
        # Through the adapter's layers: 4-bit products of theirs are several times as fast as bitsandbytes' on a CPU.
        with console.status("sampling answers before training"), model.disable_adapter():
            before = answers.generate(model, tokenizer, rows.prompts, rows.dialogue, options.max_new_tokens)
    show_start(options, rows, model, template, device, dtype, arguments, checkpoint)

    interrupts = Interrupts()
    display = TrainingDisplay(device, interrupts)
    trainer = RowTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held,
        data_collator=Collator(pad_id(tokenizer), 8 if device.type == "cuda" else 1),
        callbacks=[display],
    )
    trainer.lengths, trainer.update_steps_per_epoch = rows.train.lengths, per_epoch
    _drop_printer(trainer)
    if checkpoint is not None and checkpoint_step(checkpoint) >= arguments.max_steps:
        # Killed between its last step and its end. Given such a checkpoint the Trainer would take one step more.
        fastpeft.set_peft_model_state_dict(model, fastpeft.load_peft_weights(str(checkpoint)))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        try:
            with interrupts:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            display.stop()
    done = trainer.state.global_step >= trainer.state.max_steps
    history = trainer.state.log_history
    if done:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        evaluated = any("eval_loss" in row and row["step"] == arguments.max_steps for row in history)
        if rows.held is not None and not evaluated:
            trainer.evaluate()

    pairs = [{"prompt": prompt, "before": text} for prompt, text in zip(rows.prompts, before or [])]
    if done and pairs:
        with console.status("sampling answers after training"):
            after = answers.generate(model, tokenizer, rows.prompts, rows.dialogue, options.max_new_tokens)
        pairs = [{**pair, "after": text} for pair, text in zip(pairs, after)]
    metrics = metrics_of(options, rows, model, trainer, display, pairs, device, dtype, done)
    write_json(options.out / METRICS_FILE, metrics)
    curve = draw(options, metrics)
    if not done:
        console.print(
            facts(
                f"Interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}",
                {
                    "checkpoint": escape(str(last_checkpoint(options.out / "checkpoints"))),
                    "continue": f"[bold]{escape(_resume_command(options))}[/bold]",
                },
                style="yellow",
            )
        )
        return INTERRUPTED
    if pairs:
        console.print(answers.samples_table(pairs))
    show_end(options, metrics, curve)
    return 0


def _check_place() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise CommandError("training needs the accelerate package: pip install 'fastpeft[train]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError(
            "this command trains in one process; for several, put fastpeft.get_peft_model and fastpeft.patch into a "
            "script of your own with Transformers' Trainer"
        )


def _finished(options: FinetuneOptions) -> bool:
    try:
        status = json.loads((options.out / METRICS_FILE).read_text("utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return False
    return status == "finished" and (options.out / "adapter_config.json").exists()


def _check_run(options: FinetuneOptions, rows: _Rows) -> None:
    """Write run.json at the start of a run; at its resumption compare the data with it."""
    path = options.out / RUN_FILE
    if options.resume:
        if json.loads(path.read_text("utf-8"))["data_sha256"] != rows.fingerprint:
            raise CommandError(
                f"{options.data} (or its tokenisation) has changed since the run in {options.out} began: a resumed run "
                "would not be the same run; start a new one with another --out"
            )
        return
    stored = {**options.as_json(), "overwrite": False}
    write_json(path, {"fastpeft_version": fastpeft.__version__, "data_sha256": rows.fingerprint, "options": stored})


def _earlier_samples(options: FinetuneOptions, prompts: Sequence[str]) -> list[str] | None:
    """The answers sampled before the interrupted run began, if they were to the same prompts."""
    try:
        stored = json.loads((options.out / METRICS_FILE).read_text("utf-8"))
        same = [row["prompt"] for row in stored["samples"]] == list(prompts)
        same = same and stored["options"]["max_new_tokens"] == options.max_new_tokens
        return [row["before"] for row in stored["samples"]] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _drop_printer(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
