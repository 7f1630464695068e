"""Which modules become what: pure decisions on an unpatched model, nothing is changed here.

Every LoRA linear layer that can be read becomes one operator call. Those that one caller hands the same tensor become a
group, if they agree in dropout, dtype and device. Norms and activations become operators, and where the projections of
their output can be read, all of them are one. A projection without an adapter takes part where the base weights are to
be one product, or where the producer of its input does: on its own it has nothing to gain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.bnb import format_of
from ..ops.nf4 import Weight4bit
from .forwards import read_plain
from .observe import Observation, Product, SharedInput
from .reading import Operands, Reading, Unsupported, is_conv1d, is_tuner_layer, lora_library, read_lora
from .recognise import NormSpec, Spec, may_be_recognised, recognise
from .stacking import ownable

STACK_OPTIONS = ("auto", "always", "never")

# Up to this many rows of all base weights together one product is not slower on the CPU. Time of one over several, fp32
# with K = 576 on a Zen 4 (MKL): N = 576 + 192 + 192 0.84 to 0.98 for 1 to 2048 rows of x; N = 1536 + 1536 0.98 to 1.11
# on one thread and 1.21 on two.
CPU_ROWS = 2048


@dataclass
class Candidate:
    """A module that holds adapters, or a plain linear layer beside one."""

    name: str
    module: nn.Module
    kind: str
    library: str | None = None  # whose LoRA linear layer it is; None for everything else
    reading: Reading | None = None
    reason: str | None = None  # why it stays as it is

    @property
    def adapted(self) -> bool:
        """It has an active adapter that the operators can compute."""
        return self.reading is not None and self.reading.name is not None

    @property
    def dora(self) -> bool:
        """Its adapter is DoRA; a group's adapters are all LoRA or all DoRA."""
        return self.reading is not None and self.reading.dora

    @property
    def packed(self) -> bool:
        """Its base weight is of 4 bits."""
        return self.reading is not None and self.reading.packed

    @property
    def native(self) -> bool:
        """Its own forward is the operator call already."""
        return self.library == "fastpeft" and self.reading is not None and self.reading.known

    @property
    def trained(self) -> bool:
        """Its base weight is trained."""
        return self.operands[0].requires_grad

    @property
    def transposed(self) -> bool:
        """It keeps its weight as (K, N)."""
        base = self.module if self.reading is None else self.reading.base
        return not isinstance(base, nn.Linear)

    @property
    def operands(self) -> Operands:
        """Its tensors as they are now."""
        if self.reading is None:
            linear: Any = self.module
            return (linear.weight.t() if self.transposed else linear.weight, linear.bias, None, None, 0.0, 0.0)
        operands = self.reading.tensors()
        assert operands is not None  # `read_lora` has seen them
        return operands


@dataclass
class Source:
    """A norm or an activation that an operator computes."""

    name: str
    module: nn.Module
    kind: str
    spec: Spec
    gated: bool = False  # its output is multiplied by another tensor before anything else is done with it


@dataclass
class GroupPlan:
    """Candidates to be computed together: by the source of their input, or else while `caller` runs."""

    caller: nn.Module | None
    members: list[Candidate]
    one_product: str  # as Group.one_product
    why: str  # why the base weights are, or are not, one product
    source: Source | None = None
    between: list[nn.Module] = field(default_factory=list)
    apart: str | None = None  # why the trial gave up the source, or the group


@dataclass
class Plan:
    """All decisions for one model."""

    candidates: list[Candidate]
    groups: list[GroupPlan] = field(default_factory=list)
    alone: list[Candidate] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    note: str | None = None  # why no groups could be looked for


def find_candidates(model: nn.Module, verify: bool = True) -> list[Candidate]:
    """Every module of the model that holds adapters, read or with the reason why it cannot be.

    verify: replacements will be tried, so that base layers need not be known.
    """
    found = []
    for name, module in _outside_tuner_layers(model):
        if not is_tuner_layer(module):
            continue
        library = lora_library(module)
        owner = library or type(module).__module__.partition(".")[0]
        candidate = Candidate(name, module, _kind_name(module, owner), library)
        try:
            if library is None:
                raise Unsupported(_why_not_lora(module, owner))
            reading = read_lora(module)
            if not reading.known and not verify:
                raise Unsupported(f"only verification could tell what a {type(reading.base).__name__} computes")
            candidate.reading = reading
        except Unsupported as why:
            candidate.reason = str(why)
        found.append(candidate)
    return found


def find_plain(model: nn.Module) -> list[Candidate]:
    """Linear layers without an adapter: they may join a group."""
    found = []
    for name, module in _outside_tuner_layers(model):
        if type(module) is nn.Linear or is_conv1d(module):
            try:
                found.append(Candidate(name, read_plain(module), type(module).__name__))
            except Unsupported:
                continue
    return found


def find_sources(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that may turn out to be norms or activations, with their names; inside adapter layers too (experts)."""
    return {m: name for name, m in model.named_modules() if may_be_recognised(m)}


def make_plan(
    model: nn.Module,
    candidates: list[Candidate],
    plain: list[Candidate],
    names: dict[nn.Module, str],
    seen: Observation | None,
    stack: str,
) -> Plan:
    """Groups, sources and single layers. seen: None where the model could not be run; then every layer stands alone.

    names: of the modules that were watched as sources.
    """
    plan = Plan(candidates)
    by_module = {c.module: c for c in [*candidates, *plain] if c.reason is None and not (c.dora and c.trained)}
    tied = _tied(model)
    grouped: set[nn.Module] = set()
    shared_inputs = seen.shared if seen else []
    for source, product in _sources(seen.products if seen else [], names):
        plan.sources.append(source)
        group = _joined(source, product, [by_module[m] for m in product.consumers if m in by_module], tied, stack)
        if group is not None:
            members = {c.module for c in group.members}
            if any(c.adapted for c in group.members):  # without adapters there is nothing to share but the product
                group.caller = next((s.caller for s in shared_inputs if members <= set(s.modules)), None)
            plan.groups.append(group)
            grouped |= members
    for shared in shared_inputs:
        plan.groups += shared_groups(shared, by_module, grouped, tied, stack)
    grouped = {c.module for group in plan.groups for c in group.members}
    for candidate in candidates:
        if candidate.reason is None and candidate.module not in grouped:
            if candidate.adapted:
                plan.alone.append(candidate)
            else:
                candidate.reason = "no active adapter"
    return plan


def shared_groups(
    shared: SharedInput, by_module: dict[nn.Module, Candidate], taken: set[nn.Module], tied: set[int], stack: str
) -> list[GroupPlan]:
    """The groups among the modules that were handed one tensor, those taken already left out."""
    members = [by_module[m] for m in shared.modules if m in by_module and m not in taken]
    found = []
    for part in _alike([c for c in members if c.adapted]):
        plain = [] if part[0].dora else [c for c in members if not c.adapted and not c.trained]
        group = _group(shared, part, plain, tied, stack)
        if group is not None:
            found.append(group)
    return found


def _sources(products: list[Product], names: dict[nn.Module, str]) -> Iterator[tuple[Source, Product]]:
    """Every watched module that an operator computes, with what became of its output."""
    by_source: dict[nn.Module, Product] = {}
    for product in products:
        if product.gated or product.source not in by_source:
            by_source[product.source] = product
    known: list[Spec] = []
    for module, product in by_source.items():
        spec = recognise(module, product.x, known)
        if spec is None:
            continue
        if isinstance(spec, NormSpec) and product.gated:  # what is multiplied by it is not its business
            product = next((p for p in products if p.source is module and not p.gated), product)
        yield Source(names[module], module, type(module).__name__, spec, product.gated), product


def _joined(
    source: Source, product: Product, consumers: list[Candidate], tied: set[int], stack: str
) -> GroupPlan | None:
    """The group of a source's consumers; None if joining them saves nothing."""
    adapted = [c for c in consumers if c.adapted]
    plain = [c for c in consumers if not c.adapted]
    if adapted:
        adapted = next(iter(_alike(adapted)))
        if adapted[0].dora:  # a frozen plain layer keeps nothing of its input anyway
            plain = []
        plain = [c for c in plain if _same_kind(c.operands[0], adapted[0].operands[0])]
    elif not any(c.trained for c in plain):
        return None  # frozen and without adapters they keep nothing of their input
    else:
        plain = [c for c in plain if _same_kind(c.operands[0], plain[0].operands[0])]
    order = {module: index for index, module in enumerate(product.consumers)}
    everyone = sorted([*adapted, *plain], key=lambda c: order[c.module])
    one_product, why = _one_product(product, everyone, tied, stack) if len(everyone) > 1 else ("never", "")
    return GroupPlan(None, everyone, one_product, why, source, product.between)


def _group(
    shared: SharedInput, lora: list[Candidate], plain: list[Candidate], tied: set[int], stack: str
) -> GroupPlan | None:
    """The group of these adapters' layers, with the plain ones where they help; None if there is nothing to share."""
    order = {module: index for index, module in enumerate(shared.modules)}
    like = lora[0].operands[0]
    joining = [c for c in plain if _same_kind(c.operands[0], like)]
    everyone = sorted([*lora, *joining], key=lambda c: order[c.module])
    one_product, why = _one_product(shared, everyone, tied, stack)
    if one_product == "never":
        everyone = sorted(lora, key=lambda c: order[c.module])
    if len(everyone) < 2:
        return None
    return GroupPlan(shared.caller, everyone, one_product, why)


def _one_product(
    shared: SharedInput | Product, members: list[Candidate], tied: set[int], stack: str
) -> tuple[str, str]:
    """Shall the base weights lie side by side and be one product, and when; and why."""
    if stack == "never":
        return "never", "stack='never'"
    if any(c.dora for c in members):
        return "never", "DoRA scales each projection by itself"
    if any(c.packed for c in members):
        return "never", "weights of 4 bits are decoded one by one"
    operands = [c.operands for c in members]
    weights, biases = [o[0] for o in operands], [o[1] for o in operands]
    if len({w.data_ptr() or id(w) for w in weights}) < len(weights) or any(id(w) in tied for w in weights):
        return "never", "a weight is tied to another module"
    if any(c.transposed for c in members):
        return "never", "a Conv1D keeps its weight transposed"
    with_bias = [b for b in biases if b is not None]
    if with_bias and len(with_bias) < len(biases):
        return "never", "only some of the projections have a bias"
    reason = ownable(weights) or (ownable(with_bias) if with_bias else None)  # type: ignore[arg-type]
    if reason is not None:
        return "never", reason
    if stack == "always":
        return "always", "stack='always'"
    rows = sum(w.shape[0] for w in weights)
    if weights[0].device.type == "cpu" and rows > CPU_ROWS:
        return "never", f"on the CPU one product {rows} wide is slower than several"
    kept = dict(zip(shared.modules if isinstance(shared, SharedInput) else shared.consumers, shared.kept))
    lost = [c.name.rpartition(".")[2] for c in members if not kept[c.module]]
    if not lost or len(lost) == len(members):
        return "always", "it keeps no more for the backward"
    return "free", f"it would keep {', '.join(lost)} for the backward"


def _alike(candidates: list[Candidate]) -> Iterator[list[Candidate]]:
    """The candidates split into sets that one product can serve, largest first."""
    kinds = Counter(_kind(c) for c in candidates)
    for kind, _ in kinds.most_common():
        yield [c for c in candidates if _kind(c) == kind]


def _kind(candidate: Candidate) -> tuple[Any, ...]:
    reading = candidate.reading
    assert reading is not None
    weight, A = candidate.operands[0], reading.A.weight
    p = getattr(reading.dropout, "p", 0.0)
    return (reading.dora, p, A.dtype, weight.dtype, weight.device, weight.shape[1], type(weight) is Weight4bit)


def _same_kind(a: Tensor, b: Tensor) -> bool:
    packed = isinstance(a, Weight4bit), isinstance(b, Weight4bit)
    return packed[0] == packed[1] and (a.dtype, a.device, a.shape[1]) == (b.dtype, b.device, b.shape[1])


def _tied(model: nn.Module) -> set[int]:
    """Parameters registered in more than one module."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in owners.items() if count > 1}


def _outside_tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without what lies inside an adapter layer."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield prefix, module
        if is_tuner_layer(module):
            return
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(f"{prefix}.{key}" if prefix else key, child)

    seen: set[nn.Module] = set()
    return walk("", model)


def _kind_name(module: nn.Module, owner: str) -> str:
    """ "peft Linear", "fastpeft Linear4bit (nf4, nested scales)"."""
    name, quantised = f"{owner} {type(module).__name__}", format_of(_innermost(module))
    return name if quantised is None else f"{name} ({quantised})"


def _innermost(module: nn.Module) -> Any:
    """The base layer under all adapter layers."""
    base = getattr(module, "base_layer", None)
    while base is not None and is_tuner_layer(base):
        base = base._modules["base_layer"]
    return base


def _why_not_lora(module: nn.Module, owner: str) -> str:
    base = _innermost(module)
    if format_of(base) == "int8":
        return "the base weight is int8: bitsandbytes multiplies it, and the adapter's product is added to that"
    what = type(base).__name__
    if owner == "fastpeft":
        return f"computed by its own forward; no fused form for a {what} with this adapter"
    return f"no fused form for {owner}'s {type(module).__name__} over a {what}"
