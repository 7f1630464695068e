"""Every member of the LoRA family, patched: what is fused computes the same, what is not is left with a reason."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import fastpeft

pytestmark = pytest.mark.filterwarnings("ignore")
LIBRARIES = {"peft": peft, "fastpeft": fastpeft}
IDS = torch.randint(2, 64, (2, 60), generator=torch.Generator().manual_seed(0))
IDS[:, 20] = 1  # invokes aLoRA
FUSED = ("q_proj", "v_proj", "up_proj")


def part(library: str, name: str, **options: Any) -> Any:
    home = fastpeft if library == "fastpeft" else peft.tuners.lora.config
    return getattr(home if hasattr(home, name) else fastpeft.configs, name)(**options)


def gradients(model: nn.Module) -> None:
    model(IDS, labels=IDS).loss.backward()


# Of each member: its options (or what makes them), and the layers that computes by an operator; the rest is left.
MEMBERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "pissa": ({"init_lora_weights": "pissa"}, FUSED),
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, FUSED),
    "olora": ({"init_lora_weights": "olora"}, FUSED),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, FUSED),
    "eva": (lambda lib: {"init_lora_weights": "eva", "eva_config": part(lib, "EvaConfig", tau=0.4)}, FUSED),
    "corda": (lambda lib: {"init_lora_weights": "corda", "corda_config": part(lib, "CordaConfig")}, FUSED),
    "lora_ga": (lambda lib: {"init_lora_weights": "lora_ga", "lora_ga_config": part(lib, "LoraGAConfig")}, FUSED),
    "rslora": ({"use_rslora": True}, FUSED),
    "patterns": ({"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"up_proj": 5}}, FUSED),
    "alora": ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, ()),
    # PEFT means it for GPTQ's layers; on others its adapter is plain LoRA.
    "qalora": ({"use_qalora": True, "qalora_group_size": 8}, FUSED),
    "bdlora": (
        lambda lib: {"use_bdlora": part(lib, "BdLoraConfig", target_modules_bd_b=list(FUSED), nblocks=2)},
        (),
    ),
    "velora": (lambda lib: {"velora_config": part(lib, "VeloraConfig", num_groups=4)}, ()),
    "kasa": (lambda lib: {"kasa_config": part(lib, "KasaConfig")}, ()),
    "lora_bias": ({"lora_bias": True}, ()),
    "trainable_token_indices": ({"trainable_token_indices": [3, 5]}, FUSED),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, FUSED),
    "ensure_weight_tying": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, FUSED),
    "layer_replication": ({"layer_replication": [(0, 1), (0, 1)]}, FUSED),
    "embedding": ({"target_modules": [*FUSED, "embed_tokens"]}, FUSED),
}
ONLY_PEFT = ("qalora",)


def model(library: str, member: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=member == "ensure_weight_tying",
    )
    base, lib = transformers.LlamaForCausalLM(config).eval(), LIBRARIES[library]
    options = MEMBERS[member][0]
    options = options(library) if callable(options) else options
    lora = lib.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(FUSED), **options})
    if member == "corda":
        home = fastpeft if library == "fastpeft" else importlib.import_module("peft.tuners.lora.corda")
        home.preprocess_corda(base, lora, lambda: base(IDS[:1]))  # PEFT takes one sample at a time
    if member == "lora_ga":
        home = fastpeft if library == "fastpeft" else peft.tuners.lora
        home.preprocess_loraga(base, lora, lambda: gradients(base))
        base.zero_grad()
    made = lib.get_peft_model(base, lora)
    if member == "eva":
        lib.initialize_lora_eva_weights(made, [{"input_ids": IDS}], show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # no adapter at its start, where B hides A
            if "lora_" in name and parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return made.eval()


def outcome(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_patched_computes_the_same(library: str, member: str) -> None:
    if member in ONLY_PEFT and library == "fastpeft":
        with pytest.raises(NotImplementedError, match="use_qalora"):
            model(library, member)
        return
    theirs = model(library, member)
    ours = fastpeft.patch(copy.deepcopy(theirs))
    expected, found = outcome(theirs), outcome(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 2e-5 * value.norm() + 1e-9, name
    rows = {row.module.rpartition(".")[2]: row for row in fastpeft.report(ours).rows}
    fused = {name for name in FUSED if (rows[name].fused or "").startswith("lora_linear")}
    assert fused == set(MEMBERS[member][1])
    assert all(rows[name].reason for name in FUSED if name not in fused)
    fastpeft.unpatch(ours)
    assert all(torch.equal(value, expected[name]) for name, value in outcome(ours).items())
