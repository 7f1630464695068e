"""Putting adapters in: the tensors PEFT would make, nothing half done, nothing more expensive than it has to be."""

from __future__ import annotations

import copy
import gc
import sys
import warnings

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig, get_peft_model, inject_adapter_in_model

peft = pytest.importorskip("peft")


def state(model: nn.Module) -> dict:
    """Everything that must not change when adapting fails."""
    return {
        "modules": [(name, type(m)) for name, m in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "config": "peft_config" in model.__dict__,
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def pair(make, config: dict, **options):
    """The same model adapted by fastpeft and by PEFT, from the same seed."""
    models = []
    for library in (fastpeft, peft):
        model = make()
        torch.manual_seed(1)
        models.append(library.get_peft_model(model, library.LoraConfig(**config), **options))
        models[-1].random_state_after = torch.get_rng_state()
    return models


CONFIGS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 7, "use_rslora": True},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "bias": "lora_only"},
    {"target_modules": ["k_proj"], "init_lora_weights": False, "lora_bias": False, "bias": "all"},
    {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"v_proj": 2, "^model.layers.1": 5}},
    {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {r"layers\.0\..*": 3}, "lora_dropout": 0.1},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head", "norm"]},
    {"target_modules": ["o_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "inference_mode": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_same_seed_same_model_as_peft(llama, config):
    ours, theirs = pair(llama, config)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (ours, theirs)]
    assert flags[0] == flags[1]
    assert torch.equal(*(m.random_state_after for m in (ours, theirs)))  # and what is drawn next is the same too
    mine, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.target_modules == other.target_modules
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert ours.targeted_parameter_names == theirs.targeted_parameter_names


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_are_trained_whole(llama, task):
    import transformers

    cls = {
        "SEQ_CLS": transformers.LlamaForSequenceClassification,
        "TOKEN_CLS": transformers.LlamaForTokenClassification,
        "QUESTION_ANS": transformers.LlamaForQuestionAnswering,
    }[task]
    config = {"target_modules": ["q_proj"], "task_type": task}
    ours, theirs = pair(lambda: llama(cls=cls), config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert "modules_to_save.default" in " ".join(n for n, p in ours.named_parameters() if p.requires_grad)
    # "all-linear" must leave the head alone as well
    get_peft_model(llama(cls=cls), LoraConfig(target_modules="all-linear", task_type=task))


def test_a_failure_half_way_leaves_nothing_behind(llama):
    model = llama()
    before = state(model)
    config = LoraConfig(target_modules=["q_proj", "norm"], modules_to_save=["lm_head"])  # a norm cannot be adapted
    fields = copy.deepcopy(config.__dict__)
    with pytest.raises(ValueError, match="LlamaRMSNorm.* is not supported"):
        get_peft_model(model, config)
    assert state(model) == before
    assert config.__dict__ == {**fields, "base_model_name_or_path": config.base_model_name_or_path}
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_a_failing_second_adapter_leaves_the_first_as_it_was(llama):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    before = state(model)
    with pytest.raises(ValueError, match="is not supported"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj", "norm"]))
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        model.add_adapter("other", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head", "q_proj"]))
    assert state(model) == before
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert model.targeted_module_names == [n for n in model.targeted_module_names if n[-6:] in ("q_proj", "v_proj")]
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj"]))


def test_a_further_adapter_changes_nothing_that_was_there(llama):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    special = model.base_model.model.model.layers[0].mlp.up_proj.weight
    special.requires_grad = True  # the user's own choice
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter(
        "other", LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], bias="all")
    )
    after = {n.replace("base_layer.", ""): p.requires_grad for n, p in model.named_parameters() if ".other." not in n}
    assert after == {n.replace("base_layer.", ""): flag for n, flag in before.items()}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} >= {"other"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)


def test_conflicting_adapters_are_refused(mlp):
    model = get_peft_model(mlp, LoraConfig(target_modules=["lin0"], bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", LoraConfig(target_modules=["lin0"], bias="lora_only"))
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", LoraConfig(target_modules=["lin0"]))
    with pytest.warns(match="should not be contained in the prefix"):
        model.add_adapter("lora", LoraConfig(target_modules=["lin0"]))


def test_adapting_twice_warns(mlp):
    model = get_peft_model(mlp, LoraConfig(target_modules=["lin0"])).get_base_model()
    with pytest.warns(match="for a second time"):
        again = get_peft_model(model, LoraConfig(target_modules=["lin1"]), adapter_name="second")
    assert list(again.peft_config) == ["default", "second"] and again.active_adapters == ["second"]


def test_injection_from_a_state_dict(mlp):
    weights = fastpeft.get_peft_model_state_dict(
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin1"]), copy.deepcopy(mlp))
    )
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['lin0'\].*additional.*\['lin1'\]"):
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), mlp, state_dict=weights)
    assert type(model.lin0) is nn.Linear and hasattr(model.lin1, "lora_A")
    result = fastpeft.set_peft_model_state_dict(model, weights)
    assert not result.missing_keys and not result.unexpected_keys
    with pytest.raises(ValueError, match="uses `target_parameters`"):
        inject_adapter_in_model(LoraConfig(target_parameters=["lin0.weight"]), Plain(), state_dict=weights)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(3, 3)


def test_weights_can_wait_on_the_meta_device(mlp):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0"]), mlp, low_cpu_mem_usage=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
    assert {p.device.type for n, p in model.named_parameters() if "lora_" not in n} == {"cpu"}


def test_half_precision_models_get_float32_adapters(llama):
    model = llama().to(torch.bfloat16)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.bfloat16}


def test_custom_layers_are_used(mlp):
    from fastpeft.layers import Linear

    class Mine(Linear):
        pass

    config = LoraConfig(r=2, target_modules=["lin0"])
    config._register_custom_module({nn.Linear: Mine})
    assert type(get_peft_model(mlp, config).base_model.model.lin0) is Mine


def test_the_user_may_change_the_model(llama):
    """No index of layers that could go stale: a replaced block, a layer that is new."""
    model = get_peft_model(llama(3), LoraConfig(target_modules=["q_proj"]))
    inner = model.get_base_model()
    inner.model.layers[1].self_attn.q_proj = nn.Linear(32, 32)
    inner.model.layers[2] = copy.deepcopy(inner.model.layers[0])
    with model.disable_adapter():
        assert [layer.self_attn.q_proj for layer in inner.model.layers][2].disable_adapters
        assert model.get_model_status().enabled is False
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert model.get_model_status().num_adapter_layers == 3
    model.set_adapter("other")
    assert inner.model.layers[2].self_attn.q_proj.active_adapters == ["other"]


# ---- cost: counted, since seconds depend on the machine -------------------------------------------------------------


def calls(function) -> int:
    """How many Python functions are called."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    function()  # warm caches
    gc.collect()
    gc.disable()  # what other tests left to finalise is not the function's
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_disable_adapter_makes_few_calls_and_does_not_grow(llama):
    model = get_peft_model(llama(16), LoraConfig(r=2, target_modules="all-linear"))  # 112 layers

    def switch():
        with model.disable_adapter():
            pass

    one = calls(switch)
    for i in range(4):
        model.add_adapter(f"a{i}", LoraConfig(r=2, target_modules="all-linear"))
    assert one < 24 * 112
    assert calls(switch) <= one + 20


def test_add_adapter_does_not_grow_with_the_adapters_there(llama):
    model = get_peft_model(llama(8), LoraConfig(r=2, target_modules="all-linear"))
    names = iter(range(100))

    def add():
        model.add_adapter(f"a{next(names)}", LoraConfig(r=2, target_modules="all-linear"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        early = calls(add)
        for _ in range(6):
            add()
        late = calls(add)
    assert late < 1.25 * early  # what grows is a loop over the adapters' flags
