"""Which operator a small module computes, found by trying it: never by its name or the library's version.

A module is a norm or an activation if, on random rows, its output and its gradients are those of one of the formulas in
float64, and the operator errs at most twice as much as the module does. What the module returns for an input of another
dtype, or under autocast, is tried when such an input first comes. Of a module on the meta device, which has no numbers,
the code is tried on the CPU, with random parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..ops.activation import ACTIVATIONS
from ..ops.backend import autocast_enabled
from ..ops.glu import NATIVE_ELEMENTS, glu, glu_reference
from ..ops.layer_norm import formula as layer_norm_formula
from ..ops.layer_norm import layer_norm
from ..ops.rms_norm import formula as rms_norm_formula
from ..ops.rms_norm import rms_norm
from .reading import FLOATS, hooks_of
from .tolerance import FACTOR, FORMULA

_LARGEST_EPS = 1e-2

# In float64 a module that computes the formula is this near to it, even if it goes through fp32 inside. Two formulas
# for one activation (exact and tanh GELU) are 2e-4 apart.
_SAME = 1e-5

# Rows of very different size: on the smallest eps outweighs the row itself, so that a wrong one shows.
_SIZES = (1.0, 1e-2, 1e-3, 30.0)

Key = tuple[torch.dtype, torch.dtype | None]


class Spec:
    """What a kind of module computes, and what has been tried of it. Equal modules of a model share one."""

    def __init__(self) -> None:
        self.outs: dict[Key, torch.dtype | None] = {}

    @property
    def operator(self) -> str:
        """The operator's name."""
        raise NotImplementedError

    def parameters(self, module: nn.Module) -> tuple[Tensor | None, ...] | None:
        """The module's own parameters as they are now; None if they are no ordinary tensors."""
        raise NotImplementedError

    def apply(self, x: Tensor, parameters: tuple[Tensor | None, ...], out_dtype: torch.dtype) -> Tensor:
        """The operator."""
        raise NotImplementedError

    def formula(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """The same in float64."""
        raise NotImplementedError

    def out_dtype(self, module: nn.Module, x: Tensor) -> torch.dtype | None:
        """The dtype in which the module returns its result for x now; None where the operator must not be used."""
        key = mode_of(x)
        if key not in self.outs:
            # In a thread of its own no mode, hook or graph of the step under way sees the trial.
            with ThreadPoolExecutor(1) as pool:
                self.outs[key] = pool.submit(self.tried, module, key, x.shape[-1], x.device).result()
        return self.outs[key]

    def tried(self, module: nn.Module, key: Key, width: int, device: torch.device) -> torch.dtype | None:
        """Run module and operator on random rows: the module's result dtype if they agree, else None."""
        parameters = self.parameters(module)
        if parameters is None or key[0] not in FLOATS:
            return None
        found = self._compare(module, parameters, key, width, device)
        if found is None:
            return None
        for mine, other, true in found:
            if mine.dtype != other.dtype or other.dtype not in FORMULA:
                return None
            error = worst(other, true)
            if not (error <= FORMULA[other.dtype] and worst(mine, true) <= max(FACTOR * error, _unit(mine))):
                return None
        return found[0][1].dtype

    def is_what_it_computes(self, module: nn.Module, width: int, device: torch.device) -> bool:
        """The module's own result and gradients, in float64, are the formula's (its inside may be fp32)."""
        parameters = self.parameters(module)
        if parameters is None:
            return False
        wide = tuple(None if t is None else t.detach().double() for t in parameters)
        found = self._compare(module, wide, (torch.float64, None), width, device)
        return found is not None and all(worst(other, true) <= _SAME for _, other, true in found)

    def _compare(
        self, module: nn.Module, parameters: tuple[Tensor | None, ...], key: Key, width: int, device: torch.device
    ) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """(ours, the module's, in float64) of the result and of each gradient; None if the module fails."""
        dtype, autocast = key
        if device.type == "meta":
            device = torch.device("cpu")
            parameters = tuple(None if t is None else torch.rand(t.shape).to(t.dtype) for t in parameters)
        x, dy = _rows(width, dtype, device)
        leaves = [t.detach().clone().requires_grad_() for t in parameters if t is not None]
        own = _filled(parameters, leaves)
        try:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                with _swapped(module, own):
                    theirs = _run(type(module).forward.__get__(module), x, leaves, dy)
                ours = _run(lambda x: self.apply(x, own, theirs[0].dtype), x, leaves, dy)
        except Exception:  # whatever the module's own code raises for rows it was not made for
            return None
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = _filled(parameters, wide)
        with torch.autocast(device.type, enabled=False):
            truth = _run(lambda x: self.formula(x, exact), x.double(), wide, dy.double())
        if any(other.shape != true.shape for other, true in zip(theirs, truth)):
            return None
        return list(zip(ours, theirs, truth))


class NormSpec(Spec):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, layer: bool, eps: float, offset: float) -> None:
        super().__init__()
        self.layer, self.eps, self.offset = layer, eps, offset

    @property
    def operator(self) -> str:
        return "layer_norm" if self.layer else "rms_norm"

    def parameters(self, module: nn.Module) -> tuple[Tensor | None, ...] | None:
        own = module._parameters
        found = (own.get("weight"), own.get("bias")) if self.layer else (own.get("weight"),)
        return found if all(type(t) in (Parameter, Tensor, type(None)) for t in found) else None

    def apply(self, x: Tensor, parameters: tuple[Tensor | None, ...], out_dtype: torch.dtype) -> Tensor:
        if self.layer:
            weight, bias = parameters
            return layer_norm(x, weight, bias, self.eps, offset=self.offset, out_dtype=out_dtype)
        return rms_norm(x, parameters[0], self.eps, self.offset, out_dtype=out_dtype)

    def formula(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        if self.layer:
            weight, bias = parameters
            return layer_norm_formula(x, weight, bias, self.eps, self.offset, torch.float64)
        return rms_norm_formula(x, parameters[0], self.eps, self.offset, torch.float64)


class ActivationSpec(Spec):
    """A function of each element."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    @property
    def operator(self) -> str:
        return f"glu ({self.act})"

    def parameters(self, module: nn.Module) -> tuple[Tensor | None, ...] | None:
        return ()

    def apply(self, x: Tensor, parameters: tuple[Tensor | None, ...], out_dtype: torch.dtype) -> Tensor:
        return glu(x, None, self.act)

    def formula(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        return glu_reference(x, None, self.act)


def may_be_recognised(module: nn.Module) -> bool:
    """A leaf with at most a weight and a bias, each a vector, and a forward of its own class."""
    own = module._parameters
    return (
        not isinstance(module, nn.Identity | nn.Dropout)
        and not module._modules
        and not module._buffers
        and own.keys() <= {"weight", "bias"}
        and all(t is None or t.dim() == 1 for t in own.values())
        and "forward" not in module.__dict__
        and "_hf_hook" not in module.__dict__
        and not any(hooks_of((module,)))
    )


def recognise(module: nn.Module, x: Tensor, known: list[Spec]) -> Spec | None:
    """The operator that `module` computes for inputs like x, or None.

    known: the specs found so far; one that fits is used again, a new one is added.
    """
    for spec in [*known, *_guesses(module)]:
        if _conceivable(spec, module) and spec.is_what_it_computes(module, x.shape[-1], x.device):
            out = spec.tried(module, mode_of(x), x.shape[-1], x.device)
            if out is None:
                return None
            if spec not in known:
                known.append(spec)
            spec.outs.setdefault(mode_of(x), out)
            return spec
    return None


def worst(value: Tensor, truth: Tensor) -> float:
    """The largest relative error of a row."""
    truth = truth.double()
    error = ((value.double() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)).max().item()
    return error if error == error else float("inf")


def mode_of(x: Tensor) -> Key:
    """The dtypes that decide what a module returns: x's, and autocast's where it is on."""
    device = x.device.type
    return x.dtype, torch.get_autocast_dtype(device) if autocast_enabled(x.device) else None


def _guesses(module: nn.Module) -> Iterator[Spec]:
    if any(t is not None for t in module._parameters.values()) or _eps_of(module):
        for eps in _eps_of(module):
            yield NormSpec(True, eps, 0.0)
            yield NormSpec(False, eps, 0.0)
            yield NormSpec(False, eps, 1.0)
    if not any(t is not None for t in module._parameters.values()):
        for act in ACTIVATIONS:
            yield ActivationSpec(act)


def _conceivable(spec: Spec, module: nn.Module) -> bool:
    own = {name for name, t in module._parameters.items() if t is not None}
    if isinstance(spec, NormSpec):
        return spec.eps in _eps_of(module) and (spec.layer or "bias" not in own)
    return not own


def _eps_of(module: nn.Module) -> list[float]:
    """The small numbers among a module's attributes."""
    return [v for v in module.__dict__.values() if isinstance(v, float) and 0.0 < v <= _LARGEST_EPS]


def _rows(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random rows, enough of them that the operators proper run, and a random gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    rows = max(4 * len(_SIZES), NATIVE_ELEMENTS // width + len(_SIZES))
    x = torch.randn(1, rows, width, generator=generator, device=device)
    sizes = torch.tensor(_SIZES, device=device).repeat(rows // len(_SIZES) + 1)[:rows]
    dy = torch.randn(1, rows, width, generator=generator, device=device)
    return (x * sizes[:, None]).to(dtype), dy


def _filled(parameters: tuple[Tensor | None, ...], tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """`tensors` in the places of the parameters that are there."""
    given = iter(tensors)
    return tuple(None if t is None else next(given) for t in parameters)


def _unit(t: Tensor) -> float:
    """A unit in the last place: a function of one element may by chance be exact in PyTorch."""
    return torch.finfo(t.dtype).eps


def _run(f: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output, then the gradients of x and of the leaves."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = f(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy.to(y.dtype))]


class _swapped:
    """The module with other parameters, while it is tried."""

    def __init__(self, module: nn.Module, parameters: tuple[Tensor | None, ...]) -> None:
        self.module, self.parameters = module, parameters

    def __enter__(self) -> None:
        own = self.module._parameters
        self.before = dict(own)
        own.update(zip(("weight", "bias"), self.parameters))  # type: ignore[arg-type]

    def __exit__(self, *_: Any) -> None:
        self.module._parameters.clear()
        self.module._parameters.update(self.before)
