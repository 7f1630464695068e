"""The config of LoRA: every field of PEFT 0.21, and one table of what is not implemented."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from fastpeft.configs.base import PeftConfig, register_config
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
    part,
)
from fastpeft.configs.types import PeftType
from fastpeft.errors import UnsupportedOptionError

# What PEFT has and fastpeft has not: a field that must keep its default, or `field=value`. Who implements one deletes
# its row. (`init_lora_weights` is compared in lower case and up to the first "_niter_".)
UNIMPLEMENTED: dict[str, str] = {
    "use_qalora": "QALoRA",
    "qalora_group_size": "QALoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron's parallel layers",
    "megatron_core": "Megatron's parallel layers",
    "runtime_config.ephemeral_gpu_offload": "ephemeral GPU offload",
}

# The initialisations there are, beside True and False.
INIT_METHODS = ("gaussian", "pissa", "olora", "corda", "lora_ga", "loftq", "orthogonal", "eva", "mica")

_PARTS: dict[str, type] = {
    "velora_config": VeloraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
    "monteclora_config": MontecloraConfig,
    "runtime_config": LoraRuntimeConfig,
}


@dataclass
class LoraConfig(PeftConfig):
    """How a model is adapted with LoRA (arXiv:2106.09685): y = W x + scaling · B A dropout(x), A and B of rank r.

    Args:
        r: the rank.
        target_modules: which modules: names (a module's name, or the end of it after a dot), one regular expression
            that matches the whole name, or "all-linear" for every linear layer but the output layer. None: those usual
            for the architecture.
        exclude_modules: names or a regular expression, of modules to leave out again.
        lora_alpha: scaling = lora_alpha / r.
        lora_dropout: the probability of a zero in the adapter's input during training.
        fan_in_fan_out: the weight is stored as (in, out), as in Transformers' `Conv1D`; corrected with a warning.
        bias: "none", or train and save the biases of all modules ("all") or of the adapted ones ("lora_only").
        use_rslora: scaling = lora_alpha / sqrt(r) instead.
        modules_to_save: modules trained in full and saved with the adapter, like a fresh classification head.
        init_lora_weights: True: A uniform, B zero, so that the adapter starts as nothing. "gaussian": A normal with
            deviation 1/r. False: both random, for debugging.
        layers_to_transform: only these layers of the stack (an index, or several).
        layers_pattern: the name of the `ModuleList` that `layers_to_transform` counts in, if it is an unusual one.
        rank_pattern: other ranks for some modules: {name or regular expression: r}.
        alpha_pattern: the same for `lora_alpha`.
        lora_bias: B has a bias.
        target_parameters: names of parameters to adapt that are no module's weight, like the stacked experts of a MoE
            (`"mlp.experts.gate_up_proj"`); a list.

    The other fields are PEFT's, kept so that its files load and are written unchanged. Those in `UNIMPLEMENTED` raise
    `UnsupportedOptionError` (a `NotImplementedError`) unless they have their default.
    """

    _peft_name: ClassVar[str] = "peft.LoraConfig"

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._custom_modules: dict[type, type] | None = None
        # With `ensure_weight_tying`, what follows the embedding; found when the adapter is made, and not saved.
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        for name, cls in _PARTS.items():
            setattr(self, name, part(getattr(self, name), cls))
        self._complete_init_method()
        self._check()
        check_implemented(self)

    def _complete_init_method(self) -> None:
        """Give the method of `init_lora_weights` the config it needs, and say which config is of no use."""
        method = self.init_lora_weights
        if method == "loftq":
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if isinstance(self.loftq_config, LoftQConfig):
                self.loftq_config = vars(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn(
                "`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.", stacklevel=4
            )
        for name, cls, title in (("eva", EvaConfig, "EVA"), ("corda", CordaConfig, "CorDA")):
            option = f"{name}_config"
            if method == name and getattr(self, option) is None:
                warnings.warn(
                    f"`init_lora_weights` is '{name}' but `{option}` is not specified. Using default {title} config.",
                    stacklevel=4,
                )
                setattr(self, option, cls())
            elif method != name and getattr(self, option) is not None:
                warnings.warn(
                    f"`{option}` specified but will be ignored when `init_lora_weights` is not '{name}'.", stacklevel=4
                )
        changes_base = str(method).startswith("pissa") or method in ("olora", "corda", "lora_ga")
        if changes_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                "base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
                "`path_initial_model_for_weight_conversion` to `save_pretrained` to restore the initial values of the "
                "base weights; if you intend to do this, do not use rslora or rank_pattern/alpha_pattern.",
                stacklevel=4,
            )

    def _check(self) -> None:
        """Raise on options that contradict each other."""
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn("aLoRA is currently only supported for CAUSAL_LM task.", stacklevel=4)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, without `runtime_config`, which belongs to this run and is never saved."""
        content = super().to_dict()
        del content["runtime_config"]
        return content

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Adapt modules of a class fastpeft does not know: {class of the module: class of its LoRA layer}.

        The LoRA layer takes the arguments of `fastpeft.layers.Linear`. The mapping is not saved.
        """
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


def check_implemented(config: LoraConfig) -> None:
    """Raise `UnsupportedOptionError`, naming field and method, if the config asks for something in `UNIMPLEMENTED`."""
    for option in fields(config):
        if option.name in UNIMPLEMENTED:
            default = option.default if option.default_factory is MISSING else option.default_factory()
            value = getattr(config, option.name)
            if value != default:
                _refuse(option.name, option.name, value, f"leave it at its default, {default!r}")
    if getattr(config.runtime_config, "ephemeral_gpu_offload", False):
        name = "runtime_config.ephemeral_gpu_offload"
        if name in UNIMPLEMENTED:
            _refuse(name, name, True, "leave it at its default, False")
    method = config.init_lora_weights
    if isinstance(method, str):
        check_init_method(method)


def check_init_method(method: str) -> None:
    """Raise if `init_lora_weights=method` is not implemented (`UnsupportedOptionError`) or unknown (`ValueError`)."""
    name = method.lower().split("_niter_")[0]
    if name in INIT_METHODS:
        return
    row = f"init_lora_weights={name}"
    use = "use True, False or " + " or ".join(map(repr, INIT_METHODS))
    if row in UNIMPLEMENTED:
        _refuse(row, "init_lora_weights", method, use)
    raise ValueError(f"Unknown initialization init_lora_weights={method!r}; {use}.")


def _refuse(row: str, name: str, value: object, instead: str) -> None:
    raise UnsupportedOptionError(
        f"LoraConfig: {name}={value!r} asks for {UNIMPLEMENTED[row]}, which fastpeft does not implement; {instead}, or "
        "use PEFT for this adapter."
    )


register_config(PeftType.LORA, LoraConfig)
