"""Adapters of mixtures of experts from before Transformers 5, which kept every expert as modules of its own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def make(family: str):
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "head_dim": 8,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    if family == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes))
    else:
        config = transformers.Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, **sizes)
        model = transformers.Qwen3MoeForCausalLM(config)
    return model.eval()


FUSED = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], "experts", "experts and router", r".*(q_proj|experts.*)", None],
)
def test_old_targets_mean_what_they_mean_in_peft(family, targets):
    if targets == "experts":
        targets = FUSED[family]
    elif targets == "experts and router":
        targets = [*FUSED[family], "gate", "o_proj"]
    elif isinstance(targets, str) and targets.startswith(".*"):
        targets = rf".*(q_proj|{'|'.join(FUSED[family])})"
    states, configs = [], []
    for library in (fastpeft, peft):
        if targets is None and library is peft:
            continue  # PEFT finds no default targets in these architectures
        torch.manual_seed(1)
        config = library.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
        model = library.get_peft_model(make(family), config)
        states.append(model.state_dict())
        configs.append({k: v for k, v in config.to_dict().items() if k.startswith(("target", "rank", "alpha"))})
    if targets is not None:
        assert configs[0] == configs[1]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    else:
        assert configs[0]["target_modules"] == {"q_proj", "v_proj"}


def test_half_of_a_fused_parameter_cannot_be_targeted():
    with pytest.raises(ValueError, match="Cannot convert PEFT target.s. w1 without also targeting w3"):
        fastpeft.get_peft_model(make("mixtral"), fastpeft.LoraConfig(target_modules=["w1", "w2"]))


@pytest.mark.parametrize("family", FUSED)
def test_old_files_load_as_in_peft(tmp_path, family):
    """A file with one A and one B per expert and projection, written as PEFT wrote it then."""
    r, experts = 2, 4
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    up, gate, down = ("w3", "w1", "w2") if family == "mixtral" else ("up_proj", "gate_proj", "down_proj")
    torch.manual_seed(2)
    tensors = {}
    for layer in range(2):
        root = f"base_model.model.model.layers.{layer}"
        for expert in range(experts):
            for name, k, n in ((gate, 32, 24), (up, 32, 24), (down, 24, 32)):
                key = f"{root}.{block}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.randn(r, k), torch.randn(n, r)
        key = f"{root}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.randn(r, 32), torch.randn(32, r)
    fastpeft.LoraConfig(r=r, lora_alpha=4, target_modules=[gate, up, down, "q_proj"]).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})

    ours = fastpeft.PeftModel.from_pretrained(make(family), tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(family), tmp_path)
    a, b = (m.state_dict() for m in (ours, theirs))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    # one expert, by hand
    layer = ours.base_model.model.model.layers[1].mlp.experts
    key = f"base_model.model.model.layers.1.{block}.experts.3.{down}"
    expected = 2.0 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    torch.testing.assert_close(layer.get_delta_weight("default")[3], expected)
    delta = layer.base_layer.get_delta_weight("default")[3]
    for i, name in enumerate((gate, up)):
        key = f"base_model.model.model.layers.1.{block}.experts.3.{name}"
        expected = 2.0 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        torch.testing.assert_close(delta[24 * i : 24 * (i + 1)], expected)

    ours.save_pretrained(tmp_path / "new")
    again = peft.PeftModel.from_pretrained(make(family), tmp_path / "new")
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits)
    # an incomplete old file is an error, not a wrong fusion
    broken = load_file(tmp_path / "adapter_model.safetensors")
    broken.pop(f"base_model.model.model.layers.0.{block}.experts.2.{up}.lora_A.weight")
    save_file(broken, tmp_path / "adapter_model.safetensors")
    model = make(family)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(fastpeft.AdapterFileError, match=rf"layers.0.*experts.*{up}.*expert 2"):
        fastpeft.PeftModel.from_pretrained(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names


def test_renamed_modules_are_found():
    """Gemma 3's language model had another place in the model once."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 300, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    config.mm_tokens_per_image = 4
    model = fastpeft.get_peft_model(
        AutoModelForImageTextToText.from_config(config),
        fastpeft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"),
    )
    weights = fastpeft.get_peft_model_state_dict(model)
    new = {key: torch.full_like(value, 3.0) for key, value in weights.items()}
    old = {key.replace("model.language_model", "language_model.model"): value for key, value in new.items()}
    assert not set(old) & set(new)
    result = fastpeft.set_peft_model_state_dict(model, old)
    assert result.unexpected_keys == [] and result.missing_keys == []
    loaded = fastpeft.get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[key], value) for key, value in new.items())
