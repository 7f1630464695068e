"""Models wrapped in FSDP, which lends modules their gathered weights as plain attributes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastpeft

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.mha(x, x, x)[0])


@pytest.fixture(scope="module")
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("training", [False, True])
def test_fsdp_computes_what_the_model_computes(training: bool) -> None:
    """Adapters of attention and linear layers are applied under FSDP, and their state dict is the plain one."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    config = fastpeft.LoraConfig(r=2, target_modules=["mha", "linear"], init_lora_weights=False)
    model = fastpeft.get_peft_model(Attention(), config).train(training)
    x = torch.randn(3, 2, 8)
    expected = model(x)
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = {name: tensor.clone() for name, tensor in fastpeft.get_peft_model_state_dict(model).items()}
    model.zero_grad()
    sharded = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    with torch.set_grad_enabled(training):
        result = sharded(x)
    torch.testing.assert_close(result, expected.detach() if not training else expected)
    if training:
        result.sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name].view_as(grad), grad)
    saved = fastpeft.get_peft_model_state_dict(sharded)
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
