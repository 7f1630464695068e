"""`PreTrainedModel.load_adapter`: an adapter of a mixture of experts from before Transformers fused them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

EXPERTS, RANK, HIDDEN, INNER = 3, 2, 8, 12


def test_fused_expert_adapters_compute_the_experts_deltas() -> None:
    """The fused A and B give each expert the sum it had: its own B·A for gate and for up, and nothing across."""
    from fastpeft.interop.transformers_weights import FuseExperts

    A = {name: [torch.randn(RANK, HIDDEN) for _ in range(EXPERTS)] for name in ("w1", "w3")}
    B = {name: [torch.randn(INNER, RANK) for _ in range(EXPERTS)] for name in ("w1", "w3")}
    settings = {"source_patterns": ["w1", "w3"], "target_patterns": ["x"], "full_layer_name": "x"}
    # The order of the file does not matter, that of the rule does.
    fused_A = FuseExperts("lora_A").convert(dict(reversed(A.items())), **settings)["x"]
    fused_B = FuseExperts("lora_B").convert(dict(reversed(B.items())), **settings)["x"]
    by_expert_A = fused_A.view(EXPERTS, 2 * RANK, HIDDEN)
    by_expert_B = fused_B.view(2 * INNER, 2 * RANK, EXPERTS)
    for e in range(EXPERTS):
        expected = torch.cat([B["w1"][e] @ A["w1"][e], B["w3"][e] @ A["w3"][e]])
        torch.testing.assert_close(by_expert_B[:, :, e] @ by_expert_A[e], expected)


def test_rules_are_those_of_peft() -> None:
    """For each key of an old Mixtral adapter, the same new name as with the real peft's rules."""
    theirs = pytest.importorskip("peft.utils.transformers_weight_conversion")
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    import fastpeft
    from fastpeft.interop.transformers_weights import build_peft_weight_mapping

    config = MixtralConfig(
        vocab_size=10,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
    )
    with torch.device("meta"):
        conversions = get_model_conversion_mapping(MixtralForCausalLM(config))
    prefix = "base_model.model.model.layers.0."
    keys = [f"{prefix}self_attn.q_proj.lora_A.weight", "base_model.model.lm_head.lora_embedding_B"]
    keys += [f"{prefix}block_sparse_moe.experts.1.{w}.lora_{m}.weight" for w in ("w1", "w2", "w3") for m in "AB"]
    for lora in (fastpeft.LoraConfig(), None):
        renamed = []
        for build in (build_peft_weight_mapping, theirs.build_peft_weight_mapping):
            rules = build(conversions, "default", peft_config=lora)
            renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
            converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
            renamed.append([rename_source_key(key, renamings, converters) for key in keys])
        assert renamed[0] == renamed[1]
    assert build_peft_weight_mapping(None, "default") == []
