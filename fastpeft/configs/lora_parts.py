"""LoRA's nested configs, as data: PEFT's fields, defaults and checks, so that its files go both ways unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass
class LoraRuntimeConfig:
    """Options of this run, never saved: `ephemeral_gpu_offload` computes on the GPU with parts kept on the CPU."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ initialisation: `loftq_bits` of the quantised base, `loftq_iter` alternating steps."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class VeloraConfig:
    """VeLoRA, arXiv:2405.17991: the input of A is kept for the backward as one projection per group of features."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        _require(self.num_groups > 0, f"`num_groups` should be positive, got {self.num_groups}.")
        _require(self.scale > 0, f"`scale` should be positive, got {self.scale}.")
        _require(
            self.init_type in ("batch_average_once", "batch_average", "random"),
            f"Unsupported `init_type` {self.init_type!r}. Supported values are 'batch_average_once', 'batch_average', "
            "and 'random'.",
        )


@dataclass
class ArrowConfig:
    """Arrow routing among trained LoRA adapters, arXiv:2405.11157, with GenKnowSub when `use_gks`."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _require(self.top_k > 0, "top_k cannot be negative.")
        _require(self.router_temperature > 0, "router_temperature must be greater than 0.")


@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA: A (B) of the modules named in `target_modules_bd_a` (`_b`) has `nblocks` diagonal blocks."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or [])
        _require(
            not both,
            f"Found overlapping modules in target_modules_bd lists:{self.target_modules_bd_a} (A) and "
            f"{self.target_modules_bd_b} (B).",
        )


@dataclass
class EvaConfig:
    """EVA initialisation, arXiv:2410.07170: singular vectors of the layers' inputs; ranks move up to `rho` times r."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _require(self.rho >= 1.0, "`rho` must be >= 1.0")
        _require(0.0 <= self.tau <= 1.0, "`tau` must be between 0.0 and 1.0.")


@dataclass
class KasaConfig:
    """KaSA, arXiv:2412.06071: a learnt diagonal between A and B; weights of its L2 and orthogonality regularisers."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        _require(self.beta >= 0, f"`beta` must be non-negative, got {self.beta}.")
        _require(self.gamma >= 0, f"`gamma` must be non-negative, got {self.gamma}.")


@dataclass
class CordaConfig:
    """CorDA initialisation, arXiv:2406.05223: instruction-previewed ("ipm") or knowledge-preserved ("kpm") mode."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA initialisation, arXiv:2407.05000: A and B from the singular vectors of the first gradient."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class MontecloraConfig:
    """Monte Carlo LoRA: the adapter's weights are sampled, `num_samples` a forward."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _require(self.num_samples > 0, "`num_samples` must be greater than 0.")
        _require(self.dirichlet_prior > 0, "`dirichlet_prior` must be greater than 0.")
        _require(self.buffer_size > 0, "`buffer_size` must be greater than 0.")


def part(value: Any, cls: type) -> Any:
    """A nested config: `None` and a `cls` as they are; a dict (from a file) and PEFT's own class become a `cls`."""
    if value is None or isinstance(value, cls):
        return value
    if is_dataclass(value) and type(value).__name__ == cls.__name__:
        value = vars(value)
    if isinstance(value, dict):
        names = {f.name for f in fields(cls) if f.init}
        return cls(**{key: item for key, item in value.items() if key in names})
    raise TypeError(f"`{cls.__name__}` must be a `{cls.__name__}`, a dict, or None.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
