"""LoRA on bitsandbytes' layers, next to PEFT's: outputs, gradients, merging, the weight's exact scales."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.layers import bnb as bnb_layers
from fastpeft.layers.bnb import Linear4bit, Linear8bitLt, kind_of, read_4bit
from fastpeft.ops.nf4 import dequantize_4bit
from fastpeft.ops.weight_norm import weight_norm

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "1"], "init_lora_weights": False}


class Model(nn.Sequential):
    def __init__(self, bits: int, compute: torch.dtype | None, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        if bits == 4:
            make = lambda n, k: bnb.nn.Linear4bit(k, n, compute_dtype=compute, quant_type="nf4")  # noqa: E731
        else:
            make = lambda n, k: bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)  # noqa: E731
        super().__init__(make(128, 64), make(32, 128))  # rows of whole blocks: else bitsandbytes itself errs
        self.to(dtype).to("cpu")
        setattr(self, f"is_loaded_in_{bits}bit", True)


def both(bits: int, compute: torch.dtype | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> list[Any]:
    """The same model and adapter in either library."""
    models = []
    for library in (fastpeft, peft):
        torch.manual_seed(1)
        models.append(library.get_peft_model(Model(bits, compute, dtype), library.LoraConfig(**LORA, **more)))
    return models


def numbers(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *(p for p in model.parameters() if p.requires_grad)])]


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_4bit_equals_peft(compute: torch.dtype | None) -> None:
    ours, theirs = both(4, compute)
    assert type(ours.base_model.model[0]) is Linear4bit and kind_of(ours.base_model.model[0].base_layer) == "4bit"
    assert isinstance(ours.base_model.model[0], peft.tuners.lora.bnb.Linear4bit)
    x = torch.randn(3, 40, 64)
    W = [dequantize_4bit(read_4bit(m.base_layer), torch.float32).double() for m in ours.base_model.model]
    exact = copy.deepcopy(ours)
    for i, m in enumerate(exact.base_model.model):  # the same formula in float64
        plain = nn.Linear(m.in_features, m.out_features).double()
        plain.weight.data, plain.bias.data = W[i], m.base_layer.bias.data.double()
        plain.requires_grad_(False)
        m.base_layer = plain
        m.__class__ = fastpeft.layers.Linear
    exact = exact.double()
    for a, b, c in zip(numbers(ours, x), numbers(theirs, x), numbers(exact, x.double())):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(torch.float32).eps * c.norm()


@pytest.mark.parametrize("name", ["use_dora", "lora_bias", "two adapters", "disabled", "mixed batch"])
def test_the_general_ways_equal_peft(name: str) -> None:
    more = {name: True} if name in ("use_dora", "lora_bias") else {}
    ours, theirs = both(4, **more)
    x = torch.randn(4, 64)
    for model, library in ((ours, fastpeft), (theirs, peft)):
        if name in ("two adapters", "mixed batch"):
            torch.manual_seed(5)
            model.add_adapter("b", library.LoraConfig(**LORA))
        if name == "two adapters":
            model.base_model.set_adapter(["default", "b"])
    if name == "disabled":
        x.requires_grad_()  # without, bitsandbytes takes its way by bf16
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(ours(x), theirs(x))
        return
    if name == "mixed batch":
        which = {"adapter_names": ["default", "b", "__base__", "b"]}
        torch.testing.assert_close(ours.eval()(x, **which), theirs.eval()(x, **which), atol=3e-2, rtol=3e-2)
        return
    for a, b in zip(numbers(ours, x), numbers(theirs, x)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_8bit_behaves_as_under_peft(dora: bool) -> None:
    ours, theirs = both(8, dtype=torch.float16, use_dora=dora)
    assert type(ours.base_model.model[0]) is Linear8bitLt
    x = torch.randn(5, 64).half()
    for a, b in zip(numbers(ours, x), numbers(theirs, x)):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=4e-3)  # a rounding to fp16 more or less
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.merge_adapter()
        theirs.merge_adapter()
        torch.testing.assert_close(ours(x), theirs(x), atol=4e-3, rtol=4e-3)
        ours.unmerge_adapter()
        theirs.unmerge_adapter()
        torch.testing.assert_close(ours(x), theirs(x), atol=4e-3, rtol=4e-3)
        plain = fastpeft.get_peft_model(Model(8, None, torch.float16), fastpeft.LoraConfig(**LORA))
        assert type(plain.merge_and_unload(dequantize=True)[0]) is nn.Linear


def test_the_norms_of_8_bit_weights_are_made_of_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded whole, a weight would be there in fp32 beside its 8 bits, four times their size."""
    layer = both(8, dtype=torch.float16, use_dora=True)[0].base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = weight_norm(layer.dequantized_weight(), A, B, 2.0)
    assert torch.equal(weight_norm(layer.norm_weight(), A, B, 2.0), whole)
    monkeypatch.setattr(bnb_layers, "_PANEL", 10 * layer.in_features)
    panels = [(rows, panel.shape) for rows, panel in layer.norm_weight().panels()]
    assert len(panels) == 13 and panels[-1] == (slice(120, 130), (8, layer.in_features))
    torch.testing.assert_close(weight_norm(layer.norm_weight(), A, B, 2.0), whole, atol=0, rtol=1e-6)
    monkeypatch.setattr(Linear8bitLt, "dequantized_weight", None)
    layer(torch.randn(5, 64).half()).sum().backward()


def test_merging_requantises_as_peft_does_and_says_what_it_lost() -> None:
    ours, theirs = both(4)
    with pytest.warns(UserWarning, match="moved it by .*%"):
        ours.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.merge_adapter()
    for a, b in zip(ours.base_model.model, theirs.base_model.model):
        assert torch.equal(a.base_layer.weight.data, b.base_layer.weight.data)
        assert a.base_layer.weight.quant_state.nested and a.merged
    x = torch.randn(6, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.unmerge_adapter()
    assert not ours.base_model.model[0].merged
    with pytest.warns(UserWarning, match="moved it by"):
        merged = ours.merge_and_unload()
    assert type(merged[0]) is bnb.nn.Linear4bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_16_bits_is_exact(dtype: torch.dtype) -> None:
    ours, _ = both(4, dtype=dtype)
    layer = ours.base_model.model[0]
    want = layer.dequantized_weight().float() + layer.get_delta_weight("default").float()
    merged = ours.merge_and_unload(dequantize=True)
    assert type(merged[0]) is nn.Linear and merged[0].weight.dtype == dtype
    assert torch.equal(merged[0].weight, want.to(dtype)) and not merged[0].weight.requires_grad
    assert not any(type(p).__name__ == "Params4bit" for p in merged.parameters())


def test_merging_of_a_broken_adapter_is_refused() -> None:
    ours, _ = both(4)
    ours.base_model.model[0].lora_B["default"].weight.data[0] = float("nan")
    before = ours.base_model.model[0].base_layer.weight.data.clone()
    with pytest.raises(ValueError, match="NaNs"):
        ours.base_model.model[0].merge(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs"):
        ours.merge_and_unload(safe_merge=True, dequantize=True)
    assert torch.equal(before, ours.base_model.model[0].base_layer.weight.data)


def test_evaluation_keeps_the_exact_scales() -> None:
    """On processors with bf16 arithmetic bitsandbytes repacks a weight in evaluation, and rounds its scales."""
    ours, _ = both(4)
    layer = ours.base_model.model[0]
    before = layer.dequantized_weight()
    ours.eval()
    with torch.no_grad():
        y = ours(torch.randn(2, 64))
        with ours.disable_adapter():
            ours(torch.randn(2, 64))
    assert torch.equal(layer.dequantized_weight(), before) and y.isfinite().all()


def test_a_weight_that_was_repacked_is_read_all_the_same() -> None:
    base = bnb.nn.Linear4bit(64, 128, quant_type="nf4").to("cpu")
    before = dequantize_4bit(read_4bit(base))
    convert = bnb.functional._convert_weight_packed_for_cpu
    base.weight.data, base.weight.quant_state = convert(base.weight.data, base.weight.quant_state)
    with pytest.warns(UserWarning, match="repacked"):
        after = dequantize_4bit(read_4bit(base))
    assert (after - before).norm() / before.norm() < 1e-2


def test_moved_and_replaced_weights_are_read_anew() -> None:
    ours, _ = both(4)
    layer = ours.base_model.model[0]
    first = read_4bit(layer.base_layer)
    assert read_4bit(layer.base_layer) is first
    layer._set_weight(torch.randn(128, 64))
    again = read_4bit(layer.base_layer)
    assert again is not first and again.packed.data_ptr() == layer.base_layer.weight.data_ptr()
