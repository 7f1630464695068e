"""The models that `fastpeft bench` compares, and one training step of each.

Run as a program (`python -m fastpeft.cli.contenders OPTIONS NAME`) it measures one contender's memory in a process of
its own, where nothing another contender left in the heap is counted, and prints JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastpeft
from fastpeft.cli.errors import CommandError
from fastpeft.cli.models import four_bits, load_model, pick_device, pick_dtype, shape_config, target_modules
from fastpeft.measure import PeakMemory, SavedActivations
from fastpeft.memory import find_layers, install

BASELINES = ("peft", "compile", "eager")
_MEMORY_STEPS = 3  # the optimizer's state exists from the second on


@dataclass
class BenchOptions:
    """The options of `fastpeft bench`, by the names they have there."""

    model: str | None = None
    config: Path | None = None
    baseline: str = "peft"
    products: bool = False
    method: str = "lora"
    out: Path = Path("fastpeft-bench")
    layers: int | None = None
    batch: int = 2
    seq: int = 256
    r: int = 16
    dropout: float = 0.0
    target_modules: str = "all-linear"
    steps: int = 20
    warmup: int = 3
    lr: float = 1e-3
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    gradient_checkpointing: bool = False
    checkpoint: str = "none"
    report: Path | None = None
    lengths: str | None = None
    checkpoints: str | None = None
    methods: str | None = None

    def baselines(self) -> list[str]:
        """The baselines by name; raises CommandError for an unknown one or one named twice."""
        names = [name.strip() for name in self.baseline.split(",") if name.strip()]
        if names == ["none"]:
            return []
        for name in names:
            if name not in BASELINES or names.count(name) > 1:
                raise CommandError(
                    f"--baseline {self.baseline}: give {', '.join(BASELINES)}, or several of them with commas, each "
                    "once, or none"
                )
        return names

    def as_json(self) -> dict[str, Any]:
        """Every option in JSON's types."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> BenchOptions:
        """The inverse of `as_json`."""
        options = BenchOptions(**fields)
        options.out = Path(options.out)
        options.report = Path(options.report) if options.report is not None else None
        options.config = Path(options.config) if options.config is not None else None
        return options


class Runner:
    """One contender: a model with a freshly drawn adapter, its optimizer, and `step(i)`.

    Every contender draws the same weights, adapter and batches from the same seeds.
    """

    def __init__(self, name: str, options: BenchOptions) -> None:
        self.name = name
        self.options = options
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        self.model = self._adapted(self._base())
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.vocab = self.model.get_input_embeddings().weight.shape[0]

    def _base(self) -> Any:
        from transformers import AutoModelForCausalLM

        options = self.options
        config, weights = shape_config(options.model, options.config, options.layers)
        torch.manual_seed(options.seed)
        if options.method == "qlora":
            model = self._quantised(config, weights)
        elif weights:
            model = load_model(str(options.model), self.dtype, config=config)
        else:
            # Drawn in float32 whatever the dtype: the same weights for every one.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self.dtype)
        if options.method == "qlora":
            library = real_peft() if self.name == "peft" else fastpeft
            return library.prepare_model_for_kbit_training(
                model.to(self.device), options.gradient_checkpointing, {"use_reentrant": False}
            )
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.to(self.device)

    def _quantised(self, config: Any, weights: bool) -> Any:
        """The model in 4 bits, as `from_pretrained` makes it: random weights go through a folder."""
        from transformers import AutoModelForCausalLM

        if weights:
            return load_model(str(self.options.model), self.dtype, config, four_bits(self.dtype))
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            return load_model(folder, self.dtype, quantization=four_bits(self.dtype))

    def _adapted(self, model: Any) -> Any:
        options = self.options
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "r": options.r,
            "lora_alpha": 2 * options.r,
            "lora_dropout": options.dropout,
            "use_dora": options.method == "dora",
            "target_modules": target_modules(options.target_modules),
        }
        torch.manual_seed(options.seed)
        if self.name in ("peft", "compile"):
            peft = real_peft()
            model = peft.get_peft_model(model, peft.LoraConfig(**fields))
            if options.checkpoint != "none":
                if options.checkpoint != "block":
                    raise CommandError(
                        f"peft has no checkpoint mode {options.checkpoint!r}, only block (Transformers')"
                    )
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return torch.compile(model) if self.name == "compile" else model
        model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(**fields))
        if self.name == "fastpeft":
            fastpeft.patch(model, checkpoint=None if options.checkpoint == "none" else options.checkpoint)
        elif options.checkpoint != "none":
            install(model, [options.checkpoint] * len(find_layers(model)))
        return model

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        with fastpeft.backend("reference") if self.name == "eager" else contextlib.nullcontext():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        # A 4-bit model has a dtype for its products; all else is in fp32, as its preparation leaves it.
        mixed = self.dtype != torch.float32 and self.options.method != "qlora"
        return torch.autocast(self.device.type, self.dtype, enabled=mixed)

    def loss(self, index: int) -> torch.Tensor:
        """Forward of step `index`: the loss on its batch of random tokens."""
        options = self.options
        generator = torch.Generator().manual_seed(options.seed + index)
        ids = torch.randint(self.vocab, (options.batch, options.seq), generator=generator).to(self.device)
        torch.manual_seed(options.seed + index)  # the dropout of a step does not depend on who ran before
        with self._backend(), self._autocast():
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, index: int) -> torch.Tensor:
        """Forward, backward and optimizer step; the loss, not yet read from the device."""
        loss = self.loss(index)
        with self._backend():
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def saved_bytes(self) -> int:
        """Bytes that one forward keeps for its backward, parameters and buffers excluded."""
        with SavedActivations(self.model) as saved:
            loss = self.loss(0)
        count = saved.bytes
        del loss
        return count


def real_peft() -> Any:
    """The peft package itself.

    Raises:
        CommandError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise CommandError(
            "--baseline peft and compile need peft (pip install peft); or compare with --baseline eager"
        ) from None
    if getattr(peft, "__fastpeft__", False):
        raise CommandError("--baseline peft needs the real peft, but `import peft` means fastpeft in this process")
    return peft


def measure_memory(name: str, options: BenchOptions, runner: Runner | None = None) -> dict[str, Any]:
    """Peak memory of a few training steps in this process: held before them, at the peak, and how it was measured."""
    runner = runner or Runner(name, options)
    if name == "compile":
        runner.step(0)  # what the compiler takes is not what a step takes
    gc.collect()
    with PeakMemory(runner.device) as peak:
        for index in range(_MEMORY_STEPS):
            runner.step(index)
    return {"start": peak.start, "peak": peak.bytes, "growth": peak.growth, "method": peak.method}


def _main(arguments: list[str]) -> None:
    from fastpeft.cli.console import quiet_libraries

    quiet_libraries()
    options = BenchOptions.from_json(json.loads(arguments[0]))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.lengths is None:
        print(json.dumps(measure_memory(arguments[1], options)))
        return
    runner = Runner(arguments[1], options)
    found = []
    options.seq = 16
    runner.step(0)  # what libraries set up once is no step's
    runner.optimizer.state.clear()
    for length in map(
        int, options.lengths.split(",")
    ):  # shortest first: what the heap has grown to is not counted again
        options.seq = length
        found.append(measure_memory(arguments[1], options, runner))
        runner.optimizer.state.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
