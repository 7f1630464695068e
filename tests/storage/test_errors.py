"""A file that cannot be used is named, with the reason, and the model stays as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import AdapterFileError, PeftModel

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def state(model) -> dict:
    return {
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "values": sum(float(p.detach().double().abs().sum()) for p in model.parameters()),
        "training": [m.training for m in model.modules()],
        "config": "peft_config" in model.__dict__,
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "pretraining_tp": getattr(model.config, "pretraining_tp", None),
    }


def check(make, directory, message, error=AdapterFileError, **options):
    """Neither a new model nor one with adapters may be changed by loading from `directory`."""
    model = make().train()
    before = state(model)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, directory, **options)
    assert state(model) == before

    config = fastpeft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], modules_to_save=["lm_head"])
    model = fastpeft.get_peft_model(model, config)
    before, keys = state(model), list(model.state_dict())
    with pytest.raises(error, match=message):
        model.load_adapter(directory, "new", is_trainable=True, **options)
    assert state(model) == before and list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]


@pytest.fixture
def edit(adapter):
    """Changes the tensors of the saved adapter."""

    def apply(change):
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_file(llama, adapter, keep):
    data = (adapter / WEIGHTS).read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    (adapter / WEIGHTS).write_bytes(data[:size])
    check(llama, adapter, rf"{WEIGHTS} cannot be read: .*damaged or incomplete \(its size is \d+ bytes\)")


def test_garbage(llama, adapter):
    (adapter / WEIGHTS).write_bytes(os.urandom(500))
    check(llama, adapter, "cannot be read")


def test_a_wrong_shape(llama, adapter, edit):
    edit(lambda t: t.update({KEY: t[KEY][:, :-1].clone()}))
    message = rf"size mismatch for {KEY}: .*{WEIGHTS} has shape \(4, 31\), the model expects \(4, 32\)"
    check(llama, adapter, message)
    check(llama, adapter, message, error=RuntimeError)  # what PEFT's callers catch
    with pytest.warns(match=r"found shape \(4, 31\) in the checkpoint and \(4, 32\)"):
        model = PeftModel.from_pretrained(llama(), adapter, ignore_mismatched_sizes=True)
    expected = load_file(adapter / WEIGHTS)
    expected.pop(KEY)
    loaded = fastpeft.get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_a_missing_key(llama, adapter, edit):
    edit(lambda t: t.pop(KEY))
    check(llama, adapter, rf"{WEIGHTS} lacks 1 tensor\(s\) that the adapter needs: .*q_proj.lora_A.* strict=False")
    with pytest.warns(match="Found missing adapter keys while loading the checkpoint: .*q_proj.lora_A"):
        model = PeftModel.from_pretrained(llama(), adapter, strict=False)
    result = model.load_adapter(adapter, "other", strict=False)
    assert [key.split(".")[-3:] for key in result.missing_keys] == [["lora_A", "other", "weight"]]


def test_an_unexpected_key(llama, adapter, edit):
    edit(lambda t: t.update({KEY.replace("q_proj", "x_proj"): torch.zeros(2), "odd": torch.zeros(1)}))
    check(llama, adapter, r"has 2 tensor\(s\) that the model has no place for: base_model.*x_proj.*, odd")
    model = PeftModel.from_pretrained(llama(), adapter, strict=False)
    assert len(model.load_adapter(adapter, "other", strict=False).unexpected_keys) == 2


def test_another_models_adapter(llama, adapter):
    def other():
        torch.manual_seed(0)
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))

    with pytest.raises(fastpeft.NoMatchingPeftModuleError, match="not found in the base model"):
        PeftModel.from_pretrained(other(), adapter)


def test_no_weights(llama, adapter):
    os.remove(adapter / WEIGHTS)
    check(llama, adapter, rf"Can't find weights: {WEIGHTS} is not in ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ('{"r": 4}', "peft_type"),
        ('{"peft_type": "NONSENSE"}', "peft_type='NONSENSE' is not the name of an adapter method"),
    ],
)
def test_a_damaged_config(llama, adapter, text, message):
    (adapter / "adapter_config.json").write_text(text)
    check(llama, adapter, message)


def test_a_method_that_is_not_implemented(llama, adapter):
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 4}')
    check(llama, adapter, "'LOHA' is a method of PEFT that fastpeft does not implement", error=NotImplementedError)


@pytest.mark.parametrize(("field", "value", "error"), [("r", -1, ValueError), ("target_modules", ["norm"], ValueError)])
def test_a_config_that_does_not_fit(llama, adapter, field, value, error):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    check(llama, adapter, ".", error=error)


def test_no_adapter_at_all(llama, tmp_path):
    check(llama, tmp_path / "nothing", "Can't find 'adapter_config.json' at .*nothing")
    check(llama, tmp_path, "Can't find 'adapter_config.json'")


def test_a_hub_id_offline(llama):
    check(llama, "nobody/nothing", "Can't find 'adapter_config.json' at 'nobody/nothing'.*Hub said")
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors of nobody/nothing cannot be had"):
        fastpeft.load_peft_weights("nobody/nothing")


def test_a_hub_id_in_the_cache(llama, adapter, tmp_path):
    """Offline, an adapter that was downloaded before is found."""
    snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / "abc" / "sub"
    shutil.copytree(adapter, snapshot)
    (tmp_path / "hub" / "models--me--mine" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--mine" / "refs" / "main").write_text("abc")
    options = {"cache_dir": str(tmp_path / "hub"), "subfolder": "sub"}
    model = PeftModel.from_pretrained(llama(), "me/mine", **options)
    direct = PeftModel.from_pretrained(llama(), adapter)
    a, b = map(fastpeft.get_peft_model_state_dict, (model, direct))
    assert all(torch.equal(a[key], b[key]) for key in b)


class Evil:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_code(llama, adapter, tmp_path):
    os.remove(adapter / WEIGHTS)
    with open(adapter / "adapter_model.bin", "wb") as file:
        pickle.dump({"x": Evil(tmp_path / "evil")}, file)
    check(llama, adapter, "adapter_model.bin: pass use_safetensors=False")
    check(llama, adapter, "adapter_model.bin cannot be read", use_safetensors=False)
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], adapter / "adapter_model.bin")
    check(llama, adapter, "does not hold a dictionary of named tensors", use_safetensors=False)


def test_arguments_without_effect_are_said(llama, adapter):
    with pytest.warns(match="nonsense have no effect on an adapter"):
        PeftModel.from_pretrained(llama(), adapter, nonsense=1)
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload"):
        PeftModel.from_pretrained(llama(), adapter, ephemeral_gpu_offload=True)
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(llama(), adapter, config={})


def test_a_state_dict_of_the_wrong_shape_is_not_half_loaded(llama):
    model = fastpeft.inject_adapter_in_model(fastpeft.LoraConfig(r=2, target_modules=["q_proj"]), llama())
    weights = {k: v + 1 for k, v in fastpeft.get_peft_model_state_dict(model).items()}
    weights["model.layers.1.self_attn.q_proj.lora_B.weight"] = torch.zeros(3)
    before = state(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastpeft.set_peft_model_state_dict(model, weights)
    assert state(model) == before
