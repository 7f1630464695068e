"""Which modules does a config name? PEFT's rules, compiled once per config.

A list entry matches a module whose name is the entry or ends with ``.entry``; a string is a regular expression that
must match the whole name; ``"all-linear"`` is replaced by the list of the model's linear layers first.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

from ..layers.base import BaseTunerLayer
from ..layers.wrappers import AuxiliaryTrainingWrapper
from .constants import ALL_LINEAR, SEQ_CLS_HEAD_NAMES
from .walk import conv1d_class, is_transformers_model, named_modules

if TYPE_CHECKING:
    from ..configs import LoraConfig

T = TypeVar("T")


class _Excluded:
    """What a match yields for a module that the config excludes: false, and to be told from "no match"."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "EXCLUDED"


EXCLUDED = _Excluded()


class TargetOptions(Protocol):
    """The fields of a config that name modules."""

    target_modules: Any
    target_parameters: Any


def _names_matcher(names: str | Collection[str]) -> Callable[[str], bool]:
    """A predicate on module names: full match of a regular expression, or a name or dotted suffix from a list."""
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda key: pattern.fullmatch(key) is not None
    exact = frozenset(names)
    suffixes = tuple(f".{name}" for name in exact)
    return lambda key: key in exact or key.endswith(suffixes)


class TargetMatcher:
    """Decides for one config, module name by module name: targeted (`True`), not (`False`), or `EXCLUDED`."""

    def __init__(self, config: TargetOptions) -> None:
        targets = config.target_modules
        exclude = getattr(config, "exclude_modules", None)
        self._excluded = _names_matcher(exclude) if exclude else None
        # modules_to_save are regular expressions on a dotted part; the adapter must never be inside of such a module
        self._saved = [
            re.compile(rf"(^|.*\.){name}($|\..*)") for name in getattr(config, "modules_to_save", None) or ()
        ]
        self._targeted = _names_matcher(targets) if targets is not None else None
        self._listed = frozenset() if targets is None or isinstance(targets, str) else frozenset(targets)
        indices = getattr(config, "layers_to_transform", None)
        self._indices: frozenset[int] | None = None
        if not isinstance(targets, str) and indices is not None and indices != []:
            self._indices = frozenset([indices] if isinstance(indices, int) else indices)
        patterns = getattr(config, "layers_pattern", None) or [r"[^.]*"]
        prefix = r"(?:^|.*?\.)" if getattr(config, "layers_pattern", None) else r".*?\."
        # lazy, so that the first numbered part counts: the layer, not an expert inside of it
        self._layer_number = [
            re.compile(rf"{prefix}{pattern}\.(?P<index>\d+)\.")
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    def __call__(self, key: str) -> bool | _Excluded:
        """Is the module named `key` targeted?"""
        if self._excluded is not None and self._excluded(key):
            return EXCLUDED
        if any(pattern.match(key) for pattern in self._saved):
            return EXCLUDED
        if self._targeted is None or not self._targeted(key):
            return False
        # layers_to_transform thins out the suffix matches; a full name in the list is meant as it stands
        if self._indices is None or key in self._listed:
            return True
        for pattern in self._layer_number:
            if match := pattern.match(key):
                return int(match["index"]) in self._indices
        return False


def check_target_module_exists(config: TargetOptions, key: str) -> bool | _Excluded:
    """Is the module named `key` a target of `config`? `TargetMatcher` for one name."""
    return TargetMatcher(config)(key)


@functools.lru_cache(maxsize=16)
def _compile_patterns(patterns: tuple[str, ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((pattern, re.compile(rf"(.*\.)?({pattern})$")) for pattern in patterns)


def pattern_key(patterns: Iterable[str], key: str) -> str:
    """The first of `patterns` (of a `rank_pattern` or `alpha_pattern`) that matches the module name, else the name."""
    for pattern, compiled in _compile_patterns(tuple(patterns)):
        if compiled.match(key):
            return pattern
    return key


def pattern_value(patterns: Mapping[str, T] | None, key: str, default: T) -> T:
    """The rank or alpha of the module named `key`."""
    if not patterns:
        return default
    return patterns.get(pattern_key(patterns, key), default)


def unmatched_patterns(patterns: Mapping[str, Any] | None, keys: Iterable[str]) -> list[str]:
    """The entries of a `rank_pattern` or `alpha_pattern` that match none of the module names, sorted."""
    if not patterns:
        return []
    keys = list(keys)
    return sorted(
        pattern
        for pattern, compiled in _compile_patterns(tuple(patterns))
        if not any(compiled.match(key) for key in keys)
    )


def find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """The shortest suffixes that match all of `target_modules` and none of `other_module_names`.

    A list of hundreds of full names (as a converter writes it) becomes `{"q_proj", "v_proj"}`: faster to match, and
    an adapter file that a person can read.

    Raises:
        ValueError: `target_modules` is a string, empty, holds an empty name, or overlaps `other_module_names`.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if overlap := targets & others:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please "
            "open a GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue"
            f" (common: {sorted(overlap)[:3]})"
        )

    def suffixes(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]  # shortest first

    taken = {suffix for name in others for suffix in suffixes(name)}
    required: set[str] = set()
    for candidates in sorted(map(suffixes, targets)):  # sorted: the result must not depend on a set's order
        name = candidates[-1]
        if name.endswith(tuple(f".{suffix}" for suffix in required)):
            continue
        new = next((s for s in candidates if s not in required and s not in taken), None)
        if new is not None:
            required.add(new)
    return required or targets


def is_all_linear(target_modules: Any) -> bool:
    """Is this the shorthand `"all-linear"` (in any case)?"""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def include_all_linear_layers(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Replace `target_modules="all-linear"` by the names of the model's linear layers, in place.

    Left out: the output layer of a generating model, the head of a sequence classifier, and what is inside of adapters
    or in copies for `modules_to_save`.
    Of a model that is not a Transformers model nothing is known to be an output layer, so nothing is left out.
    """
    if not is_all_linear(config.target_modules):
        return config
    head = _output_layer(model, config)
    conv1d = conv1d_class()
    linear = (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)
    names = set()
    wrapped: tuple[str, ...] = ()
    for name, module in named_modules(model, into_adapters=False):
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapped += (f"{name}.",)
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            # an adapted layer is named after the layer it wraps
            is_linear = "Linear" in type(module).__name__
        else:
            is_linear = isinstance(module, linear)
        if is_linear and module is not head:
            names.add(name)
    config.target_modules = names
    return config


def _output_layer(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    if not is_transformers_model(model):
        return None
    output = model.get_output_embeddings()  # type: ignore[operator]
    if output is None and config.task_type == "SEQ_CLS":
        return next((head for name in SEQ_CLS_HEAD_NAMES if (head := getattr(model, name, None)) is not None), None)
    return output


def closest_names(target_modules: Any, keys: Iterable[str], limit: int = 4) -> list[str]:
    """Names of modules that somebody who wrote `target_modules` may have meant."""
    leaves = sorted({key.rpartition(".")[2] for key in keys} - {""})
    leaves = [leaf for leaf in leaves if not leaf.isdigit()]
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or ())
    found: dict[str, None] = {}
    for name in wanted:
        for close in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=limit, cutoff=0.5):
            found.setdefault(close)
    return list(found)[:limit]


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of all modules, sorted into `"matched"` and `"unmatched"` by the config of an adapter."""
    matcher = TargetMatcher(tuner.peft_config[adapter_name])
    result: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        result["matched" if matcher(key) else "unmatched"].append(key)
    return result
