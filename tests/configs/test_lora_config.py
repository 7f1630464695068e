"""The configs: PEFT's files, byte for byte, its checks, and an error for what is not implemented."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest

import fastpeft.configs as configs
from fastpeft.configs import CONFIG_NAME, LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType
from fastpeft.configs.lora import UNIMPLEMENTED
from fastpeft.errors import AdapterFileError, UnsupportedOptionError

CONFIGS = [
    {},
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "modules_to_save": ["score"]},
    {"target_modules": "all-linear", "task_type": TaskType.SEQ_CLS, "inference_mode": True, "revision": "main"},
    {"target_modules": r".*\.(q|v)$", "rank_pattern": {"^a.b": 4}, "alpha_pattern": {"c": 3}, "use_rslora": True},
    {"target_modules": ["q"], "layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["x"]},
    {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "init_lora_weights": False},
    {"init_lora_weights": "gaussian", "bias": "lora_only", "lora_dropout": 0.1, "fan_in_fan_out": True},
    {"lora_bias": True, "auto_mapping": {"base_model_class": "M"}, "base_model_name_or_path": "é/ü"},
]

# One value that asks for each thing of the table; a new row needs one.
ASKING = {
    "use_dora": True,
    "velora_config": {"num_groups": 4},
    "kasa_config": {},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "qalora_group_size": 8,
    "monteclora_config": {},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "layer_replication": [(0, 2), (1, 3)],
    "trainable_token_indices": [0, 1],
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "ensure_weight_tying": True,
    "runtime_config.ephemeral_gpu_offload": LoraRuntimeConfig(ephemeral_gpu_offload=True),
}


def text(config, folder):
    config.save_pretrained(folder)
    return (folder / CONFIG_NAME).read_text()


@pytest.mark.parametrize("options", CONFIGS)
def test_files_are_pefts_in_both_directions(options, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = text(LoraConfig(**options), tmp_path / "ours"), text(peft.LoraConfig(**options), tmp_path / "theirs")
    assert ours == theirs
    loaded = LoraConfig.from_pretrained(tmp_path / "theirs")
    assert loaded == LoraConfig(**options)
    assert text(loaded, tmp_path / "again") == theirs
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").to_dict() == loaded.to_dict()


@pytest.mark.parametrize(
    "name",
    [name for name in configs.__all__ if name.endswith("Config") and not name.startswith("Peft")],
)
def test_fields_order_and_defaults_are_pefts(name):
    peft = pytest.importorskip("peft")
    import peft.tuners.lora.config as their_module

    theirs = getattr(their_module, name, None) or getattr(peft, name)
    ours = getattr(configs, name)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert dataclasses.asdict(ours()) == dataclasses.asdict(theirs())
    assert repr(ours()) == repr(theirs())


def test_types_are_pefts():
    peft = pytest.importorskip("peft")
    assert [t.value for t in PeftType] == [t.value for t in peft.PeftType]
    assert [t.value for t in TaskType] == [t.value for t in peft.TaskType]
    assert {PeftType.LORA: 1}[peft.PeftType.LORA] == 1  # either is a key of a table of the other


@pytest.mark.parametrize("row", UNIMPLEMENTED)
def test_what_is_not_implemented_raises_and_names_the_field(row):
    field, _, value = row.partition("=")
    options = {field.split(".")[0]: value or ASKING[row]}
    with pytest.raises(UnsupportedOptionError, match=field.replace(".", r"\.")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LoraConfig(**options)


def test_what_is_not_implemented_may_be_given_its_default():
    LoraConfig(**{f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)})


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "FORTUNE_TELLING"},
        {"target_modules": ".*foo", "layers_to_transform": [0]},
        {"target_modules": ".*foo", "layers_pattern": ["bar"]},
        {"target_modules": ["a"], "layers_pattern": "bar"},
        {"target_parameters": "experts"},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"lora_bias": True, "use_dora": True},
        {"use_dora": True, "megatron_config": {"a": 1}},
        {"eva_config": {"rho": 0.5}},
        {"eva_config": 3},
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}},
    ],
)
def test_contradictions_raise_what_peft_raises(options):
    peft = pytest.importorskip("peft")
    with pytest.raises((ValueError, TypeError)) as theirs:
        peft.LoraConfig(**options)
    with pytest.raises(theirs.type) as ours:
        LoraConfig(**options)
    assert str(ours.value) == str(theirs.value)


def test_an_unknown_initialisation_is_named():
    with pytest.raises(ValueError, match="Unknown initialization.*'gausian'.*'gaussian'"):
        LoraConfig(init_lora_weights="gausian")


def test_lists_of_modules_become_sets():
    config = LoraConfig(target_modules=["a", "b", "a"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}


def test_keys_of_a_later_version_are_dropped_with_a_warning(tmp_path):
    LoraConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "foobar": 1, "spam": 2}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['foobar', 'spam'\] for class LoraConfig"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig) and config.r == 3 and not hasattr(config, "spam")


def test_a_runtime_config_in_a_file_is_ignored(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "runtime_config": {"ephemeral_gpu_offload": True}}))
    with pytest.warns(UserWarning, match="runtime_config"):
        assert LoraConfig.from_pretrained(tmp_path) == LoraConfig()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ('{"r": 8', AdapterFileError, "adapter_config.json.*not valid JSON"),
        ("[1, 2]", AdapterFileError, "adapter_config.json.*list.*peft_type"),
        ('{"peft_type": "MAGIC"}', AdapterFileError, "adapter_config.json.*'MAGIC'.*LORA"),
        ('{"peft_type": "VERA"}', UnsupportedOptionError, "adapter_config.json.*'VERA'.*LORA"),
        ('{"foo": 1}', TypeError, "missing required keys: {'peft_type'}"),
    ],
)
def test_a_file_that_is_no_adapter_config_says_what_is_wrong(content, error, words, tmp_path):
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(error, match=words):
        LoraConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_a_value_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at"):
        LoraConfig.from_pretrained(tmp_path)


def test_a_subfolder_is_found(tmp_path):
    LoraConfig(r=5).save_pretrained(tmp_path / "best")
    assert LoraConfig.from_pretrained(tmp_path, subfolder="best").r == 5
    assert LoraConfig._get_peft_type(tmp_path, subfolder="best") == "LORA"


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    LoraConfig(r=5).save_pretrained(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        LoraConfig(r=6).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [CONFIG_NAME]
    assert LoraConfig.from_pretrained(tmp_path).r == 5


def test_a_saved_file_has_the_users_permissions(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / CONFIG_NAME).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_in_the_way_of_the_directory_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="should be a directory"):
        LoraConfig().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(how):
    config = LoraConfig(target_modules=["a"], rank_pattern={"a": 2})
    assert how(config) == config


def test_configs_pass_as_pefts():
    peft = pytest.importorskip("peft")
    assert isinstance(LoraConfig(), peft.LoraConfig) and isinstance(LoraConfig(), peft.PeftConfig)


def test_custom_layers_are_registered_and_not_saved():
    config = LoraConfig()
    config._register_custom_module({int: str})
    config._register_custom_module({float: bytes})
    assert config._custom_modules == {int: str, float: bytes}
    assert "_custom_modules" not in config.to_dict()


def test_importing_the_configs_imports_nothing_heavy():
    code = (
        "import sys, fastpeft.configs; "
        "bad = {'torch', 'transformers', 'peft', 'triton', 'huggingface_hub'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
