"""A patched model computes what it computed before, on every kind of model and for the layers of both libraries."""

from __future__ import annotations

import pytest
import torch
import transformers
from patch_models import GROUPS, LIBRARIES, MODELS, SIZES, assert_same, groups_of, llama, lora, lora_llama, run, traces
from peft import LoraConfig, inject_adapter_in_model

from fastpeft import patch, report, unpatch


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_patched_model_gives_the_same_logits_and_gradients(name: str, library: str, device: torch.device) -> None:
    model = lora(MODELS[name](), library).to(device).eval()
    before = run(model)
    assert patch(model) is model
    assert groups_of(model) == GROUPS[name]
    assert not report(model).left
    assert_same(run(model), before)
    unpatch(model)
    assert not traces(model)
    after = run(model)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][k], before[1][k]) for k in before[1])


@pytest.mark.parametrize("stack", ["always", "never"])
def test_both_forms_of_the_base_product(stack: str, device: torch.device) -> None:
    model = lora_llama().to(device)
    before = run(model)
    patch(model, stack=stack)
    assert_same(run(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", ["like the base", "fp32"])
def test_low_precision_and_fp32_adapters(dtype: torch.dtype, adapter_dtype: str, device: torch.device) -> None:
    model = lora_llama().to(device=device, dtype=dtype)
    if adapter_dtype == "fp32":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    before = run(model)
    patch(model, stack="always")
    assert not report(model).left and groups_of(model)
    after = run(model)
    # Each replacement was compared with float64 when it was applied; here two layers of rounding may add up.
    assert_same(after, before, tolerance=50 * torch.finfo(dtype).eps)
    assert after[0].dtype == before[0].dtype


def test_biases_and_ranks_that_differ(device: torch.device) -> None:
    config = transformers.Qwen2Config(**SIZES, vocab_size=128, num_key_value_heads=2)
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = lora(model, rank_pattern={"q_proj": 8, "up_proj": 1}, alpha_pattern={"k_proj": 1}).to(device)
    before = run(model)
    for stack in ("always", "never"):
        patch(model, stack=stack)
        assert groups_of(model) == GROUPS["llama"]
        assert_same(run(model), before)


def test_bare_models(device: torch.device) -> None:
    model = llama().to(device)
    before = dict(model.__dict__)
    assert patch(model, blocks="never", loss="never") is model and not traces(model) and model.__dict__ == before
    assert report(model).rows == [] and "nothing to fuse" in str(report(model))

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = inject_adapter_in_model(config, model)
    before = run(model)
    patch(model, stack="always")
    assert groups_of(model) == {("q_proj", "k_proj", "v_proj"): 2}  # k_proj has no adapter and joins
    assert_same(run(model), before)
    patch(model, stack="never")
    assert groups_of(model) == {("q_proj", "k_proj", "v_proj"): 2}  # the norm feeds all three
    patch(model, stack="never", blocks="never")
    assert groups_of(model) == {("q_proj", "v_proj"): 2}  # there it would gain nothing
    assert_same(run(model), before)
    unpatch(model)
    assert not traces(model)
