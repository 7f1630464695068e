"""Adapter configs: one dataclass per method, read and written as PEFT's JSON."""

from fastpeft.configs.base import (
    CONFIG_CLASSES,
    CONFIG_NAME,
    PeftConfig,
    PeftConfigMixin,
    config_class,
    register_config,
)
from fastpeft.configs.lora import LoraConfig
from fastpeft.configs.lora_parts import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from fastpeft.configs.types import PeftType, TaskType

__all__ = [
    "CONFIG_CLASSES",
    "CONFIG_NAME",
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PeftType",
    "TaskType",
    "VeloraConfig",
    "config_class",
    "register_config",
]
