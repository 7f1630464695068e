"""Adapters in a model: which modules, how they are put in, switched, merged and taken out."""

from .base import BaseTuner
from .lora import LoraModel
from .targets import (
    EXCLUDED,
    TargetMatcher,
    check_target_module_exists,
    find_minimal_target_modules,
    inspect_matched_modules,
)

__all__ = [
    "EXCLUDED",
    "BaseTuner",
    "LoraModel",
    "TargetMatcher",
    "check_target_module_exists",
    "find_minimal_target_modules",
    "inspect_matched_modules",
]
