"""`layer_replication`: a deeper model on the weights of a shallower one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import fastpeft

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MAP = [[0, 1], [0, 2], [1, 3]]


def base(kind="llama"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "gpt2":
        return AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50)).eval()
    return AutoModelForCausalLM.from_config(
        LlamaConfig(intermediate_size=64, num_key_value_heads=2, vocab_size=50, **sizes)
    ).eval()


def make(library=fastpeft, layer_map=MAP):
    model = base()
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return library.get_peft_model(model, library.LoraConfig(layer_replication=layer_map, **options)).eval()


def test_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = make(), make(peft)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path)
    for library in (peft, fastpeft):
        again = library.PeftModel.from_pretrained(base(), tmp_path).eval()
        torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-4)


def test_weights_are_shared_and_adapters_are_not():
    model = make()
    layers = model.get_base_model().model.layers
    assert len(layers) == model.config.num_hidden_layers == 5
    q = [layer.self_attn.q_proj for layer in layers]
    assert [q[0].base_layer.weight is other.base_layer.weight for other in q] == [True, True, False, False, False]
    assert q[2].base_layer.weight is q[3].base_layer.weight
    assert len({id(other.lora_A["default"].weight) for other in q}) == 5
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)  # every layer has its place in the cache
    uncached = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(tokens, uncached)


def test_gpt2():
    model = base("gpt2")
    config = fastpeft.LoraConfig(layer_replication=[[0, 3], [2, 3]], target_modules=["c_attn"], fan_in_fan_out=True)
    model = fastpeft.get_peft_model(model, config)
    assert len(model.get_base_model().transformer.h) == 4
    model(IDS).logits.sum().backward()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="Cannot merge LORA layers when base model layers are replicated"):
        make().merge_and_unload()
    with pytest.raises(ValueError, match=r"\[2, 9\] is no range of the model's 3 layers"):
        make(layer_map=[[2, 9]])
    with pytest.raises(ValueError, match="Could not locate the layers"):
        net = torch.nn.Sequential(torch.nn.Linear(4, 4))
        fastpeft.get_peft_model(net, fastpeft.LoraConfig(layer_replication=MAP, target_modules=["0"]))
    model = base()
    with pytest.raises(ValueError, match="absent"):
        fastpeft.get_peft_model(model, fastpeft.LoraConfig(layer_replication=MAP, target_modules=["absent"]))
    assert len(model.model.layers) == model.config.num_hidden_layers == 3  # the failure left the model as it was
    other = fastpeft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 3]])
    with pytest.raises(ValueError, match="replicated when the first adapter is made"):
        make().add_adapter("other", other)
