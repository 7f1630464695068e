"""How `PreTrainedModel.load_adapter` of Transformers finds an adapter file's keys in the model.

Transformers 5 renames and fuses checkpoint weights while it loads them: a mixture of experts that version 4 kept as one
`nn.Linear` per expert is one 3-D parameter. Adapter files follow: each rule of the model's own conversion becomes a
rule for the LoRA weights.

Experts: with E experts and adapters (A_e, B_e) on n fused projections of one input, the fused adapter has rank n·r,

    A = [A_1; …; A_n] for each expert, rows ordered (expert, rank)            (E·n·r, K)
    B = blockdiag(B_1, …, B_n) for each expert, columns ordered (rank, expert)  (n·N, n·r·E)

which is the layout of `ParamWrapper`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter, WeightRenaming

from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING


class FuseExperts(ConversionOps):
    """One fused adapter weight from the experts' own: (r, K) each for `lora_A`, (N, r) each for `lora_B`."""

    def __init__(self, weight: str) -> None:
        self.weight = weight

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        # The projections in the order in which the base weights are fused (gate before up).
        parts = [_stacked(input_dict[pattern]) for pattern in source_patterns if pattern in input_dict]
        if self.weight == "lora_A":
            fused = torch.cat(parts, dim=1).flatten(0, 1)
        else:
            blocks = torch.stack([torch.block_diag(*experts) for experts in zip(*parts)])  # (E, n·N, n·r)
            fused = blocks.permute(1, 2, 0).flatten(1)
        return {kwargs["full_layer_name"]: fused.contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("An adapter of fused experts is not split again: save it with PeftModel instead.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weight!r})"


def _stacked(experts: Any) -> torch.Tensor:
    return experts if isinstance(experts, torch.Tensor) else torch.stack(list(experts))


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
