"""What `import peft` gives for a method of PEFT's that fastpeft does not implement.

Other libraries import such names at module level (TRL imports `PrefixTuningConfig`), so the import has to work: the
name is a class that nothing is an instance of, a function, or an empty table. Using the class or the function is an
error that says what is implemented.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from ..configs import CONFIG_CLASSES, PeftType
from ..errors import UnsupportedOptionError


class _Placeholder(type):
    """Metaclass: the class can be imported, named in annotations and asked for in `isinstance`, and nothing else."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOptionError(_message(cls.__module__, cls.__name__))

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(f"{cls.__name__}.{name}: {_message(cls.__module__, cls.__name__)}")


@cache
def placeholder(module: str, name: str) -> Any:
    """The stand-in of `module.name`: an empty table, a class or a function, as the name is written like one."""
    if name.isupper():
        return {}
    if name.lstrip("_")[:1].isupper():
        return _Placeholder(name, (), {"__module__": module, "__doc__": _message(module, name, methods=False)})

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOptionError(_message(module, name))

    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    function.__doc__ = _message(module, name, methods=False)
    return function


def _message(module: str, name: str, *, methods: bool = True) -> str:
    text = f"{module}.{name} is not implemented by fastpeft, which stands in peft's place here (install_as_peft)."
    if not methods:
        return text
    implemented = ", ".join(sorted(PeftType(kind).value for kind in CONFIG_CLASSES))
    return f"{text} Implemented methods: {implemented}. For any other, install peft and import it instead."
