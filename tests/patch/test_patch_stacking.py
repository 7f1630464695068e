"""Base weights that lie side by side are still ordinary, separate weights to everybody else."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_models import all_groups, assert_same, llama, lora, lora_llama, run, traces
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Parameter

from fastpeft import patch, unpatch
from fastpeft.patch.stacking import Stack, ownable


@pytest.fixture
def model(device: torch.device) -> Any:
    model = lora_llama().to(device)
    model.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.ids = [id(p) for p in model.parameters()]
    model.result = run(model)
    patch(model, stack="always")
    assert all(stacked(model))
    return model


def stacked(model: nn.Module) -> list[bool]:
    """Of each group of several layers: their weights lie side by side."""
    groups = [group for group in all_groups(model) if len(group.members) > 1]
    return [group.stack is not None and group.stack.intact() for group in groups]


def assert_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_parameters_stay_the_same_objects_with_storage_of_their_own(model: Any) -> None:
    assert [id(p) for p in model.parameters()] == model.ids
    assert_state(model.state_dict(), model.before)
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        assert storage.nbytes() == parameter.numel() * parameter.element_size()
        assert storage.data_ptr() == parameter.data_ptr() and parameter.is_contiguous()


def test_unpatch_restores_to_the_bit(model: Any) -> None:
    unpatch(model)
    assert not traces(model)
    assert [id(p) for p in model.parameters()] == model.ids
    assert_state(model.state_dict(), model.before)
    weights = [layer.self_attn.q_proj.base_layer.weight for layer in model.base_model.model.model.layers]
    assert not any(hasattr(w.untyped_storage(), "_fastpeft_block") for w in weights)
    after = run(model)
    assert torch.equal(after[0], model.result[0])


def test_saving(model: Any, tmp_path: Path, device: torch.device) -> None:
    base = model.get_base_model()
    state = {name: t for name, t in base.state_dict().items() if "base_layer" in name}

    save_file(state, tmp_path / "whole.safetensors")
    assert_state({k: v.to(device) for k, v in load_file(tmp_path / "whole.safetensors").items()}, state)

    q = next(t for name, t in state.items() if "q_proj" in name)
    buffer = io.BytesIO()
    torch.save({"q": q}, buffer)
    assert buffer.tell() < 2 * q.numel() * q.element_size()  # its own bytes, not the whole block
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["q"], q)

    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=device.type == "cpu").save_model(base, str(tmp_path / "accelerate"))
    saved = load_file(tmp_path / "accelerate" / "model.safetensors")
    assert state.keys() <= saved.keys()

    model.save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in adapter.items():
        live = name.replace(".weight", ".default.weight")
        assert torch.equal(tensor.to(device), model.before[live])

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert_state({k: v.to(device) for k, v in again.state_dict().items()}, merged.state_dict())


def test_a_dtype_and_back(model: Any) -> None:
    model.to(torch.float64)
    double = run(model)
    assert all(stacked(model))  # laid side by side again, at the first call
    unpatch(model)
    assert_same(run(model), double, tolerance=1e-12)
    patch(model, stack="always")
    model.to(torch.float32)
    assert_same(run(model), model.result)


def test_moving_frees_the_block(model: Any) -> None:
    """Nobody but the weights keeps the block: after model.to(...) the old memory is not held by the patch."""
    blocks = [group.stack._block for group in all_groups(model) if group.stack is not None]
    assert all(block() is not None for block in blocks)
    model.to(torch.bfloat16)
    gc.collect()
    assert all(block() is None for block in blocks)


def test_weights_replaced_by_others_are_not_touched(model: Any) -> None:
    layer = model.base_model.model.model.layers[0].self_attn
    weight = layer.k_proj.base_layer.weight
    mine = torch.randn_like(weight)
    weight.data = mine
    run(model)
    assert weight.data_ptr() == mine.data_ptr()
    unpatched = copy.deepcopy(model)
    unpatch(unpatched)
    assert_same(run(model), run(unpatched))
    unpatch(model)
    assert weight.data_ptr() == mine.data_ptr()


def test_deepcopy_is_a_patched_model_of_its_own(model: Any) -> None:
    copied = copy.deepcopy(model)
    assert_same(run(copied), model.result)
    ours, theirs = all_groups(model), all_groups(copied)
    assert len(ours) == len(theirs)
    mine = {id(m) for m in model.modules()}
    assert not any(id(member.module) in mine for group in theirs for member in group.members)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert_same(run(model), model.result)
    unpatch(copied)
    assert not traces(copied) and traces(model)


def test_pickle(model: Any) -> None:
    del model.before, model.result, model.ids
    expected = run(model)
    for _ in range(2):  # patched, then unpatched
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert_same(run(torch.load(buffer, weights_only=False)), expected)
        unpatch(model)


def test_load_state_dict_into_a_patched_model(model: Any, device: torch.device) -> None:
    other = lora(llama(), r=4, lora_alpha=6).to(device)
    model.load_state_dict(other.state_dict())
    assert all(stacked(model))
    assert_same(run(model), run(other))


def test_what_cannot_be_stacked() -> None:
    def weight(*shape: int, **kwargs: Any) -> Parameter:
        return Parameter(torch.randn(*shape, **kwargs), requires_grad=False)

    good = [weight(8, 16), weight(4, 16)]
    assert ownable(good) is None
    assert "trained" in ownable([good[0], Parameter(torch.randn(4, 16))])
    assert "differ" in ownable([good[0], weight(4, 16, dtype=torch.float64)])
    assert "differ" in ownable([good[0], weight(4, 8)])
    assert "contiguous" in ownable([good[0], Parameter(torch.randn(16, 4).T, requires_grad=False)])
    assert "boundary" in ownable([weight(3, 3), weight(3, 3)])
    assert "sharded" in ownable([good[0], Parameter(torch.empty(4, 16, device="meta"), requires_grad=False)])
    with pytest.raises(ValueError, match="trained"):
        Stack([good[0], Parameter(torch.randn(4, 16))])
