"""LoRA-FA (arXiv:2308.03303): A is frozen, and B's gradient is projected to be the best for the whole update.

    g_B = (1/c)² dB (A Aᵀ)⁻¹            the minimiser of |c B' A - dW| over B'

then AdamW on B, as on every other trained parameter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_DELTA = 1e-8  # added to A Aᵀ's diagonal


class LoraFAOptimizer(Optimizer):
    """AdamW with LoRA-FA's projection for the pairs of A and B among its parameters.

    Each group needs `names` (of its parameters) and `scaling_factors` (of their adapters, None elsewhere), as
    `create_lorafa_optimizer` makes them: A stands before its B.

    Raises ValueError on numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value, valid in (
            ("learning rate", lr, lr >= 0.0),
            ("beta parameter", betas[0], 0.0 <= betas[0] < 1.0),
            ("beta parameter", betas[1], 0.0 <= betas[1] < 1.0),
            ("epsilon value", eps, eps >= 0.0),
        ):
            if not valid:
                raise ValueError(f"Invalid {name}: {value}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure`, which computes the loss again, returns."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            if "scaling_factors" not in group:
                raise KeyError("Expected optimizer param group to define `scaling_factors`.")
            first: Tensor | None = None  # the A that waits for its B
            for p, name, scaling in zip(group["params"], group["names"], group["scaling_factors"]):
                if "lora" not in name:
                    if p.grad is not None:
                        self._adamw(group, self.state[name], "", p, p.grad)
                    continue
                if first is None:
                    first = p
                    continue
                A, first = first, None
                if p.grad is not None:
                    key = name[: name.find("lora")] + "lora"
                    self._adamw(group, self.state[key], "_B", p, _projected(p.grad, A, scaling))
        return loss

    def _adamw(self, group: dict[str, Any], state: Any, suffix: str, p: Tensor, gradient: Tensor) -> None:
        mean, square = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
        if not state:
            state["step"] = 0
            state[mean], state[square] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state[mean].mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        state[square].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size = size * math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        p.addcdiv_(state[mean], state[square].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def _projected(gradient: Tensor, A: Tensor, scaling: float) -> Tensor:
    """g_B, in bfloat16 where PEFT makes it so."""
    inverse = torch.linalg.pinv(A @ A.T + _DELTA * torch.eye(A.shape[0], device=A.device))
    with torch.autocast(A.device.type, torch.bfloat16, enabled=_has_bf16(A.device)):
        projected = (1 / scaling**2) * (gradient @ inverse)
    return projected.to(gradient.dtype)


def _has_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def create_lorafa_optimizer(
    model: Any, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """A `LoraFAOptimizer` over the whole model; the A's are frozen.

    Args:
        model: a PeftModel with LoRA adapters.
        r, lora_alpha: kept for PEFT's signature; each layer's own scaling is used.
        use_rslora: deprecated; must be what the active adapters' configs say.

    Raises:
        ValueError: `use_rslora` contradicts a config.
    """
    if use_rslora is not None:
        active = [name for name in model.active_adapters if name in model.peft_config]
        other = [n for n in active if bool(getattr(model.peft_config[n], "use_rslora", False)) != use_rslora]
        if other:
            raise ValueError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but these active adapters have it "
                f"set differently: {other}. Set it in LoraConfig and leave the argument out."
            )
        warnings.warn(
            "`use_rslora` in create_lorafa_optimizer is deprecated; it is taken from LoraConfig.",
            FutureWarning,
            stacklevel=2,
        )
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    named: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
    group = {
        "params": [parameter for _, parameter in named],
        "lr": lr,
        "names": [name for name, _ in named],
        "scaling_factors": [_scaling_of(model, name) for name, _ in named],
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _scaling_of(model: nn.Module, name: str) -> float | None:
    """The scaling of the adapter that a parameter belongs to."""
    layer, _, rest = name.rpartition(".lora_")
    parts = rest.split(".")
    if not layer or len(parts) < 2:
        return None
    return getattr(model.get_submodule(layer), "scaling", {}).get(parts[1])
