"""`patch`, `unpatch` and `report`: put the planned forwards on a model, and take them off again.

What is set are instance attributes (`module.forward`) and, where base weights are to be one product, the memory that
the weights lie in. Nothing is replaced globally. A failure anywhere takes everything off again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import attention as attentions
from . import experts, scales
from . import loss as losses
from . import rope as rotations
from .forwards import Forward, LoraForward, ParentForward, PlainForward
from .group import Group
from .inputs import NoInput, example_call
from .observe import observe, run_quietly
from .plan import (
    STACK_OPTIONS,
    Candidate,
    GroupPlan,
    Plan,
    Source,
    find_candidates,
    find_plain,
    find_sources,
    make_plan,
)
from .producers import ActivationForward, NormForward, ProducerForward
from .reading import is_tuner_layer
from .recognise import ActivationSpec, NormSpec
from .report import Report, Row
from .stacking import Stack
from .tolerance import differ
from .verify import verify_alone, verify_group, verify_joined

logger = logging.getLogger("fastpeft")

_STATE = "_fastpeft_patch"
FORMS = ("auto", "plain", "fused")
BLOCKS = ("auto", "never")


@dataclass(frozen=True)
class Options:
    """The arguments of `patch` that say what is to be done."""

    blocks: str
    stack: str
    form: str
    loss: str
    verify: bool

    def check(self) -> None:
        """Raises ValueError on a value that is not known."""
        for name, known in (
            ("blocks", BLOCKS),
            ("stack", STACK_OPTIONS),
            ("form", FORMS),
            ("loss", losses.LOSS_OPTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"patch: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass
class _State:
    """What `patch` remembers on the model it was given."""

    fingerprint: Any
    report: Report


def patch(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    blocks: str = "auto",
    stack: str = "auto",
    form: str = "auto",
    loss: str = "auto",
    verify: bool = True,
    checkpoint: Any = None,
    memory: int | str | None = None,
    batch: int | None = None,
    seq: int | None = None,
) -> nn.Module:
    """Let the model compute through fastpeft's operators; returns the same model.

    Takes a fastpeft model, a `peft.PeftModel`, or any module, with LoRA layers inside or without. Projections of one
    input (q/k/v, gate/up) become one operator call, norms and activations become operators, and a norm or an activation
    is one with the projections that read its output, which then is not kept for the backward. What is not recognised,
    or does not agree with the original when tried, stays as it is: see `report`. Calling it again does nothing unless
    adapters or options changed; then everything is planned anew. `unpatch` undoes it.

    Args:
        example_inputs: a small input for one forward of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments), by which shared inputs are found. Transformers models need none.
        blocks: whether norms, activations, rotary embeddings and attentions are replaced: "auto" where they are
            recognised, "never".
        stack: whether base weights of a group are laid side by side and multiplied at once: "auto" where that is not
            slower and keeps no more for the backward, "always" where it is possible, "never".
        form: how base product and adapter are put together, as in `ops.lora_linear_group`: "auto", "plain", "fused".
        loss: whether, with labels, the loss is computed without the logits: "auto" where a trial shows that it can be;
            "never". The model returns logits either way, which are then computed when somebody looks at them.
        verify: compare each replacement with what it replaces, forward and backward, before it is used.
        checkpoint: what the layers keep for the backward: "none", "selective", "mlp", "block" or "offload" (see
            `fastpeft.memory.modes`), a list with one for each layer, a dict {layer: mode, "*": mode}, or "auto", which
            plans for `memory`. None leaves checkpointing as it is. Takes effect in training, with adapters or without.
        memory: with checkpoint="auto", what a training step may occupy in all: bytes, or a text like "22GiB".
        batch, seq: with checkpoint="auto", rows of a step and tokens of a row.

    Raises:
        ValueError: an unknown value for `blocks`, `stack`, `form`, `loss` or `checkpoint`, or arguments that do not go
            together.
        fastpeft.memory.OverBudget: checkpoint="auto" and no plan fits into `memory`.
    """
    from ..memory import set_checkpointing

    options = Options(blocks, stack, form, loss, verify)
    options.check()
    with set_checkpointing(_root(model), checkpoint, memory, batch, seq):
        _patch_layers(model, example_inputs, options)
    return model


def _patch_layers(model: nn.Module, example_inputs: Any, options: Options) -> nn.Module:
    root = _root(model)
    before = root.__dict__.get(_STATE)
    if before is not None and before.fingerprint == _fingerprint(root, options):
        return model
    unpatch(root)
    with torch.inference_mode(False):
        try:
            scales.hold(root)
            # Below the forwards that open a group's extent, which call what they find.
            own = []
            if options.blocks == "auto":
                own = rotations.apply(root, example_inputs, options.verify)
                own += attentions.apply(root, example_inputs, options.verify)
            result = _patch(root, example_inputs, options)
            lent = experts.apply(root, example_inputs, options.verify)
            result.rows = [part for row in result.rows for part in lent.get(row.module, [row])]
            result.rows += own
            if options.loss == "auto":
                result.rows += losses.apply(root, example_inputs, options.verify)
        except BaseException:
            unpatch(root)
            raise
        scales.release(root, keep_patched=True)
    if not result.rows:
        return model
    root.__dict__[_STATE] = _State(_fingerprint(root, options), result)
    logger.info(result.summary())
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take everything that `patch` did off the model again, to the bit; returns the same model. No-op if unpatched."""
    from ..memory import remove_checkpointing

    remove_checkpointing(model)
    scales.release(model)
    for module in model.modules():
        module.__dict__.pop(_STATE, None)
    losses.remove(model)
    groups: dict[int, Group] = {}
    for module, forward in list(_forwards(model)):
        forward.active = False
        if isinstance(forward, ParentForward):
            groups.update((id(group), group) for group in forward.groups)
        elif isinstance(forward, LoraForward | PlainForward | ProducerForward) and forward.group is not None:
            groups[id(forward.group)] = forward.group
        _take_off(module, forward)
    for group in groups.values():
        _dissolve(group)
    return model


def report(model: nn.Module) -> Report:
    """What is fused in the model and what is not, with the reasons; the layers' checkpointing and its plan.

    For an unpatched model: everything is left.
    """
    from ..memory import installed, plan_of

    root = _root(model)
    memory: dict[str, Any] = {"checkpoint": installed(root), "plan": plan_of(root)}
    state: _State | None = root.__dict__.get(_STATE)
    if state is None:
        candidates = find_candidates(root)
        rows = [
            Row(c.name, c.kind, reason=c.reason or "the model is not patched; call fastpeft.patch(model)")
            for c in candidates
        ]
        return Report(rows, **memory)
    return replace(state.report, **memory)


def _patch(root: nn.Module, example_inputs: Any, options: Options) -> Report:
    candidates = find_candidates(root, options.verify)
    plain = find_plain(root)
    names = find_sources(root) if options.blocks == "auto" else {}
    usable = [c for c in candidates if c.reason is None]
    seen, note = None, None
    if len(usable) > 1 or (usable and plain) or names:
        seen, note = _observe(root, [*usable, *plain], list(names), example_inputs)
    plan = make_plan(root, candidates, plain, names, seen[0] if seen else None, options.stack)
    plan.note = note if candidates else None
    if not candidates and not plan.sources:
        return Report([], True)
    patching = _Patching(root, plan, options)
    patching.apply()
    # Without verification too: DoRA's groups see which of their outputs are rotated.
    if patching.groups and seen is not None and (options.verify or any(c.dora for c in candidates)):
        reason = _check_model(seen, patching)
        if reason is not None and options.verify:
            plan.note = f"no groups: {reason}"
            patching.ungroup()
    return Report(patching.report_rows(), True, plan.note)


class _Patching:
    """One run of `patch` on a model: what has been set so far, and the row that says so."""

    def __init__(self, root: nn.Module, plan: Plan, options: Options) -> None:
        self.root, self.plan, self.options = root, plan, options
        self.rows: dict[nn.Module, Row] = {}
        self.groups: list[Group] = []
        self.producers: list[ProducerForward] = []
        self._parents: dict[nn.Module, list[Group]] = {}

    def apply(self) -> None:
        """Set every planned forward that stands its trial."""
        joined = {planned.source.module: planned for planned in self.plan.groups if planned.source is not None}
        for source in self.plan.sources:
            self._apply_source(source, joined.get(source.module))
        for planned in self.plan.groups:
            if planned.source is None:
                self._apply_group(planned)
        given_up = {c.module: planned.apart for planned in self.plan.groups for c in planned.members if planned.apart}
        for candidate in self.plan.alone:
            row = _apply_alone(candidate, self.options.verify)
            if row.fused is not None and candidate.module in given_up:
                row = replace(row, form=f"{row.form}, not in a group: {given_up[candidate.module]}")
            self.rows[candidate.module] = row
        for parent, groups in self._parents.items():
            parent.__dict__["forward"] = ParentForward(parent, groups)

    def _apply_source(self, source: Source, planned: GroupPlan | None) -> None:
        forward: ProducerForward
        if isinstance(source.spec, NormSpec):
            forward = NormForward(source.module, source.spec)
        else:
            assert isinstance(source.spec, ActivationSpec)
            forward = ActivationForward(source.module, source.spec, source.gated)
        if planned is not None:
            self._apply_group(planned, forward)
        source.module.__dict__["forward"] = forward
        self.producers.append(forward)
        row = _source_row(source, planned if forward.group is not None else None)
        if planned is not None and planned.apart is not None:
            row = replace(row, form=f"{row.form}, not joined: {planned.apart}")
        self.rows[source.module] = row

    def _apply_group(self, planned: GroupPlan, producer: ProducerForward | None = None) -> None:
        """Set the members' forwards, if the group stands its trial; a producer gets the group. Else single layers."""
        group, reason = _build_group(self.root, planned, self.options, producer)
        if group is None:
            self.plan.alone += [c for c in planned.members if c.adapted]
            planned.apart = reason
            logger.debug("fastpeft: no group for %s: %s", planned.members[0].name, reason)
            return
        if planned.caller is not None and len(planned.members) > 1:
            self._parents.setdefault(planned.caller, []).append(group)
        self.groups.append(group)
        for candidate in planned.members:
            self.rows[candidate.module] = _group_row(candidate, planned, group)

    def ungroup(self) -> None:
        """Take all groups off: their layers, norms and activations stand alone."""
        by_module = {c.module: c for c in self.plan.candidates}
        sources = {source.module: source for source in self.plan.sources}
        members = {m.module: m for group in self.groups for m in group.members}
        for module, forward in list(_forwards(self.root)):
            if isinstance(forward, ParentForward) or module in members:
                forward.active = False
                _take_off(module, forward)
        for producer in self.producers:
            producer.group = None
            self.rows[producer.module] = _source_row(sources[producer.module], None)
        for group in self.groups:
            _dissolve(group)
        for module in members:
            self.rows.pop(module, None)
            if module in by_module and by_module[module].adapted:
                self.rows[module] = _apply_alone(by_module[module], self.options.verify)
        self.groups = []

    def report_rows(self) -> list[Row]:
        """The rows in the order of the model's modules; a candidate without one is left."""
        for candidate in self.plan.candidates:
            if candidate.module not in self.rows:
                reason = candidate.reason or "no active adapter"
                self.rows[candidate.module] = Row(candidate.name, candidate.kind, reason=reason)
        order = {module: index for index, module in enumerate(self.root.modules())}
        return [self.rows[m] for m in sorted(self.rows, key=lambda m: order[m])]


def _observe(
    root: nn.Module, watched: list[Candidate], sources: list[nn.Module], example_inputs: Any
) -> tuple[Any, str | None]:
    """((observation, call) or None, and why there is none)."""
    try:
        target, args, kwargs = example_call(root, example_inputs)
        modules = [c.module for c in watched]
        seen = observe(modules, target, args, kwargs, sources)
        if sources:  # what is to be computed in one in training must be one there too
            seen.products = observe(modules, target, args, kwargs, sources, training=True).products
        return (seen, (target, args, kwargs)), None
    except NoInput as why:
        return None, f"no groups were looked for: {why}; pass example_inputs="
    except Exception as error:  # whatever the model's own code raises: it is not ours to judge
        return None, f"no groups were looked for: a trial forward failed with {type(error).__name__}: {error}"


def _build_group(
    root: nn.Module, plan: GroupPlan, options: Options, producer: ProducerForward | None
) -> tuple[Group | None, str | None]:
    """The group with its weights laid out and its members' forwards set; (None, why) if it must not be used."""
    members: list[LoraForward | PlainForward] = []
    for candidate in plan.members:
        if candidate.reading is None:
            members.append(PlainForward(candidate.module))
        else:
            members.append(LoraForward(candidate.module, candidate.reading, candidate.native))
    names = {module: name for name, module in root.named_modules()}
    around = [m for m in plan.between if m in names] if producer is not None else []
    group = Group(members, [_home(root, names[m]) for m in [*(c.module for c in plan.members), *around]], around)
    group.form = options.form
    if plan.one_product != "never":
        bases: list[Any] = [m.reading.base if isinstance(m, LoraForward) else m.module for m in members]
        group.stack = Stack([base.weight for base in bases])
        if bases[0].bias is not None:
            group.bias_stack = Stack([base.bias for base in bases])
        group.one_product = plan.one_product
    reason = None
    adapted = any(c.adapted for c in plan.members)
    if options.verify and adapted:
        reason = verify_group(group)
    if options.verify and reason is None and producer is not None:
        reason = verify_joined(group, producer)
        if reason is not None and adapted and plan.caller is not None and len(members) > 1:
            logger.debug("fastpeft: %s computes alone: %s", plan.members[0].name, reason)
            plan.apart, reason, producer, plan.source = reason, None, None, None  # a group all the same
    if reason is not None:
        _dissolve(group)
        return None, reason
    for member in members:
        member.module.__dict__["forward"] = member
    if producer is not None:
        producer.group = group
    return group, None


def _apply_alone(candidate: Candidate, verify: bool) -> Row:
    assert candidate.reading is not None
    operator = _operator_of(candidate)
    if candidate.native:
        return Row(candidate.name, candidate.kind, operator, "the layer's own forward")
    member = LoraForward(candidate.module, candidate.reading, native=False)
    reason = verify_alone(member) if verify else None
    if reason is not None:
        return Row(candidate.name, candidate.kind, reason=f"its replacement does not agree: {reason}")
    candidate.module.__dict__["forward"] = member
    return Row(candidate.name, candidate.kind, operator, "one operator call")


def _operator_of(candidate: Candidate) -> str:
    return "dora_linear" if candidate.dora else "nf4_linear" if candidate.packed else "lora_linear"


def _check_model(seen: Any, patching: _Patching) -> str | None:
    """Run the observed forward on the patched model: does its code bear the outputs, and is the result the same?

    The outputs are given the strides of column blocks, which is what one product of stacked weights returns.
    """
    observation, (target, args, kwargs) = seen
    turned = rotations.of(patching.root)
    for group in patching.groups:
        group.probing = True
    for rotation in turned:
        rotation.probing = True
    try:
        again = run_quietly(target, args, kwargs)
    except Exception as error:
        return f"the patched model's forward fails with {type(error).__name__}: {error}"
    finally:
        for group in patching.groups:
            group.end_probing()
        for rotation in turned:
            rotation.probing = False
    return differ(observation.result, again, patching.root)


def _source_row(source: Source, plan: GroupPlan | None) -> Row:
    if plan is None:
        return Row(source.name, source.kind, source.spec.operator, "one operator call")
    names = ", ".join(c.name.rpartition(".")[2] for c in plan.members)
    return Row(source.name, source.kind, source.spec.operator, f"one operator with {names}, its output is not kept")


def _group_row(candidate: Candidate, plan: GroupPlan, group: Group) -> Row:
    names = ", ".join(c.name.rpartition(".")[2] for c in plan.members)
    operator = _operator_of(plan.members[0])
    if len(plan.members) > 1:
        operator = f"{'dora' if plan.members[0].dora else 'lora'}_linear_group of {names}"
    if not any(c.adapted for c in plan.members):
        operator = "linear"
    if plan.source is not None:
        operator += f", joined to {plan.source.name.rpartition('.')[2]}"
    form = {
        "never": f"adapters stacked, base weights apart: {plan.why}" if len(plan.members) > 1 else "",
        "always": f"one product of stacked weights: {plan.why}",
        "free": f"one product of stacked weights; in training one each: {plan.why}",
    }[group.one_product]
    return Row(candidate.name, candidate.kind, operator, form)


def _dissolve(group: Group) -> None:
    for stack in (group.stack, group.bias_stack):
        if stack is not None:
            stack.release()
    group.stack = group.bias_stack = None
    group.one_product = "never"


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Every forward of ours on the model, of a module's the outermost first: on top, or under accelerate's wrapper."""
    for module in model.modules():
        for key in ("forward", "_old_forward"):
            forward = module.__dict__.get(key)
            while isinstance(forward, Forward):
                yield module, forward
                forward = forward.previous


def _take_off(module: nn.Module, forward: Forward) -> None:
    """Put back what `forward` stood in place of. Under another library's wrapper it stays, passing every call on."""
    if module.__dict__.get("forward") is forward:
        if forward.previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = forward.previous
    if module.__dict__.get("_old_forward") is forward:
        module.__dict__["_old_forward"] = forward.__wrapped__


def _home(root: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """Where a module is registered, under which attribute, and itself."""
    parent, _, key = name.rpartition(".")
    home = root.get_submodule(parent)
    return home, key, home._modules[key]  # type: ignore[return-value]


def _root(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _fingerprint(root: nn.Module, options: Any) -> Any:
    """Changes when modules, adapters or options do."""
    layers = []
    module: Any
    for module in root.modules():
        if is_tuner_layer(module):
            names = sorted(name for key in ("lora_A", "lora_embedding_A") for name in getattr(module, key, {}))
            base, active = module._modules["base_layer"], list(module.active_adapters)
            layers.append((id(module), id(base), active, names, bool(module.merged_adapters)))
    return (options, layers, len(list(_forwards(root))))
