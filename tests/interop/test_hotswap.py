"""Replacing an adapter's weights in place: diffusers and Transformers do it through `peft.utils.hotswap`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.interop.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.conv(x).mean((2, 3))).relu())


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def make(path: Path, seed: int, **options) -> None:
    torch.manual_seed(seed)
    config = fastpeft.LoraConfig(init_lora_weights=False, **options)
    torch.manual_seed(seed)
    fastpeft.get_peft_model(base(), config).save_pretrained(path)


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of other ranks, scalings and targets."""
    make(tmp_path / "a", 1, r=2, lora_alpha=8, target_modules=["conv", "one", "two"])
    make(tmp_path / "b", 2, r=4, lora_alpha=3, target_modules=["conv", "two"])
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("prepared", [False, True])
def test_swapped_model_computes_what_the_new_adapter_does(adapters: tuple[Path, Path], prepared: bool) -> None:
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = [fastpeft.PeftModel.from_pretrained(base(), path)(x) for path in adapters]
        model = fastpeft.PeftModel.from_pretrained(base(), adapters[0])
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=6)
            torch.testing.assert_close(model(x), expected[0])
        for path, output in zip(adapters[::-1], expected[::-1]):
            hotswap_adapter(model, path, "default")
            torch.testing.assert_close(model(x), output)


def test_a_compiled_model_is_not_compiled_again(adapters: tuple[Path, Path]) -> None:
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = fastpeft.PeftModel.from_pretrained(base(), adapters[1])(x)
        model = fastpeft.PeftModel.from_pretrained(base(), adapters[0])
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, adapters[1], "default")
            torch.testing.assert_close(compiled(x), expected)


def test_a_misfit_leaves_the_model_as_it_was(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    model = fastpeft.PeftModel.from_pretrained(base(), adapters[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="unexpected keys found: .*one.lora_A.default.weight"):
        hotswap_adapter(model, adapters[0], "default")
    with pytest.raises(ValueError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    make(tmp_path / "c", 3, target_modules=["two"], use_rslora=True)
    with pytest.raises(ValueError, match="use_rslora"):
        hotswap_adapter(model, tmp_path / "c", "default")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_merged_adapter_is_not_replaced(tmp_path: Path) -> None:
    """Unmerging would take the new weights out of a base that the old ones were added to."""
    make(tmp_path / "a", 1, target_modules=["two"])
    model = fastpeft.PeftModel.from_pretrained(base(), tmp_path / "a")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(model, tmp_path / "a", "default")
