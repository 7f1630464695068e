"""Adapter files are PEFT's, byte for byte, and go both ways."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import fastpeft

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

CONFIGS = [
    {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "task_type": "CAUSAL_LM"},
    {"target_modules": ["o_proj", "embed_tokens"], "lora_dropout": 0.1},
    {"target_modules": r".*layers\.1.*(q|k)_proj", "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight", "mlp.down_proj.weight"]},
    {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "alpha_pattern": {"q_proj": 3},
    },
]


def train(model):
    """Make every adapter tensor something else than its initialisation."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                p.normal_()
    return model.eval()


def content(directory) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def normal(config: bytes) -> dict:
    """Sets have no order."""
    return {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(config).items()}


BIASES = [{**CONFIGS[i], "bias": bias} for i, bias in ((0, "all"), (0, "lora_only"), (2, "all"))]


@pytest.mark.parametrize("config", CONFIGS + BIASES, ids=lambda c: "-".join(map(str, c.values())))
def test_files_are_pefts_both_ways(llama, tmp_path, config):
    options = {"attention_bias": True}
    outputs = []
    for library in (fastpeft, peft):
        model = train(library.get_peft_model(llama(**options), library.LoraConfig(**config)))
        model.save_pretrained(tmp_path / library.__name__)
        outputs.append(model(IDS).logits)
    torch.testing.assert_close(*outputs)
    ours, theirs = content(tmp_path / "fastpeft"), content(tmp_path / "peft")
    assert list(ours) == list(theirs) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert normal(ours["adapter_config.json"]) == normal(theirs["adapter_config.json"])
    assert [line.split(":")[0] for line in ours["adapter_config.json"].decode().splitlines() if ":" in line] == [
        line.split(":")[0] for line in theirs["adapter_config.json"].decode().splitlines() if ":" in line
    ]
    assert ours["README.md"] == theirs["README.md"]
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    for library, other in ((fastpeft, "peft"), (peft, "fastpeft")):
        loaded = library.PeftModel.from_pretrained(llama(**options), tmp_path / other)
        torch.testing.assert_close(loaded(IDS).logits, outputs[0])


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_are_in_the_file(tmp_path, task):
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    cls = {
        "SEQ_CLS": BertForSequenceClassification,
        "TOKEN_CLS": BertForTokenClassification,
        "QUESTION_ANS": BertForQuestionAnswering,
    }[task]

    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return cls(BertConfig(vocab_size=32, **sizes)).eval()

    for library in (fastpeft, peft):
        model = train(library.get_peft_model(make(), library.LoraConfig(target_modules=["query"], task_type=task)))
        model.save_pretrained(tmp_path / library.__name__)
    ours, theirs = content(tmp_path / "fastpeft"), content(tmp_path / "peft")
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    assert normal(ours["adapter_config.json"]) == normal(theirs["adapter_config.json"])
    loaded = fastpeft.PeftModel.from_pretrained(make(), tmp_path / "peft")
    torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0])
    # loading and saving does not change the config
    loaded.save_pretrained(tmp_path / "again")
    assert normal((tmp_path / "again" / "adapter_config.json").read_bytes()) == normal(ours["adapter_config.json"])


def test_several_adapters_each_in_a_place_of_its_own(llama, tmp_path):
    config = fastpeft.LoraConfig(r=2, target_modules=["q_proj"])
    model = fastpeft.get_peft_model(llama(), config)
    model.add_adapter("other", fastpeft.LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    train(model).save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "other"} <= set(os.listdir(tmp_path))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert sorted(os.listdir(tmp_path / "one")) == ["README.md", "other"]
    with pytest.raises(ValueError, match="invalid `selected_adapters`.*nothing"):
        model.save_pretrained(tmp_path, selected_adapters=["nothing"])
    loaded = fastpeft.PeftModel.from_pretrained(llama(), tmp_path)
    result = loaded.load_adapter(tmp_path, "other", subfolder="other", is_trainable=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert loaded.peft_config["other"].inference_mode is False and loaded.peft_config["default"].inference_mode is True


def test_loading_trains_only_if_asked(llama, adapter):
    frozen = fastpeft.PeftModel.from_pretrained(llama().train(), adapter)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    trained = fastpeft.PeftModel.from_pretrained(llama().train(), adapter, is_trainable=True)
    assert all(p.requires_grad == ("lora_" in n) for n, p in trained.named_parameters())
    frozen.load_adapter(adapter, "more", is_trainable=True)
    assert all(p.requires_grad == (".more." in n) for n, p in frozen.named_parameters())
    frozen.load_adapter(adapter, "default")  # resuming: weights alone, into the adapter that is there


def test_tensors_need_not_be_copied(llama, adapter):
    model = fastpeft.PeftModel.from_pretrained(llama(), adapter, low_cpu_mem_usage=True)
    other = fastpeft.PeftModel.from_pretrained(llama(), adapter)
    assert not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits)


def test_keys_can_be_mapped(llama, adapter):
    weights = fastpeft.load_peft_weights(adapter, key_mapping={r"^model\.layers\.0": "model.layers.9", "^model": "x"})
    assert {key.split(".")[4] for key in weights} == {"9", "1"}
    assert {key.split(".")[2] for key in weights} == {"model", "x"}


@pytest.mark.parametrize("choice", ["auto", True, False])
def test_embeddings_are_saved_if_they_have_to_be(llama, tmp_path, choice):
    names = []
    for library in (fastpeft, peft):
        model = library.get_peft_model(llama(), library.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
        model.save_pretrained(tmp_path / library.__name__, save_embedding_layers=choice)
        names.append(sorted(load_file(tmp_path / library.__name__ / "adapter_model.safetensors")))
    assert names[0] == names[1]
    assert ("base_model.model.model.embed_tokens.base_layer.weight" in names[0]) == (choice is not False)


def test_a_resized_vocabulary_is_saved(llama, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    for library in (fastpeft, peft):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70)
        model = library.get_peft_model(model, library.LoraConfig(target_modules=["q_proj"]))
        with pytest.warns(match="has been resized during finetuning"):
            model.save_pretrained(tmp_path / library.__name__)
        names = set(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
        assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} < names
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    fastpeft.PeftModel.from_pretrained(model, tmp_path / "peft")


def test_a_pickle_is_read_only_when_asked_for(llama, tmp_path, adapter):
    model = fastpeft.PeftModel.from_pretrained(llama(), adapter)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert "adapter_model.safetensors" not in os.listdir(tmp_path / "bin")
    with pytest.raises(fastpeft.AdapterFileError, match="use_safetensors=False"):
        fastpeft.PeftModel.from_pretrained(llama(), tmp_path / "bin")
    loaded = fastpeft.PeftModel.from_pretrained(llama(), tmp_path / "bin", use_safetensors=False)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "bin")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_the_other_format_does_not_stay_to_be_read_instead(llama, adapter):
    model = fastpeft.PeftModel.from_pretrained(llama(), adapter)
    model.save_pretrained(adapter, safe_serialization=False)
    assert sorted(os.listdir(adapter)) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    model.save_pretrained(adapter)
    assert sorted(os.listdir(adapter)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_an_existing_model_card_is_kept(llama, adapter):
    card = adapter / "README.md"
    card.write_text("---\nlicense: mit\ntags: [mine]\n---\n# My adapter\n\nMine.\n")
    fastpeft.PeftModel.from_pretrained(llama(), adapter).save_pretrained(adapter)
    text = card.read_text()
    assert "license: mit" in text and "library_name: peft" in text and "# My adapter\n\nMine." in text
    assert text.rstrip().endswith("### Framework versions\n\n- PEFT 0.21.2")


def test_other_files_stay(llama, adapter):
    (adapter / "trainer_state.json").write_text("{}")
    (adapter / "checkpoint-1").mkdir()
    fastpeft.PeftModel.from_pretrained(llama(), adapter).save_pretrained(adapter)
    assert {"trainer_state.json", "checkpoint-1"} < set(os.listdir(adapter))


def test_only_the_main_process_writes(llama, tmp_path, adapter):
    model = fastpeft.PeftModel.from_pretrained(llama(), adapter)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")


def test_shared_tensors_are_written_twice(llama, tmp_path):
    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    layers = model.base_model.model.model.layers
    shared = layers[0].self_attn.q_proj.lora_A["default"]
    layers[1].self_attn.q_proj.lora_A["default"].weight = shared.weight
    shared.weight.data = shared.weight.data.t().contiguous().t()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight"] for i in (0, 1))
    assert torch.equal(a, b) and torch.equal(a, shared.weight)


def test_a_state_dict_that_was_gathered_is_used(llama, adapter, tmp_path):
    model = fastpeft.PeftModel.from_pretrained(llama(), adapter)
    gathered = {k: v + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "new", state_dict=gathered)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "new"))
    assert all(torch.equal(old[key] + 1, new[key]) for key in old)


def test_state_dicts_of_injected_models_have_no_prefix(llama):
    model = fastpeft.inject_adapter_in_model(fastpeft.LoraConfig(r=2, target_modules=["q_proj"]), llama())
    weights = fastpeft.get_peft_model_state_dict(model)
    assert all(key.startswith("model.layers") for key in weights)
    for keys in (weights, {f"base_model.model.{key}": value for key, value in weights.items()}):
        result = fastpeft.set_peft_model_state_dict(model, {key: value * 0 + 3 for key, value in keys.items()})
        assert not result.missing_keys and not result.unexpected_keys
    assert all((v == 3).all() for v in fastpeft.get_peft_model_state_dict(model).values())


def test_the_base_models_tensors_go_past_the_adapters(llama):
    base = llama()
    keys = list(base.state_dict())
    config = fastpeft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], target_parameters=["o_proj.weight"]
    )
    model = fastpeft.get_peft_model(base, config)
    state = fastpeft.get_base_model_state_dict(model)
    assert list(state) == keys
    state = {key: torch.full_like(value, 2.0) for key, value in state.items()}
    result = fastpeft.set_base_model_state_dict(model, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert all((v == 2).all() for v in fastpeft.get_base_model_state_dict(model).values())
    with pytest.raises(RuntimeError, match="Missing key.*\n.*Unexpected key"):
        fastpeft.set_base_model_state_dict(model, {"x": state.pop("lm_head.weight"), **state})
    assert fastpeft.set_base_model_state_dict(model, {"x": torch.zeros(1)}, strict=False).unexpected_keys == ["x"]


def test_auto_classes_load_base_and_adapter(llama, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = fastpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = fastpeft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = fastpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", torch_dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        fastpeft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        fastpeft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    config.task_type = None
    model.save_pretrained(tmp_path / "no_task")
    loaded = fastpeft.AutoPeftModel.from_pretrained(tmp_path / "no_task")
    assert type(loaded).__name__ == "PeftModel"
    text = (tmp_path / "no_task" / "adapter_config.json").read_text()
    (tmp_path / "no_task" / "adapter_config.json").write_text(text.replace("transformers.models.llama", "os"))
    with pytest.raises(ValueError, match="not in the import allowlist"):
        fastpeft.AutoPeftModel.from_pretrained(tmp_path / "no_task")
