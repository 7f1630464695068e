"""Rotary embeddings inside a module's own code, found by watching what its functions are given and return.

An attention's forward calls a function of its file with q, k and the tables. One tiny forward shows which function that
is, and random numbers whether it computes a form of `rope`: output and gradients against float64, with at most twice
the function's own error. Then the module's own code finds an operator under that function's name (`own_code`), and
arguments unlike those that were tried go to the function itself.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.glu import NATIVE_ELEMENTS
from ..ops.rope import rope, rotate
from .forwards import TENSORS, eager
from .inputs import NoInput, example_call
from .observe import run_quietly
from .own_code import OwnCodeForward, innermost, of_module, replaced, try_model, with_names
from .reading import FLOATS
from .recognise import _SAME, mode_of
from .report import Row
from .tolerance import FORMULA, agrees, distance, with_gradients

_KIND = "RoPE"
_TOKENS = 24  # of a trial


@dataclass(frozen=True)
class Form:
    """Where a function has its operands, and what it does with them."""

    positional: int  # arguments given by position, then those by name
    names: tuple[str, ...]
    places: tuple[int, int | None, int, int]  # of q, k, cos, sin among all arguments
    others: tuple[tuple[int, Any], ...]  # the other arguments and their values
    interleaved: bool
    pairs: bool
    half: bool  # the function reads the first half of the tables only
    transposed: bool  # q is (B, T, H, D)

    def operands(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
        """q, k, cos and sin as `rope` takes them; None for arguments of another kind."""
        if len(args) != self.positional or tuple(kwargs) != self.names:
            return None
        values = (*args, *kwargs.values())
        if any(type(values[i]) is not type(value) or values[i] != value for i, value in self.others):
            return None
        picked: list[Any] = [None if i is None else values[i] for i in self.places]
        q, k, cos, sin = picked
        if any(type(t) not in TENSORS for t in (q, cos, sin)) or (k is not None and type(k) not in TENSORS):
            return None
        if q.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.dtype != sin.dtype:
            return None
        if self.transposed:
            q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
        if k is not None:
            if k.dim() != 4 or k.dtype != q.dtype or k.device != q.device:
                return None
            if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
                return None
        if cos.device != q.device or sin.device != q.device or cos.shape[1] != q.shape[2]:
            return None
        if self.half:
            half = cos.shape[-1] // 2
            cos, sin = cos[..., :half], sin[..., :half]
        columns = cos.shape[-1] * (2 if self.pairs else 1)
        if cos.shape[0] not in (1, q.shape[0]) or columns % 2 or not 0 < columns <= q.shape[-1]:
            return None
        return q, k, cos, sin

    def arguments(self, tensors: tuple[Tensor | None, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The function's arguments with these for q, k, cos, sin."""
        values: list[Any] = [None] * (self.positional + len(self.names))
        for i, value in self.others:
            values[i] = value
        for place, tensor in zip(self.places, tensors):
            if place is not None:
                values[place] = tensor
        return tuple(values[: self.positional]), dict(zip(self.names, values[self.positional :]))

    def result(self, q: Tensor, k: Tensor | None) -> Any:
        """What the function returns, from rotated q and k."""
        if self.transposed:
            q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
        return q if k is None else (q, k)


class Rotation:
    """What a function computes, and for which dtypes and widths it has been tried. Modules alike share one."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.kinds: dict[Any, bool] = {}
        self.probing = False  # inputs too small to be worth it are computed too

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's result; None where `function` itself must run."""
        found = self.form.operands(args, kwargs)
        if found is None:
            return None
        q, k, cos, sin = found
        if q.numel() <= NATIVE_ELEMENTS and torch.is_grad_enabled() and not self.probing:
            return None
        table = cos.shape[-1] * (2 if self.form.half else 1)
        kind = (mode_of(q), cos.dtype, q.shape[-1], table, q.device)
        if kind not in self.kinds:
            # In a thread of its own no mode, hook or graph of the step under way sees the trial.
            with ThreadPoolExecutor(1) as pool:
                self.kinds[kind] = pool.submit(self.tried, function, *kind).result()
        if not self.kinds[kind]:
            return None
        return self.form.result(*rope(q, k, cos, sin, self.form.interleaved, self.form.pairs))

    def tried(self, function: Any, mode: Any, table_dtype: Any, width: int, columns: int, device: Any) -> bool:
        """Does the function compute the form, and do function and operator agree, forward and backward?"""
        dtype, autocast = mode
        if dtype not in FLOATS or table_dtype not in FLOATS or FORMULA.keys().isdisjoint((dtype,)):
            return False
        # Strictly in float64 first: a function near the formula would else excuse the operator's distance from it.
        found = self._compare(function, torch.float64, None, torch.float64, width, columns, device)
        if found is None or not all(distance(other, true) <= _SAME for _, other, true in found):
            return False
        found = self._compare(function, dtype, autocast, table_dtype, width, columns, device)
        if found is None:
            return False
        for mine, other, true in found:
            if other.dtype != dtype or mine.dtype != dtype:
                return False
            if not agrees(mine, other, true):
                return False
        return True

    def _compare(
        self, function: Any, dtype: Any, autocast: Any, table_dtype: Any, width: int, columns: int, device: Any
    ) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """(ours, the function's, in float64) of each result and gradient on random numbers; None if it fails."""
        if device.type == "meta":  # nothing can be computed there; the function is the same on a CPU
            device = torch.device("cpu")
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        heads = (3, 2) if self.form.places[1] is not None else (3,)
        xs = [noise(2, h, _TOKENS, width).to(dtype) for h in heads]
        dys = [noise(2, h, _TOKENS, width).to(dtype) for h in heads]
        # Any numbers do, and show which columns of the tables are read.
        tables = [noise(2, _TOKENS, columns).to(table_dtype) for _ in range(2)]
        outer = [x.transpose(1, 2) if self.form.transposed else x for x in xs]
        douter = [dy.transpose(1, 2) if self.form.transposed else dy for dy in dys]
        try:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                theirs = with_gradients(lambda *x: self._of(function, x, tables), outer, douter)
                ours = with_gradients(lambda *x: self._ours(x, tables), outer, douter)
        except Exception:  # whatever the function raises for what it was not made for
            return None
        with torch.autocast(device.type, enabled=False):
            wide = [t.double() for t in tables]
            truth = with_gradients(
                lambda *x: self._exact(x, wide), [t.double() for t in outer], [t.double() for t in douter]
            )
        if any(other.shape != true.shape for other, true in zip(theirs, truth, strict=True)):
            return None
        return list(zip(ours, theirs, truth, strict=True))

    def _of(self, function: Any, x: tuple[Tensor, ...], tables: list[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = self.form.arguments((x[0], x[1] if len(x) > 1 else None, *tables))
        found = function(*args, **kwargs)
        return found if isinstance(found, tuple) else (found,)

    def _ours(self, x: tuple[Tensor, ...], tables: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, cos, sin = self._operands(x, tables)
        found = self.form.result(*rope(q, k, cos, sin, self.form.interleaved, self.form.pairs))
        return found if isinstance(found, tuple) else (found,)

    def _exact(self, x: tuple[Tensor, ...], tables: list[Tensor]) -> tuple[Tensor, ...]:
        q, k, cos, sin = self._operands(x, tables)
        done = [
            None if t is None else rotate(t, cos, sin, self.form.interleaved, self.form.pairs, False) for t in (q, k)
        ]
        found = self.form.result(*done)  # type: ignore[arg-type]
        return found if isinstance(found, tuple) else (found,)

    def _operands(self, x: tuple[Tensor, ...], tables: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        found = self.form.operands(*self.form.arguments((x[0], x[1] if len(x) > 1 else None, *tables)))
        if found is None:
            raise ValueError("no operands of this form")
        return found

    def stand_in(self, home: dict[str, Any], name: str) -> Any:
        """What a module's code finds under the function's name."""
        return _Instead(home, name, self)

    def __deepcopy__(self, memo: Any) -> Rotation:
        return self

    def __getstate__(self) -> Any:
        return self.form  # elsewhere the functions may be others: they are tried again

    def __setstate__(self, form: Any) -> None:
        self.form, self.kinds, self.probing = form, {}, False


class _Instead:
    """The operator where the rotation says so, else the function."""

    __slots__ = ("function", "home", "name", "rotation")

    def __init__(self, home: dict[str, Any], name: str, rotation: Rotation) -> None:
        self.home, self.name, self.rotation = home, name, rotation
        self.function = home[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = self.home[self.name]
        if function is self.function and eager():
            found = self.rotation(function, args, kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)  # also one that other code has put there since


@dataclass
class Call:
    """A call of a function with what may be q, k and tables, and its results."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...]


def apply(root: nn.Module, example_inputs: Any, verify: bool) -> list[Row]:
    """Put the forwards on; a row for each module that has a rotary embedding. On an exception the caller unpatches."""
    functions = {module: found for module in root.modules() if (found := _functions(type(module).forward))}
    modules = [module for module in functions if not replaced(module)]
    try:
        target, args, kwargs = example_call(root, example_inputs)
        before, calls = _record(modules, functions, target, args, kwargs) if modules else ([], {})
    except NoInput:
        return []
    except Exception:  # whatever the model's own code raises; the report's note says so for the whole of the model
        return []
    known: dict[Any, Rotation | None] = {}
    names = {module: name for name, module in root.named_modules()}
    rows: dict[nn.Module, Row] = {}
    done: dict[nn.Module, OwnCodeForward] = {}
    for module, its_calls in calls.items():
        rotations: dict[str, Rotation] = {}
        for call in its_calls:
            rotation = recognise(call, known)
            if rotation is not None:
                rotations.setdefault(call.name, rotation)
        if not rotations:
            what = ", ".join(dict.fromkeys(call.name for call in its_calls))
            rows[module] = Row(names[module], _KIND, reason=f"no fused form for what {what} computes")
            continue
        done[module] = OwnCodeForward(module, dict(rotations))
        rows[module] = Row(names[module], _KIND, "rope", "one operator call in its own code")
    for module, forward in done.items():
        module.__dict__["forward"] = forward
    reason = _check(target, args, kwargs, before, done) if done and verify else None
    if reason is not None:
        for module, forward in done.items():
            forward.active = False
            del module.__dict__["forward"]
            rows[module] = Row(names[module], _KIND, reason=reason)
    sources = {type(module).forward for module in done}
    for module in functions:
        if replaced(module) and module not in done and type(module).forward in sources:
            rows[module] = Row(names[module], _KIND, reason="other code has replaced its forward")
    return list(rows.values())


def of(root: nn.Module) -> list[Rotation]:
    """The rotations that have been put on the model's modules."""
    forwards = [forward for module in root.modules() if (forward := of_module(module)) is not None]
    found = {id(s): s for forward in forwards for s in forward.substitutes.values() if isinstance(s, Rotation)}
    return list(found.values())


def recognise(call: Call, known: dict[Any, Rotation | None]) -> Rotation | None:
    """The form of `rope` that the call's function computes, or None. known: what has been found so far."""
    values = (*call.args, *call.kwargs.values())
    x = next(v for v in values if isinstance(v, Tensor))
    shapes = tuple((t.shape[-1], t.dtype, t.device) for t in values if isinstance(t, Tensor))
    key = (call.function, len(call.args), tuple(call.kwargs), shapes)
    if key not in known:
        known[key] = None
        for form in _forms(call):
            rotation = Rotation(form)
            table = values[form.places[2]]
            here, sizes = mode_of(x), (x.shape[-1], table.shape[-1], x.device)
            # Patched under autocast: what counts is whether the function can be replaced outside it, or within.
            modes = [here] if here[1] is None else [here, (table.dtype, None)]
            if not _is_result(rotation, call):
                continue
            for mode in modes:
                rotation.kinds[(mode, table.dtype, *sizes)] = rotation.tried(call.function, mode, table.dtype, *sizes)
            if any(rotation.kinds.values()):
                known[key] = rotation
                break
    return known[key]


def _forms(call: Call) -> Iterator[Form]:
    values = (*call.args, *call.kwargs.values())
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    others = tuple((i, v) for i, v in enumerate(values) if i not in tensors)
    if not all(isinstance(v, int | float | str | None) for _, v in others):
        return
    q, k = tensors[0], tensors[1] if len(tensors) == 4 else None
    tables = tensors[-2:]
    for transposed, interleaved, swapped in itertools.product((False, True), repeat=3):
        cos, sin = reversed(tables) if swapped else tables
        for pairs, half in ((False, False), (True, False), (True, True)):
            places = (q, k, cos, sin)
            yield Form(len(call.args), tuple(call.kwargs), places, others, interleaved, pairs, half, transposed)


def _is_result(rotation: Rotation, call: Call) -> bool:
    found = rotation.form.operands(call.args, call.kwargs)
    if found is None:
        return False
    if found[0].is_meta:  # no numbers; those of the trial decide
        return True
    q, k, cos, sin = (None if t is None else t.double() for t in found)
    form = rotation.form
    exact = [rotate(t, cos, sin, form.interleaved, form.pairs, False) for t in (q, k) if t is not None]  # type: ignore[arg-type]
    if form.transposed:
        exact = [t.transpose(1, 2) for t in exact]
    return len(exact) == len(call.results) and all(
        a.shape == b.shape and a.dtype in FORMULA and distance(a, b) <= FORMULA[a.dtype]
        for a, b in zip(call.results, exact)
    )


def _record(
    modules: list[nn.Module],
    functions: dict[nn.Module, list[str]],
    target: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[list[Tensor], dict[nn.Module, list[Call]]]:
    """Run the model once: what it returned, and the calls that may be rotary embeddings by the module they are in."""
    calls: dict[nn.Module, list[Call]] = {}

    def recorder(module: nn.Module, name: str, function: Any) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            held = _held(args, kwargs)
            result = function(*args, **kwargs)
            results = (result,) if type(result) is Tensor else result
            if held is not None and type(results) is tuple and all(type(t) is Tensor for t in results):
                values = [t for t in (*held[0], *held[1].values()) if isinstance(t, Tensor)]
                if [t.shape for t in results] == [t.shape for t in values[:-2]]:
                    found = tuple(t.detach().clone() for t in results)
                    calls.setdefault(module, []).append(Call(name, function, *held, found))
            return result

        return recorded

    try:
        for module in modules:
            source: Any = type(module).forward
            home = innermost(source).__globals__  # type: ignore[union-attr]
            new = {name: recorder(module, name, home[name]) for name in functions[module]}
            module.__dict__["forward"] = MethodType(with_names(source, new), module)
        return run_quietly(target, args, kwargs), calls
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _held(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Copies of arguments that may be q, perhaps k, and two tables; None for others."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if len(tensors) not in (3, 4) or not all(type(t) in TENSORS and t.is_floating_point() for t in tensors):
        return None
    if any(t.dim() != 4 for t in tensors[:-2]) or any(t.dim() != 3 for t in tensors[-2:]):
        return None
    copies = [v.detach().clone() if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())]
    return tuple(copies[: len(args)]), dict(zip(kwargs, copies[len(args) :]))


def _check(
    target: nn.Module, args: Any, kwargs: Any, before: list[Tensor], done: dict[nn.Module, OwnCodeForward]
) -> str | None:
    """Run the model again with the forwards in place: the same result?"""
    substitutes = (s for forward in done.values() for s in forward.substitutes.values())
    return try_model(substitutes, target, args, kwargs, before)


def _functions(forward: Any) -> list[str]:
    """The names by which a forward's code calls functions of its file."""
    function = innermost(forward)
    if function is None or "globals" in function.__code__.co_names or function.__module__.startswith("torch."):
        return []
    found = [n for n in function.__code__.co_names if type(function.__globals__.get(n)) is FunctionType]
    if found and any(i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for i in dis.get_instructions(function.__code__)):
        return []
    return found
