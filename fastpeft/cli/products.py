"""The floor that `fastpeft bench --products` measures: the frozen model's own matrix products and nothing else.

A training step of an adapter cannot do without them: y = x Wᵀ of every linear layer, `lm_head` included, and dx = dy W
where the layer's input depends on an adapter. (The weight's gradient, the third product of full training, falls away.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastpeft.cli.contenders import BenchOptions


class Products:
    """The base model's products at the bench's batch; `step(i)` runs all of them, forwards first, then backwards."""

    def __init__(self, options: BenchOptions) -> None:
        from fastpeft.cli.contenders import Runner

        runner = Runner("eager", options)  # with adapters, to see which inputs need a gradient
        self.forward: list[tuple[Tensor, Tensor]] = []  # x (M, K), Wᵀ
        self.backward: list[tuple[Tensor, Tensor]] = []  # dy (M, N), W
        operands: dict[tuple[int, int, torch.dtype], Tensor] = {}

        def operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            key = (rows, columns, dtype)
            if key not in operands:
                operands[key] = torch.randn(rows, columns, device=runner.device).to(dtype)
            return operands[key]

        def note(layer: Any, inputs: tuple[Any, ...]) -> None:
            x, weight, size = inputs[0], layer.weight.detach(), (layer.out_features, layer.in_features)
            if options.method != "qlora":
                weight = weight.to(runner.dtype)
            elif weight.shape != size:  # packed: the floor is the product without decoding; what is in it costs nothing
                weight = torch.randn(*size, device=runner.device).to(runner.dtype)
            rows = x.shape[:-1].numel()
            self.forward.append((operand(rows, size[1], weight.dtype), weight.t()))
            if x.requires_grad:
                self.backward.append((operand(rows, size[0], weight.dtype), weight))

        hooks = [layer.register_forward_pre_hook(note) for layer in base_linears(runner.model)]
        try:
            runner.loss(0)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Every product once; the results are dropped."""
        for x, weight in self.forward:
            torch.mm(x, weight)
        for dy, weight in reversed(self.backward):
            torch.mm(dy, weight)


def base_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that were there before the adapters."""
    of_adapters = {id(m) for name, m in model.named_modules() if ".lora_" in f".{name}"}
    return [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in of_adapters]
