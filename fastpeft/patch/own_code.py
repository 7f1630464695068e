"""A module's own forward in which some names of its file stand for other things.

So an operator takes the place of a function that a forward calls, or of what it asks for one. The code is the class's;
its file's other names are read where they are. No class and no file is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import CellType, FunctionType
from typing import Any, Protocol

from torch import Tensor, nn

from .forwards import Forward, eager
from .observe import run_quietly
from .tolerance import differ


class Substitute(Protocol):
    """What takes a name's place in the code of one or more modules."""

    probing: bool  # inputs too small to be worth it are computed too

    def stand_in(self, home: dict[str, Any], name: str) -> Any:
        """What the code finds under `name`; home: the names of its file."""


class OwnCodeForward(Forward):
    """The module's own code, which finds the substitutes under their names."""

    __slots__ = ("own", "source", "substitutes")

    def __init__(self, module: nn.Module, substitutes: dict[str, Substitute]) -> None:
        """substitutes: by name. The module has no other forward than its class's."""
        super().__init__(module)
        self.substitutes = substitutes
        self._build()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.own
        if own is None or not self.active or not eager() or type(self.module).forward is not self.source:
            return self.original(*args, **kwargs)
        return own(self.module, *args, **kwargs)

    def replace(self, substitutes: dict[str, Substitute]) -> None:
        """Have these from now on."""
        self.substitutes = substitutes
        self._build()

    def _build(self) -> None:
        self.source: Any = type(self.module).forward
        function = innermost(self.source)
        self.own: Any = None
        if function is not None and all(name in function.__globals__ for name in self.substitutes):
            home = function.__globals__
            self.own = with_names(self.source, {n: s.stand_in(home, n) for n, s in self.substitutes.items()})

    def __getstate__(self) -> Any:
        return (self.module, self.previous, self.active, self.substitutes)

    def __setstate__(self, state: Any) -> None:
        self.module, self.previous, self.active, self.substitutes = state
        self._build()


def of_module(module: nn.Module) -> OwnCodeForward | None:
    """The module's forward of this kind, under whatever else stands on it."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, Forward):
        if isinstance(forward, OwnCodeForward):
            return forward
        forward = forward.previous
    return None


def try_model(
    substitutes: Iterable[Substitute],
    target: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    before: list[Tensor] | None,
) -> str | None:
    """Run the model with the substitutes, whatever the size: what is wrong, None where it returns `before` again.

    before: None where the result is not asked for.
    """
    probed = list(substitutes)
    for substitute in probed:
        substitute.probing = True
    try:
        after = run_quietly(target, args, kwargs)
    except Exception as error:
        return f"the model's forward fails with the operator: {type(error).__name__}: {error}"
    finally:
        for substitute in probed:
            substitute.probing = False
    return None if before is None else differ(before, after, target)


def take_off(forward: OwnCodeForward, names: set[str]) -> None:
    """Leave the substitutes of these names out; without any the forward comes off its module, on which it is alone."""
    rest = {name: s for name, s in forward.substitutes.items() if name not in names}
    if rest:
        forward.replace(rest)
    else:
        forward.active = False
        del forward.module.__dict__["forward"]


class _Names(dict[str, Any]):
    """A file's names, each read where it is when it is asked for, but for those that are in here."""

    def __init__(self, home: dict[str, Any], own: dict[str, Any]) -> None:
        super().__init__(own)
        self.home = home

    def __missing__(self, name: str) -> Any:
        return self.home[name]


def with_names(function: Any, names: dict[str, Any]) -> FunctionType:
    """A function of the same code for which some names of its file stand for other things; inside its decorators."""
    closure, inner = function.__closure__, function.__dict__.get("__wrapped__")
    home: dict[str, Any] = function.__globals__
    if inner is not None:
        rebuilt = with_names(inner, names)
        closure = tuple(CellType(rebuilt) if _content(cell) is inner else cell for cell in closure)
    else:
        own = {"__builtins__": home["__builtins__"], "__name__": home.get("__name__"), **names}
        home = _Names(home, own)
    made = FunctionType(function.__code__, home, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
    made.__annotations__, made.__doc__, made.__qualname__ = (
        function.__annotations__,
        function.__doc__,
        function.__qualname__,
    )
    made.__dict__.update(function.__dict__)
    if inner is not None:
        made.__dict__["__wrapped__"] = rebuilt
    return made


def innermost(function: Any) -> FunctionType | None:
    """The function inside its decorators; None where one of them does not hold it in a variable of its own."""
    while type(function) is FunctionType:
        inner = function.__dict__.get("__wrapped__")
        if inner is None:
            return function
        if not any(_content(cell) is inner for cell in function.__closure__ or ()):
            return None
        function = inner
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def replaced(module: nn.Module) -> bool:
    """Not the class's forward runs, but one that other code has set."""
    return "forward" in module.__dict__ or "_hf_hook" in module.__dict__
