"""A mixture's experts: their stacked parameters lent as sums that are not made (`layers.weight_sum`).

The wrapper around the experts module (peft's or fastpeft's ParamWrapper; one in the other for several parameters)
lends it W + c B A for the length of its call. Patched, what it lends is a `WeightSum`, by which the module's own code,
whatever it is, multiplies without making it. fastpeft's wrapper does so by itself; here it is only looked at.

One experts module of each kind (class, shapes, dtypes, adapters) is tried on what its model hands it in one small
forward: with sums made and not made, forward and backward. The trial also tells by which operators its products were
computed. They are compared with float64 in their own tests; here a structure misread would be an error of order 1.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map_only

from ..layers.swap import swapped
from ..layers.weight_sum import WeightSum, is_compiled, summed
from .forwards import Forward, eager
from .inputs import NoInput, example_call
from .observe import run_quietly, untouched
from .reading import FLOATS
from .report import Row
from .tolerance import FORMULA, distance
from .verify import JOINED

_WRAPPERS = (("fastpeft", "fastpeft.layers.experts"), ("peft", "peft.tuners.lora.layer"))
_HOW = {
    "lora_linear": "expert by expert",
    "lora_experts": "all experts at once",
    "batched products": "all experts at once",
    "sum of one": "an expert's sum at a time",
}
Call = tuple[tuple[Any, ...], dict[str, Any]]


class ExpertsForward(Forward):
    """The forward of a ParamWrapper: the experts' own, with a sum lent that is not made."""

    __slots__ = ("made", "note")

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.made = False  # the sum has to be, by fastpeft's own forward too
        self.note: set[str] | None = None  # the trial's: by which operators products were made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active and self.made:
            with summed():
                return self.original(*args, **kwargs)
        if self.active and "adapter_names" not in kwargs and eager():
            module: Any = self.module
            lent = self.lent()
            if lent is not None:
                with swapped((module.get_base_layer(), module.parameter_name, lent)):
                    return module.base_layer(*args, **kwargs)
        return self.original(*args, **kwargs)

    def lent(self) -> Tensor | None:
        """The sum as it is now; None while the wrapper's own forward must run."""
        module: Any = self.module
        if module._disable_adapters:
            return None
        name, reason = adapter_of(module)
        if reason is not None:
            return None
        return WeightSum.lent_by(module, name, self.note)

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.made)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, self.made = state
        self.note = None


@dataclass
class Lender:
    """A wrapper, and what became of it."""

    module: Any
    library: str
    reason: str | None = None  # why it stays as it is
    operators: set[str] = field(default_factory=set)  # by which the trial's products were made

    def row(self, name: str) -> Row:
        """name: of the experts module."""
        name, kind = f"{name}.{self.module.parameter_name}", f"{self.library} {type(self.module).__name__}"
        if self.reason is not None:
            return Row(name, kind, reason=self.reason)
        found = sorted(self.operators)
        how = ", ".join(dict.fromkeys(_HOW[operator] for operator in found)) or "where it is multiplied by, not tried"
        found = ["addmm" if operator == "sum of one" else operator for operator in found]
        return Row(name, kind, ", ".join(found) or "lora_linear or lora_experts", f"{how}; the sum of all is not made")


def adapter_of(module: Any) -> tuple[str, str | None]:
    """The adapter of a wrapper whose sum need not be made; or why it must be."""
    if module.merged_adapters:
        return "", "merged into the base weight; unmerge, then patch again"
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1:
        return "", f"{len(names)} active adapters ({', '.join(names)})" if names else "no active adapter"
    if module.num_experts == 1 and module.get_param().dim() != 2:
        return "", "no fused form for a stack of one expert"
    base = module.get_base_layer()
    if is_parametrized(base, module.parameter_name):
        return "", "the parameter has a parametrization of its own"
    if is_compiled(base):
        return "", "torch.compile compiles the experts by themselves"
    parameter = module.get_param()
    if type(parameter) not in (Tensor, Parameter):
        return "", f"the parameter is a {type(parameter).__name__} (sharded or quantised)"
    if parameter.dtype not in FLOATS:
        return "", f"no fused form for {str(parameter.dtype).removeprefix('torch.')} parameters"
    if parameter.requires_grad:
        return "", "the base parameter is trained: its gradient is the sum's"
    return names[0], None


def apply(root: nn.Module, example_inputs: Any, verify: bool) -> dict[str, list[Row]]:
    """Lend sums to every experts module that stands its trial. Returns, by the module's name, a row a parameter."""
    chains = _chains(root)
    calls, note = _calls(root, [chain[0].module for chain in chains.values()], example_inputs) if verify else ({}, "")
    tried: dict[Any, list[Lender]] = {}
    for chain in chains.values():
        usable = [lender for lender in chain if lender.reason is None]
        forwards = [ExpertsForward(lender.module) for lender in usable]
        for forward in forwards:
            forward.module.__dict__["forward"] = forward
        if verify and usable:
            kind = tuple(_kind(lender) for lender in chain)
            if kind not in tried:
                _try(usable, forwards, chain[0].module, calls.get(chain[0].module), note)
                tried[kind] = chain
            for lender, like in zip(chain, tried[kind]):
                lender.reason, lender.operators = like.reason, like.operators
        for lender, forward in zip(usable, forwards):
            forward.made = lender.reason is not None and lender.library == "fastpeft"
            if (lender.reason is None) is (lender.library == "fastpeft"):  # its own forward does what it shall do
                del lender.module.__dict__["forward"]
    return {name: [lender.row(name) for lender in chain] for name, chain in chains.items()}


def _chains(root: nn.Module) -> dict[str, list[Lender]]:
    """The wrappers around each experts module, the outermost first, by the name of that."""
    wrappers = {module: name for name, module in root.named_modules() if _library(module) is not None}
    inner = {module._modules["base_layer"] for module in wrappers}
    chains = {}
    for module, name in wrappers.items():
        if module in inner:
            continue
        chain, layer = [], module
        while layer in wrappers:
            library = _library(layer)
            assert library is not None
            chain.append(Lender(layer, library, _why_not(layer)))
            layer = layer._modules["base_layer"]  # type: ignore[assignment]
        chains[name] = chain
    return chains


def _library(module: nn.Module) -> str | None:
    for library, home in _WRAPPERS:
        cls = getattr(sys.modules.get(home), "ParamWrapper", None)
        if cls is not None and isinstance(module, cls):
            return library
    return None


def _why_not(module: Any) -> str | None:
    """Why a wrapper must stay as it is; None if it may be tried."""
    if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
        return "other code has replaced the forward of the layer"
    if type(module).__name__ != "ParamWrapper" or not hasattr(module, "get_delta_factors"):
        return f"a {type(module).__name__} that does not tell its factors"
    return adapter_of(module)[1]


def _kind(lender: Lender) -> Any:
    """What a trial's outcome depends on."""
    module, base = lender.module, lender.module.get_base_layer()
    shapes = tuple((name, p.shape, p.stride(), p.dtype, p.device) for name, p in base.named_parameters())
    adapters = tuple((name, part.weight.shape, part.weight.dtype) for name, part in module.lora_A.items())
    forward = base.__dict__.get("forward")
    return (lender.library, lender.reason, module.parameter_name, type(base), id(forward), shapes, adapters)


def _calls(root: nn.Module, modules: list[Any], example_inputs: Any) -> tuple[dict[nn.Module, Call], str]:
    """What each module is handed in one small forward; why some are not there."""
    calls: dict[nn.Module, Call] = {}
    note = "not tried: the model's forward does not run it"
    if not modules:
        return calls, note

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules]
    try:
        target, args, kwargs = example_call(root, example_inputs)
        run_quietly(target, args, kwargs)
    except NoInput as why:
        note = f"not tried: {why}; pass example_inputs="
    except Exception as error:  # whatever the model's own code raises: it is not ours to judge
        note = f"not tried: a trial forward failed with {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    return calls, note


def _try(
    lenders: list[Lender], forwards: list[ExpertsForward], outermost: nn.Module, call: Call | None, note: str
) -> None:
    """Run the experts once each way; what is found is written to the lenders."""
    reason: str | None = None
    if call is None:
        reason = note
    else:
        for lender, forward in zip(lenders, forwards):
            forward.note = lender.operators
        try:
            with untouched(outermost), _comparable(lenders) as adapters:
                with summed():
                    theirs = _run(outermost, call, adapters)
                ours = _run(outermost, call, adapters)
            reason = _differ(ours, theirs, {lender.module.get_param().dtype for lender in lenders})
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = f"its replacement failed when tried: {type(error).__name__}: {error}"
        finally:
            for forward in forwards:
                forward.note = None
    for lender in lenders:
        lender.reason = reason
        if reason is None and "sum" in lender.operators:
            lender.reason = "its code does more with the parameter than multiply by it: the sum is made"
        elif reason is None and not lender.operators:
            lender.reason = "its code does not multiply by the parameter, or a rank is above 512"


def _run(module: nn.Module, call: Call, adapters: list[Tensor]) -> list[Tensor | None]:
    """Outputs, then the gradients of the inputs and of the adapters."""
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.clone()
        leaves.append(t.clone().requires_grad_())
        return leaves[-1].clone()  # what the code may write to

    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        args, kwargs = tree_map_only(Tensor, leaf, call)
        outs = [t for t in tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        dys = [torch.randn(t.shape, device=t.device).to(t.dtype) for t in outs]
        return [*outs, *torch.autograd.grad(outs, [*leaves, *adapters], dys, allow_unused=True)]


def _differ(ours: list[Tensor | None], theirs: list[Tensor | None], dtypes: set[torch.dtype]) -> str | None:
    """Why the one may not stand for the other. dtypes: of the parameters, which are those of the products."""
    if len(ours) != len(theirs):
        return "its replacement does not agree: it returns something else"
    for mine, other in zip(ours, theirs):
        if mine is None or other is None:
            if mine is not other:
                return "its replacement does not agree: a gradient is missing"
            continue
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return "its replacement does not agree: other shapes or dtypes"
        bounds = JOINED if other.device.type == "cpu" else FORMULA  # fp32 may be TF32 inside
        bound = max(bounds[dtype] for dtype in {other.dtype, *dtypes})
        apart = distance(mine.detach(), other.detach())
        if not apart <= bound:
            return f"its replacement does not agree: relative distance {apart:.1e}"
    return None


@contextlib.contextmanager
def _comparable(lenders: list[Lender]) -> Iterator[list[Tensor]]:
    """Adapters on, random and trainable, adding as much as the base gives; put back whatever happens."""
    before, random = [], []
    try:
        for lender in lenders:
            module = lender.module
            name, _ = adapter_of(module)
            weight, A, B = module.get_param(), module.lora_A[name], module.lora_B[name]
            size = weight[0].detach().float().square().mean().sqrt().item() or 1.0
            r = A.weight.shape[0] // module.num_experts  # of one expert
            B_size = size * A.weight.shape[1] ** 0.5 * r**-0.5 / abs(module.scaling[name] or 1.0)
            before.append((module, module._disable_adapters, A, A._parameters["weight"], B, B._parameters["weight"]))
            module._disable_adapters = False
            for part, std in ((A, A.weight.shape[1] ** -0.5), (B, B_size)):
                generator = torch.Generator(part.weight.device).manual_seed(part.weight.shape[0])
                noise = torch.randn(part.weight.shape, generator=generator, device=part.weight.device) * std
                part._parameters["weight"] = Parameter(noise.to(part.weight.dtype))
                random.append(part._parameters["weight"])
        yield random
    finally:
        for module, disabled, A, a, B, b in before:
            module._disable_adapters, A._parameters["weight"], B._parameters["weight"] = disabled, a, b
