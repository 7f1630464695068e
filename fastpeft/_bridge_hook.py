"""fastpeft's classes pass as peft's: `isinstance(model, peft.PeftModel)` is true where the real peft is installed.

Transformers, TRL, Accelerate and diffusers decide by `isinstance` against peft's classes. A class of fastpeft names its
counterpart in `_peft_name` and inherits `Bridged`; at its first instantiation, never at import, peft is imported and

* if the counterpart is an abstract base class (peft's layers and tuners), the class is *registered* with it: nothing
  else changes, `type(layer)` and every attribute lookup stay as they are;
* else (peft's configs, models, wrappers) instances are made of a *subclass* that also derives from the counterpart. In
  its method resolution order peft's classes stand behind `object`: every lookup and every `super()` ends in fastpeft's
  own classes, and no code of peft ever runs. Names that only peft's class has are hidden, so that the instance has
  exactly the attributes that it has without peft.

Without peft nothing happens at all. Pickles name the fastpeft class, so they load with and without peft.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import importlib
import importlib.util
import sys
import threading
import warnings
from abc import ABCMeta
from types import MappingProxyType
from typing import Any, ClassVar

_made: dict[type, type] = {}
_lock = threading.RLock()
_broken = False


class Bridged:
    """Mixin of the classes that pass as peft's: last among the bases; `_peft_name` is the counterpart's full name."""

    _peft_name: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(_made.get(cls) or bridged(cls))


def bridged(cls: type) -> type:
    """The class whose instances stand for `cls`: `cls` itself, or its cached subclass that is also peft's."""
    made = _made.get(cls)
    if made is None:
        with _lock:
            made = _made.get(cls) or _make(cls)
            _made[cls] = _made[made] = made
    return made


def forget() -> None:
    """Drop what was made, when what `import peft` means changes. Instances that exist keep their class."""
    global _broken
    with _lock:
        _made.clear()
        _broken = False


def _make(cls: type) -> type:
    counterpart = _counterpart(getattr(cls, "_peft_name", ""))
    if counterpart is None or issubclass(cls, counterpart):
        return cls
    if isinstance(counterpart, ABCMeta):
        counterpart.register(cls)
        return cls
    theirs = [base for base in counterpart.__mro__ if base not in cls.__mro__]
    namespace: dict[str, Any] = {
        name: _Hidden(name)
        for base in theirs
        for name in base.__dict__
        if not (name.startswith("__") and name.endswith("__")) and not hasattr(cls, name)
    }
    namespace |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__annotations__": dict(getattr(cls, "__annotations__", {})),
        "_order_of_bases": (*cls.__mro__, *theirs),
    }
    if dataclasses.is_dataclass(cls) and dataclasses.is_dataclass(counterpart):
        namespace["__dataclass_fields__"] = _annotated_fields(cls, counterpart)
    return _metaclass(type(cls))(cls.__name__, (cls, counterpart), namespace)


def _annotated_fields(cls: Any, counterpart: Any) -> dict[str, dataclasses.Field]:
    """The fields of `cls` with the metadata of peft's fields, which peft reads when it is handed such a config."""
    fields = {}
    for name, field in cls.__dataclass_fields__.items():
        theirs = counterpart.__dataclass_fields__.get(name)
        fields[name] = field = copy.copy(field)
        if theirs is not None:
            field.metadata = MappingProxyType({**theirs.metadata, **field.metadata})
    return fields


def _counterpart(name: str) -> type | None:
    """peft's class of that full name; None without it, or when `import peft` means fastpeft, or when peft is broken."""
    global _broken
    if not name or _broken:
        return None
    try:
        if "peft" not in sys.modules and importlib.util.find_spec("peft") is None:
            return None
        peft = importlib.import_module("peft")
    except Exception as error:  # whatever a broken install raises, fastpeft works without it
        _broken = True
        warnings.warn(
            f"peft is installed but cannot be imported ({type(error).__name__}: {error}). fastpeft works without it, "
            "but other libraries will not take its objects for peft's: repair or uninstall peft, or call "
            "fastpeft.install_as_peft() first.",
            stacklevel=5,
        )
        return None
    if getattr(peft, "__fastpeft__", False):
        return None
    module_name, _, class_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):  # an older peft, which has no such class: nobody can ask for it either
        return None


class _Hidden:
    """A name that only peft's class has: it reads as absent, so `__getattr__` is asked, as it is without peft."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")


_metaclasses: dict[type, type] = {}


def _metaclass(base: type) -> Any:
    """A subclass of the metaclass `base` that puts peft's classes behind `object` and pickles by the fastpeft class."""
    if base not in _metaclasses:

        def mro(cls: type) -> tuple[type, ...] | list[type]:
            order = cls.__dict__.get("_order_of_bases")
            return (cls, *order) if order else type.mro(cls)  # a further subclass: the usual merge keeps the order

        made = _metaclasses[base] = type("BridgedMeta", (base,), {"mro": mro})
        copyreg.pickle(made, _reduce_class)  # type: ignore[arg-type]
    return _metaclasses[base]


def _reduce_class(cls: type) -> Any:
    if "_order_of_bases" in cls.__dict__:
        return bridged, (cls.__bases__[0],)
    return cls.__qualname__  # an ordinary subclass somebody wrote: by name, as pickle does for any class
