"""Layers whose adapted weights are lent to the base module for a call: attention and bare parameters."""

from __future__ import annotations

import pytest
import torch
from layer_kinds import Experts, randomise
from torch import nn

import fastpeft.layers as layers
from fastpeft.configs import LoraConfig
from fastpeft.errors import PeftWarning

# Attention


def test_pytorchs_fused_encoder_sees_the_adapter():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    block.self_attn = layers.MultiheadAttention(block.self_attn, "default", LoraConfig(), r=2, lora_alpha=2).eval()
    randomise(block)
    x = torch.randn(2, 3, 8)
    slow = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), slow)
        block.self_attn.merge()
        torch.testing.assert_close(block(x), slow)
        block.self_attn.unmerge()
        block.self_attn.enable_adapters(False)
        assert not torch.allclose(block(x), slow)


def test_attention_shows_what_its_base_shows_and_unloads_to_it():
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    out_proj, x = base.out_proj, torch.randn(2, 3, 8)
    layer = layers.MultiheadAttention(base, "default", LoraConfig(), r=2, lora_alpha=2)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "bias_k", "bias_v"):
        assert getattr(layer, name) == getattr(base, name)
    assert layer.out_proj.weight.shape == out_proj.weight.shape and layer.add_zero_attn is False
    randomise(layer)
    y = layer(x, x, x)[0]
    plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    assert plain is base and plain.out_proj is out_proj
    torch.testing.assert_close(plain(x, x, x)[0], y, rtol=1e-4, atol=1e-4)


def test_attention_says_what_it_cannot_do():
    with pytest.warns(PeftWarning, match="lora_dropout=0.1 has no effect"):
        layer = layers.MultiheadAttention(nn.MultiheadAttention(8, 2), "default", LoraConfig(lora_dropout=0.1), r=2)
    x = torch.randn(3, 2, 8)
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        layer(x, x, x, adapter_names=["default", "default"])
    layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="out_proj"):
        layer(x, x, x)


# Parameters


def nested(r=2):
    base = Experts()
    layer = layers.ParamWrapper(base, "default", "w", LoraConfig(), r=r, lora_alpha=4)
    layer = layers.ParamWrapper(layer, "default", "gate", LoraConfig(), r=r, lora_alpha=4)
    randomise(layer)
    return base, layer


def test_wrappers_around_wrappers_adapt_several_parameters():
    base, layer = nested()
    x = torch.randn(2, 5)
    w, gate = base.w, base.gate
    y = layer(x)
    assert base.w is w and base.gate is gate
    assert layer.lora_A["default"].weight.shape == (2, 5) and layer.base_layer.lora_A["default"].weight.shape == (8, 5)
    plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    assert plain is base
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)


def test_the_parameter_comes_back_when_the_module_raises():
    base, layer = nested()
    w, gate = base.w, base.gate
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 99))
    assert base.w is w and base.gate is gate


def test_one_expert_stored_transposed():
    layer = layers.ParamWrapper(Experts(1, 6, 5, transposed=True), "default", "w", LoraConfig(), r=2, lora_alpha=4)
    randomise(layer)
    x = torch.randn(2, 5)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_eight_bit_parameters_are_summed_in_the_adapters_precision():
    base = Experts()
    base.w = nn.Parameter(base.w.detach().to(torch.float8_e4m3fn), requires_grad=False)
    base.forward = lambda x: base.w
    layer = layers.ParamWrapper(base, "default", "w", LoraConfig(), r=2, lora_alpha=4)
    layer.lora_A.float(), layer.lora_B.float()
    randomise(layer)
    layer.lora_B["default"].weight.data *= 1e4
    w = layer(torch.zeros(1))
    assert w.dtype == torch.float8_e4m3fn and w.float().isfinite().all()
    expected = (base.w.float() + layer.get_delta_weight("default")).clamp(-448, 448)
    torch.testing.assert_close(w.float(), expected, rtol=0.07, atol=0.01)


def test_parameters_say_what_they_cannot_do():
    base, layer = nested()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        layer(torch.randn(1, 5), adapter_names=["default"])
    base.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="1 dimensional Parameter, but only 2d and 3d"):
        layers.ParamWrapper(base, "default", "scale", LoraConfig(), r=2)
    assert "parameter_name='gate'" in repr(layer) and repr(layer).startswith("lora.ParamWrapper(")
