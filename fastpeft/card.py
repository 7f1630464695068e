"""The model card beside an adapter: `README.md`, kept if there is one, with the facts brought up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import atomic
from .configs.base import __version__ as peft_version
from .tuner.base import BaseTuner
from .tuner.constants import DUMMY_MODEL_CONFIG
from .tuner.walk import is_transformers_model

if TYPE_CHECKING:
    from .model import PeftModel

_VERSIONS_HEADING = "### Framework versions"


def create_or_update_model_card(model: PeftModel, output_dir: str) -> None:
    """Write `README.md`: library, tags, base model, PEFT's version. Other text in it stays.

    Args:
        model: whose card it is.
        output_dir: the adapter's directory.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(output_dir) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    base = model.get_base_model()
    tags = {*(getattr(base, "model_tags", None) or ()), *model._get_peft_specific_model_tags()}
    if tags:
        card.data["tags"] = sorted(tags)
    if not card.data.pipeline_tag and model.pipeline_tag:
        card.data.pipeline_tag = model.pipeline_tag
    config = BaseTuner.get_model_config(base)
    if config != DUMMY_MODEL_CONFIG and "_name_or_path" in config:
        card.data["base_model"] = config["_name_or_path"]
    card.text = _with_version(card.text)
    atomic.write(path, str(card).encode("utf-8"))


def _with_version(text: str) -> str:
    lines, version = text.splitlines(), f"- PEFT {peft_version}"
    if version not in lines:
        if _VERSIONS_HEADING in lines:
            lines.insert(lines.index(_VERSIONS_HEADING) + 2, version)
        else:
            lines.append(f"{_VERSIONS_HEADING}\n\n{version}")
    return "\n".join(lines)


def model_tags(model: PeftModel) -> list[str]:
    """The tags that say what the adapter is and what it belongs to."""
    base = model.get_base_model()
    tags = ["transformers"] if is_transformers_model(base) else []
    method = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
    if method == "LORA":
        tags.append("lora")
    if hasattr(base, "name_or_path"):
        tags.append(f"base_model:adapter:{base.name_or_path}")
    return tags
