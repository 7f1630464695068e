"""Models and tokenizers for the commands: from a folder, from the Hub, or random weights from a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastpeft.cli.errors import CommandError
from fastpeft.layers.bnb import keep_scales

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Shapes for `fastpeft bench` without a download: random weights, so only costs can be compared, not answers.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-6l": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        CommandError: the device asked for is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        built = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no usable GPU"
        raise CommandError(f"--device cuda: {built}; run `fastpeft doctor`")
    if name == "mps" and not torch.backends.mps.is_available():
        raise CommandError("--device mps: torch finds no Apple GPU")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, float16 on one that has not, float32 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def is_missing_folder(name: str) -> bool:
    """Whether `name` can only be a path (a Hub id is `name` or `owner/name`), and nothing is there."""
    path = Path(name).expanduser()
    return not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1)


def _explain(name: str, error: Exception) -> CommandError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        return CommandError(f"{name}: no config.json in this folder, so it is not a Transformers model")
    if is_missing_folder(name):
        return CommandError(f"{name}: no such folder")
    return CommandError(f"{name}: cannot be loaded, neither as a folder nor from the Hub: {first}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a Hub id.

    Raises:
        CommandError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise _explain(name, error) from None


def stored_config(name: str) -> Any:
    """The model's config.json.

    Raises:
        CommandError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _explain(name, error) from None


def four_bits(compute: torch.dtype, option: str = "--method qlora") -> Any:
    """QLoRA's quantisation for `from_pretrained`: NF4 with nested scales, products in `compute`.

    option: what asked for it, for the error's message.

    Raises:
        CommandError: bitsandbytes is not installed.
    """
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise CommandError(f"{option} needs bitsandbytes: pip install 'fastpeft[bitsandbytes]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_model(name: str, dtype: torch.dtype | str, config: Any = None, quantization: Any = None) -> Any:
    """A causal language model with its weights, on the CPU.

    Args:
        dtype: of the weights, or "auto" for that of the files.
        config: in place of the model's own.
        quantization: as `four_bits` gives it.

    Raises:
        CommandError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    more = {} if quantization is None else {"quantization_config": quantization}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, config=config, **more)
    except (OSError, ValueError, ImportError) as error:
        raise _explain(name, error) from None
    keep_scales(model)
    return model


def shape_config(name: str | None, config: Path | None, layers: int | None) -> tuple[Any, bool]:
    """(configuration, whether `name` also has weights) of a shipped shape, a config.json, a folder or a Hub id.

    Raises:
        CommandError: none or both are given, or what is given cannot be read.
    """
    from transformers import AutoConfig

    from fastpeft.memory.standin import shapes

    known = {**shapes(), **PRESETS}
    if (name is None) == (config is None):
        raise CommandError(
            f"give one of --model (a folder, a Hub id, or {', '.join(known)}) and --config (a JSON file)"
        )
    weights = False
    if config is not None or name in known:
        try:
            fields = dict(known[name]) if name in known else json.loads(config.read_text())  # type: ignore[union-attr]
            model_type = fields.pop("model_type")
            result = AutoConfig.for_model(model_type, **fields)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CommandError(f"--config {config}: not a Transformers config.json: {error}") from None
    else:
        try:
            result = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _explain(str(name), error) from None
        weights = True
    if layers is not None:
        if not 1 <= layers <= result.num_hidden_layers:
            raise CommandError(f"--layers {layers}: the model has {result.num_hidden_layers}")
        result.num_hidden_layers = layers
        if isinstance(getattr(result, "layer_types", None), list):
            result.layer_types = result.layer_types[:layers]
    return result, weights


def target_modules(text: str) -> str | list[str]:
    """`--target-modules`: "all-linear", names separated by commas, or one regular expression."""
    if "," in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    plain = text.replace("_", "").replace(".", "").replace("-", "").isalnum()
    return text if text == "all-linear" or not plain else [text]


def ensure_peft_names() -> None:
    """Transformers asks `isinstance(model, peft.PeftModel)`: without the real peft, let that name mean fastpeft's.

    To be called before transformers is imported.
    """
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        import fastpeft

        fastpeft.install_as_peft()
