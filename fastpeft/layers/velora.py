"""VeLoRA (arXiv:2405.17991): the input of A is kept for the backward as one number for each group of features.

x (M, K) is cut into `num_groups` groups of d features, and of each group z only z · v is kept, v (d,) of length one.
For dA, x is rebuilt as scale · (z · v) vᵀ. The forward, and the gradients of all else, are those of LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.layers.buffers import BufferDict
from fastpeft.layers.variants import AdditiveVariant

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig


class Velora(AdditiveVariant):
    """LoRA with its input kept by projections; `lora_velora_embed` on the layer has each adapter's v."""

    name = "VeLoRA"

    def init(self, layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Make v: random, or zero until the first training batch gives the mean of its groups."""
        options: Any = config.velora_config
        self.num_groups, self.scale, self.init_type = options.num_groups, options.scale, options.init_type
        self.initialised = self.init_type == "random"
        if not hasattr(layer, "lora_velora_embed"):
            layer.lora_velora_embed = BufferDict()
            layer.other_param_names = (*layer.other_param_names, "lora_velora_embed")
        weight = layer.get_base_layer().weight
        d = -(-layer.in_features // self.num_groups)
        like = {"device": weight.device, "dtype": weight.dtype}
        v = _unit(torch.randn(d, **like)).to(weight.dtype) if self.initialised else torch.zeros(d, **like)
        layer.lora_velora_embed[adapter_name] = v

    def forward(self, layer: Any, adapter_name: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """result + scaling · B A dropout(x)."""
        A: Any = layer.lora_A[adapter_name]
        x = layer.lora_dropout[adapter_name](layer._cast_input_dtype(x, A.weight.dtype))
        if layer.training and torch.is_grad_enabled():
            buffers = layer.lora_velora_embed
            if self.init_type == "batch_average" or not self.initialised:
                v = buffers[adapter_name]
                buffers[adapter_name] = _unit(_groups(x.detach(), self.num_groups).mean(dim=(0, 1))).to(v)
                self.initialised = True
            s = _Project.apply(x, A.weight, buffers[adapter_name], self.num_groups, self.scale)
        else:
            s = A(x)
        return result + layer.lora_B[adapter_name](s) * layer.scaling[adapter_name]

    def delta(self, layer: Any, adapter_name: str) -> Tensor:
        """LoRA's."""
        return layer.get_delta_weight(adapter_name)


class _Project(torch.autograd.Function):
    """x Aᵀ, keeping of x its groups' projections on v."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, num_groups: int, scale: float) -> Tensor:
        ctx.shape, ctx.dtype, ctx.scale = x.shape, x.dtype, scale
        ctx.save_for_backward(_groups(x, num_groups) @ v.to(x.dtype), A, v)
        return F.linear(x, A)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        projections, A, v = ctx.saved_tensors
        rows = ds.reshape(-1, ds.shape[-1])
        dx = dA = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ A.to(ds.dtype)).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            rebuilt = (projections.to(ds.dtype).unsqueeze(-1) * v.to(ds.dtype)).flatten(1)[:, : ctx.shape[-1]]
            dA = (rows.T @ (rebuilt * ctx.scale)).to(A.dtype)
        return dx, dA, None, None, None


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """x (..., K) as (M, num_groups, d), the last group filled up with zeros."""
    d = -(-x.shape[-1] // num_groups)
    return F.pad(x, (0, num_groups * d - x.shape[-1])).reshape(-1, num_groups, d)


def _unit(v: Tensor) -> Tensor:
    """v / |v| in fp32; of a zero vector, that of ones."""
    v = v.float()
    v = torch.where(v.any(), v, torch.ones_like(v))
    return v / torch.linalg.vector_norm(v)
