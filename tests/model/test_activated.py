"""aLoRA: the base model up to the invocation tokens, the adapter from there on, in every way a model is run."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastpeft
from fastpeft.tuner.activated import calculate_alora_offsets

INVOCATION = [7, 8]
IDS = torch.tensor([[1, 2, 7, 8, 3, 4], [7, 8, 5, 7, 8, 6], [1, 2, 3, 4, 5, 6]])
OFFSETS = [4, 3, None]


def make(library=fastpeft, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=2, vocab_size=50, **sizes))
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "alora_invocation_tokens": INVOCATION, **options}
    config = library.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return library.get_peft_model(base, config).eval()


def test_offsets():
    configs = {"a": fastpeft.LoraConfig(alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM")}
    configs["b"] = fastpeft.LoraConfig(alora_invocation_tokens=[6], task_type="CAUSAL_LM")
    configs["plain"] = fastpeft.LoraConfig()
    assert calculate_alora_offsets(configs, "a", IDS) == OFFSETS
    assert calculate_alora_offsets(configs, "a", IDS, ["b", "b", "b"]) == [None, 1, 1]
    assert calculate_alora_offsets(configs, "a", IDS, ["a", "plain", "__base__"]) == [4, None, None]
    assert calculate_alora_offsets(configs, "a", IDS[:, :1]) == [None] * 3
    with pytest.warns(UserWarning, match="Adapter 'absent' not found"):
        assert calculate_alora_offsets(configs, "absent", IDS) == [None] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equals_peft(dropout):
    peft = pytest.importorskip("peft")
    ours, theirs = make(lora_dropout=dropout), make(peft, lora_dropout=dropout)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    grads = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-4, msg=name)
    for model in (ours, theirs):
        model.eval()
    tokens = [model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*tokens)


def test_base_model_until_invocation():
    model = make()
    with model.disable_adapter():
        base = model(IDS).logits
    logits = model(IDS).logits
    torch.testing.assert_close(logits[2], base[2])
    torch.testing.assert_close(logits[0, :2], base[0, :2])
    assert (logits[0, 2:] - base[0, 2:]).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(model.get_base_model()(IDS).logits, base)  # nobody says where: nowhere


def test_one_adapter_a_sample():
    model = make()
    model.add_adapter("plain", fastpeft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    names = ["default", "__base__", "plain"]
    mixed = model(IDS, adapter_names=names).logits
    torch.testing.assert_close(mixed[0], model(IDS).logits[0], atol=1e-5, rtol=1e-4)
    model.set_adapter("plain")
    torch.testing.assert_close(mixed[2], model(IDS).logits[2], atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(IDS).logits[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_offsets_of_its_forward(use_reentrant):
    def gradients(checkpointing):
        model = make().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        # two forwards, in which the adapter works in different places, before one backward
        (model(input_ids=IDS, labels=IDS).loss + 2 * model(input_ids=IDS.flip(0), labels=IDS).loss).backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_files(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make().unload(), tmp_path).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_what_cannot_be():
    model = make()
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        model.generate(input_ids=IDS, num_beams=2, max_new_tokens=2)
    with pytest.warns(UserWarning, match="when only inputs_embeds are provided"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    with pytest.raises(ValueError, match="2 offsets were given for a batch of 3"):
        model(IDS, alora_offsets=[1, 2])
    with pytest.raises(ValueError, match="lora.Embedding does not support alora_invocation_tokens"):
        make(target_modules=["embed_tokens"])
