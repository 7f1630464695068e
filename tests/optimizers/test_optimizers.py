"""LoRA+ and LoRA-FA are PEFT's: the same parameter groups, the same steps."""

from __future__ import annotations

import bitsandbytes
import peft
import peft.optimizers
import pytest
import torch
import transformers
from torch import nn

import fastpeft
from fastpeft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")


def model(library, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    base = transformers.LlamaForCausalLM(config)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    return library.get_peft_model(base, library.LoraConfig(**(settings | options)))


def trained(model, optimizer, steps=4):
    ids = torch.arange(40).view(2, 20)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only"},
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm", "lm_head"]},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit])
def test_loraplus_equals_peft(options, cls):
    arguments = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}
    results, groups = [], []
    for library, create in (
        (peft, peft.optimizers.create_loraplus_optimizer),
        (fastpeft, create_loraplus_optimizer),
    ):
        adapted = model(library, **options)
        names = {id(p): name for name, p in adapted.named_parameters()}
        optimizer = create(adapted, cls, **arguments)
        groups.append(
            [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        )
        results.append(trained(adapted, optimizer))
    assert groups[0] == groups[1]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_lorafa_equals_peft(options):
    results = []
    for library, create in ((peft, peft.optimizers.create_lorafa_optimizer), (fastpeft, create_lorafa_optimizer)):
        adapted = model(library, **options)
        before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
        optimizer = create(adapted, r=4, lora_alpha=6, lr=1e-2, weight_decay=0.1)
        results.append(trained(adapted, optimizer))
        assert all(torch.equal(results[-1][n], v) for n, v in before.items() if "lora_B" not in n)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_lorafa_says_what_contradicts_the_config():
    with pytest.raises(ValueError, match="use_rslora=True"):
        create_lorafa_optimizer(model(fastpeft), r=4, lora_alpha=6, lr=1e-2, use_rslora=True)
    with pytest.raises(ValueError, match="learning rate"):
        fastpeft.optimizers.LoraFAOptimizer([nn.Parameter(torch.ones(1))], lr=-1.0)
