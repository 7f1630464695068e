"""How `PreTrainedModel.load_adapter` of Transformers finds an adapter file's keys in the model.

Transformers 5 renames and fuses checkpoint weights while it loads them: a mixture of experts that version 4 kept as one
`nn.Linear` per expert is one 3-D parameter. Adapter files follow: each rule of the model's own conversion becomes a
rule for the LoRA weights.

The layout of the fused adapters is that of `tuner/conversion.py`, which does the same for files that `PeftModel` loads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter, WeightRenaming

from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..tuner.conversion import fuse_A, fuse_B


class FuseExperts(ConversionOps):
    """One fused adapter weight from the experts' own: (r, K) each for `lora_A`, (N, r) each for `lora_B`."""

    def __init__(self, weight: str) -> None:
        self.weight = weight

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        # The projections in the order in which the base weights are fused (gate before up).
        parts = [list(input_dict[pattern]) for pattern in source_patterns if pattern in input_dict]
        fuse = fuse_A if self.weight == "lora_A" else fuse_B
        return {kwargs["full_layer_name"]: fuse(parts)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("An adapter of fused experts is not split again: save it with PeftModel instead.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight!r})"


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The rules that turn keys of an adapter file into names of a Transformers model with that adapter injected.

    Args:
        weight_conversions: the model's own rules (`WeightRenaming`, `WeightConverter`); without any, none are needed.
        adapter_name: inserted after the adapter weight's name, as in `….lora_A.default.weight`.
        peft_config: the adapter's config; without it the weights of every implemented method are renamed.
    """
    if not weight_conversions:
        return []
    kind = getattr(peft_config, "peft_type", None)
    known = PEFT_TYPE_TO_PREFIX_MAPPING
    rules = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    for prefix in sorted({known[kind]} if kind in known else set(known.values())):
        rules.append(WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}"))
    for rule in weight_conversions:
        if isinstance(rule, WeightRenaming):
            rules.append(rule)
        else:
            rules.extend(_expert_rules(rule, adapter_name))
    return rules


def _expert_rules(rule: WeightConverter, adapter_name: str) -> list[WeightConverter]:
    """The rules for the adapters of one fused expert parameter; none if the rule is about something else."""
    if len(rule.target_patterns) != 1 or not any(isinstance(op, MergeModulelist) for op in rule.operations):
        return []
    owner, _, parameter = rule.target_patterns[0].rpartition(".")
    # Of two adapted parameters of one module the second wraps the wrapper of the first.
    owners = {"gate_up_proj": f"{owner}.base_layer", "down_proj": owner}
    if parameter not in owners:
        return []
    rules = []
    for weight in ("lora_A", "lora_B"):
        sources = [f"{pattern.rpartition('.')[0]}.{weight}.*" for pattern in rule.source_patterns]
        target = f"{owners[parameter]}.{weight}.{adapter_name}.weight"
        converted = WeightConverter(sources, target, operations=[FuseExperts(weight)])
        converted.distributed_operation = rule.distributed_operation
        converted.quantization_operation = rule.quantization_operation
        rules.append(converted)
    return rules
