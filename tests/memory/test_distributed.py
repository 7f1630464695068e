"""Checkpointing under DDP and FSDP2: two processes on the CPU give the gradients of one without checkpointing."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patch_models import inputs_of, lora_llama
from torch import nn

import fastpeft
from fastpeft.memory import find_layers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def _model(mode: str) -> Any:
    model = lora_llama("fastpeft", lora_dropout=0.0).train()
    return fastpeft.patch(model, verify=False, checkpoint=mode)


def _worker(rank: int, port: int, expected: dict[str, torch.Tensor]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for mode in ("mlp", "offload"):
            model = _model(mode)
            ddp: Any = nn.parallel.DistributedDataParallel(model)
            ddp(**inputs_of(model)).loss.backward()
            _compare(model, expected)
            from torch.distributed.fsdp import fully_shard

            model = _model(mode)
            for _, layer in find_layers(model):
                fully_shard(layer)
            fully_shard(model)
            model(**inputs_of(model)).loss.backward()
            _compare(model, expected)
    finally:
        dist.destroy_process_group()


def _compare(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes() -> None:
    model = _model("none")
    model(**inputs_of(model)).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, expected), nprocs=2)
