"""`install_as_peft()`: `import peft` means fastpeft, for libraries that import peft and nothing else.

A finder at the head of `sys.meta_path` serves the module `peft` and its deep modules, each a facade over the table in
`names.py`: reading `peft.tuners.lora.layer.Linear` reads `fastpeft.layers.linear.Linear`, and assigning to it assigns
there. The same finder answers `importlib.metadata` (`version("peft")`). Nothing of any other library is changed.

Call it before anything imports peft, and before `transformers.Trainer` or TRL, which ask for peft at their own import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from .._bridge_hook import forget
from ..errors import FastpeftError, PeftWarning
from .names import PEFT_VERSION, is_package, names_of, package_of, submodules_of, where
from .placeholders import placeholder

# Modules that ask for peft while they are imported, and then never again.
_ASK_ONCE = ("transformers.trainer", "transformers.trainer_utils", "trl.trainer.utils", "diffusers.utils.import_utils")


def install_as_peft() -> None:
    """Make `import peft` mean fastpeft in this process, also where the real peft is installed. Twice is once.

    Raises:
        FastpeftError: the real peft has been imported already, so that its classes are in use.
    """
    if _finder in sys.meta_path:
        return
    if "peft" in sys.modules:
        version = getattr(sys.modules["peft"], "__version__", "of unknown version")
        raise FastpeftError(
            f"install_as_peft: the real peft {version} is already imported in this process, and other modules may hold "
            "its classes. Call fastpeft.install_as_peft() first thing, before peft, transformers' Trainer or TRL are "
            "imported and before a fastpeft config or model is made (where peft is installed, that imports it)."
        )
    too_early = [name for name in _ASK_ONCE if name in sys.modules] if importlib.util.find_spec("peft") is None else []
    if too_early:
        warnings.warn(
            f"install_as_peft: {', '.join(too_early)} had been imported before and found no peft, which cannot be "
            "undone. Call fastpeft.install_as_peft() before importing them.",
            PeftWarning,
            stacklevel=2,
        )
    sys.meta_path.insert(0, _finder)
    _forget_answers()


def uninstall_as_peft() -> None:
    """Take back `install_as_peft()`: `import peft` finds the real peft again, or nothing."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name, module in list(sys.modules.items()):
        if isinstance(module, PeftFacade):
            del sys.modules[name]
    _forget_answers()


def _forget_answers() -> None:
    """Drop what was concluded from the old meaning of `import peft`: our bridge, Transformers' cached answers."""
    forget()
    importlib.invalidate_caches()
    probes = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping"):
        clear = getattr(getattr(probes, name, None), "cache_clear", None)
        if clear is not None:
            clear()


_replaced: dict[tuple[str, str], list[Any]] = {}  # (module, attribute) -> its values before each assignment to it


class PeftFacade(ModuleType):
    """A module of peft's name whose attributes live in fastpeft."""

    __fastpeft__ = True

    def __getattr__(self, name: str) -> Any:
        module = self.__name__
        if name in submodules_of(module):
            return importlib.import_module(f"{module}.{name}")
        if name not in names_of(module):
            raise AttributeError(f"module {module!r} (fastpeft in peft's place) has no attribute {name!r}")
        home = where(module, name)
        if home is None:
            return placeholder(package_of(module, name), name)
        return getattr(importlib.import_module(home[0]), home[1])

    def __setattr__(self, name: str, value: Any) -> None:
        home = where(self.__name__, name) if name in names_of(self.__name__) else None
        if home is None:
            super().__setattr__(name, value)
        else:
            module = importlib.import_module(home[0])
            _replaced.setdefault(home, []).append(getattr(module, home[1]))
            setattr(module, home[1], value)

    def __delattr__(self, name: str) -> None:
        home = where(self.__name__, name) if name in names_of(self.__name__) else None
        if home is None or not _replaced.get(home):
            super().__delattr__(name)
        else:  # deleting what was assigned brings back what was there: so do tests that patch a name undo it
            setattr(importlib.import_module(home[0]), home[1], _replaced[home].pop())

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names_of(self.__name__), *submodules_of(self.__name__)})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the facades, and is peft's distribution in the eyes of `importlib.metadata`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("peft."):
            return None
        if not names_of(fullname) and not is_package(fullname):
            return None  # its parent's search path is empty: the import fails in the usual words
        return importlib.machinery.ModuleSpec(fullname, self, origin="fastpeft", is_package=is_package(fullname))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return PeftFacade(spec.name, f"fastpeft in the place of {spec.name}: see fastpeft.install_as_peft.")

    def exec_module(self, module: ModuleType) -> None:
        public = [name for name in names_of(module.__name__) if not name.startswith("_")]
        module.__dict__["__all__"] = sorted(public)
        if module.__name__ == "peft":
            module.__dict__["__version__"] = PEFT_VERSION

    @staticmethod
    def find_distributions(
        context: importlib.metadata.DistributionFinder.Context | None = None,
    ) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name is None or context.name == "peft":
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    """The metadata of the PEFT release whose interface fastpeft has."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: peft\nVersion: {PEFT_VERSION}\nSummary: fastpeft in peft's place\n"
        return "peft\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: fastpeft stands in peft's place (install_as_peft), peft has no files")


_finder = _Finder()
