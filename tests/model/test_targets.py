"""Which modules a config names: the same as in PEFT, for any names and patterns."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastpeft
from fastpeft.tuner.constants import LORA_TARGET_MODULES
from fastpeft.tuner.inject import _Names, _no_match_message
from fastpeft.tuner.targets import (
    EXCLUDED,
    TargetMatcher,
    check_target_module_exists,
    find_minimal_target_modules,
    include_all_linear_layers,
    pattern_key,
)
from fastpeft.tuner.walk import adapter_layers, named_modules

peft_utils = pytest.importorskip("peft.tuners.tuners_utils")

PARTS = ["layers", "h", "0", "1", "11", "q_proj", "proj", "mlp", "experts", "lm_head", "x_proj"]
names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
patterns = st.sampled_from([r".*q_proj", r".*\.(q_proj|mlp)", r"layers\.\d+\..*", r".*", "mlp", r"(.*)\.1\.(.*)"])
name_lists = st.lists(names, max_size=4)
options = st.fixed_dictionaries(
    {
        "target_modules": st.one_of(name_lists.map(set), patterns),
        "exclude_modules": st.one_of(st.none(), name_lists, patterns),
        "modules_to_save": st.one_of(st.none(), st.lists(st.sampled_from(PARTS), max_size=2)),
        "layers_to_transform": st.one_of(
            st.none(), st.integers(0, 11), st.lists(st.sampled_from([0, 1, 11]), max_size=2)
        ),
        "layers_pattern": st.sampled_from([None, "", [], "layers", ["h", "layers"], [r"\d+\.layers"]]),
        "target_parameters": st.none(),
    }
)


@settings(max_examples=400, deadline=None)
@given(key=names, fields=options)
def test_matching_is_pefts(key, fields):
    config = SimpleNamespace(**fields)
    theirs = peft_utils.check_target_module_exists(config, key)
    ours = check_target_module_exists(config, key)
    assert bool(ours) == bool(theirs)
    assert (ours is EXCLUDED) == isinstance(theirs, peft_utils._ExcludedModule)


@settings(max_examples=200, deadline=None)
@given(targets=st.sets(names, min_size=1, max_size=8), others=st.sets(names, max_size=8))
def test_condensed_targets_are_pefts_and_mean_the_same(targets, others):
    suffixes = tuple(f".{name}" for name in targets)  # what the list itself hits by suffix is a target too
    others = {name for name in others if name not in targets and not name.endswith(suffixes)}
    ours = find_minimal_target_modules(targets, others)
    assert ours == peft_utils._find_minimal_target_modules(targets, others)
    matcher = TargetMatcher(SimpleNamespace(target_modules=ours, target_parameters=None))
    assert all(matcher(name) for name in targets)
    assert not any(matcher(name) for name in others)


@pytest.mark.parametrize(
    ("targets", "others", "message"),
    [
        ("foo", ["bar"], "list or set of strings"),
        ([], ["bar"], "list or set of strings"),
        (["", "foo"], ["bar"], "empty string"),
        (["foo"], ["foo", "bar"], "common elements"),
    ],
)
def test_condensing_refuses_what_has_no_meaning(targets, others, message):
    with pytest.raises(ValueError, match=message):
        find_minimal_target_modules(targets, others)


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.sampled_from(["q_proj", "layers.1", r"\d+.q_proj", "^q_proj", r"h\..*", "mlp"])), key=names)
def test_rank_pattern_keys_are_pefts(keys, key):
    from peft.utils.other import get_pattern_key

    assert pattern_key(keys, key) == get_pattern_key(keys, key)


def tiny(model_type: str, auto: str = "AutoModel"):
    """A tiny model of an architecture from its config."""
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 32,
        "d_model": 32,
        "d_ff": 32,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
        "num_local_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "rotary_dim": 8,
        "pad_token_id": 0,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    }
    default = transformers.AutoConfig.for_model(model_type)
    fixed = {name for name in sizes if isinstance(getattr(type(default), name, None), property)}
    known = {name: size for name, size in sizes.items() if hasattr(default, name) and name not in fixed}
    config = transformers.AutoConfig.for_model(model_type, **known)
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(config)


ARCHITECTURES = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite smollm3 starcoder2 stablelm cohere glm4
    gpt_neox gpt2 opt falcon bloom gptj mixtral qwen3_moe bert roberta t5 vit
"""


@pytest.mark.parametrize("model_type", ARCHITECTURES.split())
def test_default_targets_exist_in_the_architecture(model_type):
    model = fastpeft.get_peft_model(tiny(model_type), fastpeft.LoraConfig(r=2))
    assert model.targeted_module_names


def test_default_targets_include_pefts_table():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    assert {k: LORA_TARGET_MODULES.get(k) for k in THEIRS} == dict(THEIRS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5", "bert", "gpt_neox", "falcon"])
def test_all_linear_is_pefts(model_type):
    auto = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification"}.get(
        model_type, "AutoModelForCausalLM"
    )
    task = "SEQ_CLS" if model_type == "bert" else None
    model = tiny(model_type, auto)
    ours = SimpleNamespace(target_modules="ALL-Linear", task_type=task)
    theirs = SimpleNamespace(target_modules="all-linear", task_type=task)
    include_all_linear_layers(ours, model)
    peft_utils._maybe_include_all_linear_layers(theirs, model)
    assert ours.target_modules == theirs.target_modules
    # once more in the adapted model: nothing inside of adapters
    config = fastpeft.LoraConfig(r=2, target_modules="all-linear", task_type=task)
    before = set(ours.target_modules)
    adapted = fastpeft.get_peft_model(model, config)
    again = SimpleNamespace(target_modules="all-linear", task_type=task)
    include_all_linear_layers(again, adapted.get_base_model())
    assert again.target_modules == before


def test_walk_sees_what_named_modules_sees_outside_of_adapters(llama):
    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(r=2, target_modules="all-linear"))
    inside = re.compile(r"\.(lora_|base_layer$)")
    expected = [name for name, _ in model.named_modules() if not inside.search(name)]
    assert [name for name, _ in named_modules(model) if not name.endswith("base_layer")] == expected
    assert len(list(adapter_layers(model))) == 14


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["lin7"]}, r"Target modules .*lin7.* not found .* lin1, lin0"),
        ({"target_modules": ["lin0"], "exclude_modules": ".*"}, "All modules were excluded"),
        ({"target_modules": ["lin9"], "exclude_modules": ["lin0"]}, "No modules were targeted for adaptation"),
        ({"target_modules": ["lin0"], "modules_to_save": ["lin0"]}, "No modules were targeted .*modules_to_save"),
        (
            {"target_modules": ["in0"], "layers_to_transform": [7]},
            r"not found .*'layers_to_transform': \[7\]",
        ),
        ({"target_modules": [], "target_parameters": ["lin9.weight"]}, "No `target_modules` passed but also no"),
        ({}, "Please specify `target_modules`"),
    ],
)
def test_no_match_names_the_option(mlp, fields, message):
    with pytest.raises(ValueError, match=message):
        fastpeft.get_peft_model(mlp, fastpeft.LoraConfig(**fields))
    assert type(mlp.lin0) is nn.Linear


def test_no_match_is_an_error_of_its_own(mlp):
    with pytest.raises(fastpeft.NoMatchingPeftModuleError):
        fastpeft.get_peft_model(mlp, fastpeft.LoraConfig(target_modules=["nothing"]))
    names_ = _Names(fastpeft.LoraConfig(target_modules=["lin_0"]), ["lin0"])
    assert "lin0" in _no_match_message(fastpeft.LoraConfig(target_modules=["lin_0"]), names_)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude_modules": ["nothing"]}, "no modules were excluded"),
        ({"rank_pattern": {"nothing": 3}}, r"rank_pattern keys did not match .*nothing"),
        ({"alpha_pattern": {"nothing": 3}}, r"alpha_pattern keys did not match .*nothing"),
        ({"target_parameters": ["nothing.weight"]}, "no parameter was matched"),
    ],
)
def test_options_without_effect_are_warned_about(mlp, fields, message):
    with pytest.warns(match=message):
        fastpeft.get_peft_model(mlp, fastpeft.LoraConfig(target_modules=["lin0"], **fields))


def test_unsupported_module_is_named(mlp):
    with pytest.raises(ValueError, match=r"ReLU\(\) is not supported.*torch.nn.Linear"):
        fastpeft.get_peft_model(mlp, fastpeft.LoraConfig(target_modules=["lin0", "relu"]))


def test_many_full_names_are_condensed(deep):
    big = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(12))
    config = fastpeft.LoraConfig(r=2, target_modules=[f"{i}.q" for i in range(12)] + [f"{i}.v" for i in range(12)])
    model = fastpeft.get_peft_model(big, config)
    assert model.peft_config["default"].target_modules == {"q", "v"}


def test_tied_embedding_is_warned_about(llama):
    with pytest.warns(match="tied layer is part of the adapter"):
        fastpeft.get_peft_model(
            llama(tie_word_embeddings=True), fastpeft.LoraConfig(r=2, target_modules=["embed_tokens"])
        )


def test_mamba_kernels_are_refused(mlp):
    mlp.config = SimpleNamespace(model_type="mamba")
    mlp.out_proj = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        fastpeft.get_peft_model(mlp, fastpeft.LoraConfig(target_modules=["lin0", "out_proj"]))
    assert type(mlp.lin0) is nn.Linear
