"""PEFT's modules and names, and where fastpeft keeps each: the table behind `install_as_peft()`.

`HOMES` says where a name lives in fastpeft, `MODULES` which names a module of PEFT has. A name of `MODULES` without a
home is a method or a helper that fastpeft does not implement: importing it gives a placeholder. To implement one, add
its home. `OTHER_METHODS` are PEFT's packages of methods that fastpeft has nothing of.
"""

from __future__ import annotations

from functools import cache

PEFT_VERSION = "0.21.2"  # the release whose interface, config fields and adapter files fastpeft has

_CONFIGS = """
    LoraConfig LoraRuntimeConfig ArrowConfig BdLoraConfig CordaConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig
    MontecloraConfig VeloraConfig
"""
_AUTO = """
    AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
    AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING
"""
_TASKS = """
    PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
    PeftModelForSequenceClassification PeftModelForTokenClassification
"""
_LAYERS = """
    LoraLayer Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper LoraVariant VARIANT_KWARG_KEYS
    dispatch_default
"""
_MAPPINGS = """
    PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
    get_peft_config inject_adapter_in_model
"""
_STATE = "get_peft_model_state_dict set_peft_model_state_dict get_base_model_state_dict set_base_model_state_dict"
_WRAPPERS = "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper"
_ERRORS = "PeftError NoMatchingPeftModuleError"
_TYPES = "PeftType TaskType"
_CONSTANTS = """
    CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME TOKENIZER_CONFIG_NAME EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES
    INCLUDE_LINEAR_LAYERS_SHORTHAND DUMMY_TARGET_MODULES DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION
    ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""
_TUNER_FUNCTIONS = """
    cast_adapter_dtype delete_adapter set_adapter set_requires_grad check_target_module_exists inspect_matched_modules
    check_adapters_to_merge clone_module replicate_layers onload_layer find_parameter_name_by_module get_device_map
    _find_minimal_target_modules _maybe_include_all_linear_layers _get_in_out_features
    _filter_state_dict_by_key_prefixes _get_tuner_state_dict_key_prefixes warn_msg_weight_tying
"""
_LORA_EXTRAS = """
    convert_to_lora save_as_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga
    preprocess_corda reduce_intruder_dimension
"""
_HELPERS = """
    infer_device fsdp_auto_wrap_policy prepare_model_for_kbit_training cast_mixed_precision_params shift_tokens_right
    replace_lora_weights_loftq _get_submodules transpose id_tensor_storage _set_adapter _freeze_adapter _set_trainable
    bloom_model_postprocess_past_key_value TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING register_peft_method
    get_quantization_config get_quantization_kwargs get_gptqmodel_quant_linear map_cache_to_layer_device_map
    quantization_extra_repr TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
"""
_PROBES = """
    is_transformers_ge_v5 is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0
    is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_aqlm_available is_bnb_available is_bnb_4bit_available
    is_diffusers_available is_eetq_available is_gptqmodel_available is_hqq_available is_inc_available
    is_optimum_available is_te_available is_torchao_available is_xpu_available
"""

OTHER_METHODS: dict[str, str] = {
    "adalora": "AdaLoraConfig AdaLoraLayer AdaLoraModel RankAllocator SVDConv2d SVDLinear SVDQuantLinear",
    "adamss": "AdamssAsaCallback AdamssConfig AdamssLayer AdamssModel Linear",
    "adaption_prompt": "AdaptedAttention AdaptedAttentionGPT AdaptionPromptConfig AdaptionPromptModel",
    "beft": "BeftConfig BeftLayer BeftModel Linear",
    "boft": "BOFTConfig BOFTLayer BOFTModel Conv2d Linear",
    "c3a": "C3AConfig C3ALayer C3ALinear C3AModel",
    "cartridge": """CartridgeConfig CartridgeEncoder compose_cartridge_adapters initialize_kv_prefix_from_text
        initialize_kv_prefix_from_past_key_values prompt_embeddings_from_past_key_values""",
    "cpt": "CPTConfig CPTEmbedding",
    "deft": "DeftConfig DeftLayer DeftLinear DeftModel",
    "delora": "DeloraConfig DeloraLayer DeloraLinear DeloraModel",
    "fourierft": "FourierFTConfig FourierFTLayer FourierFTLinear FourierFTModel",
    "frod": "FrodConfig FrodLayer FrodModel Linear",
    "glora": "GloraConfig GloraLayer GloraLinear GloraModel",
    "gralora": "GraloraConfig GraloraLayer GraloraModel Linear",
    "hira": "Conv1d Conv2d Conv3d Embedding HiraConfig HiraLayer HiraModel Linear Linear4bit Linear8bitLt",
    "hra": "HRAConfig HRAConv2d HRALayer HRALinear HRAModel",
    "ia3": "Conv2d Conv3d IA3Config IA3Layer IA3Model Linear Linear4bit Linear8bitLt",
    "lily": "LilyConfig LilyLayer LilyModel Linear",
    "ln_tuning": "LNTuningConfig LNTuningLayer LNTuningModel",
    "loha": "Conv1d Conv2d Linear LoHaConfig LoHaLayer LoHaModel",
    "lokr": "Conv1d Conv2d Linear LoKrConfig LoKrLayer LoKrModel factorization",
    "miss": "MissConfig MissLayer MissLinear MissModel",
    "mixed": "MixedModel",
    "multitask_prompt_tuning": "MultitaskPromptEmbedding MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "oft": "Conv2d Embedding Linear OFTConfig OFTLayer OFTModel",
    "osf": "Linear OSFConfig OSFLayer OSFModel",
    "p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    "peanut": "Linear PeanutConfig PeanutLayer PeanutModel",
    "poly": "Linear PolyConfig PolyLayer PolyModel",
    "prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    "prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
    "psoft": "Linear PsoftConfig PsoftLayer PsoftModel",
    "pvera": "Linear Linear4bit Linear8bitLt PveraConfig PveraLayer PveraModel",
    "randlora": "Linear Linear4bit Linear8bitLt RandLoraConfig RandLoraLayer RandLoraModel",
    "road": "Linear Linear4bit Linear8bitLt RoadConfig RoadLayer RoadModel",
    "shadow": "DetachedFluxShadowModel DetachedShadowModel ShadowCache ShadowConfig ShadowLayer ShadowModel",
    "shira": "Linear ShiraConfig ShiraLayer ShiraModel",
    "supertuning": "Linear SupertuningConfig SupertuningLayer SupertuningModel",
    "tinylora": "Embedding Linear TinyLoraConfig TinyLoraLayer TinyLoraModel",
    "trainable_tokens": "TrainableTokensConfig TrainableTokensLayer TrainableTokensModel",
    "unilora": "Linear UniLoraConfig UniLoraLayer UniLoraModel",
    "vblora": "Linear VBLoRAConfig VBLoRALayer VBLoRAModel",
    "vera": "Linear VeraConfig VeraLayer VeraModel",
    "waveft": "WaveFTConfig WaveFTLayer WaveFTLinear WaveFTModel",
    "xlora": "XLoraConfig XLoraLayer XLoraLinearLayer XLoraModel",
}
_TABLES = " ".join(
    f"TRANSFORMERS_MODELS_TO_{method.replace('_', '').upper()}_TARGET_MODULES_MAPPING" for method in OTHER_METHODS
)
_OTHER = (
    " ".join(
        name for names in OTHER_METHODS.values() for name in names.split() if name.endswith(("Config", "Model", "Init"))
    )
    + """
    CPTEmbedding CartridgeEncoder PrefixEncoder PromptEmbedding PromptEncoder PromptEncoderReparameterizationType
    compose_cartridge_adapters initialize_kv_prefix_from_text initialize_kv_prefix_from_past_key_values
    prompt_embeddings_from_past_key_values
"""
)

MODULES: dict[str, str] = {
    "peft": f"""{_CONFIGS} {_AUTO} {_TASKS} {_MAPPINGS} {_STATE} {_ERRORS} {_TYPES} {_OTHER} {_LORA_EXTRAS}
        PeftConfig PromptLearningConfig PeftModel PeftMixedModel LoraModel PeftWarning get_peft_model load_peft_weights
        get_layer_status get_model_status find_kappa_target_modules cast_mixed_precision_params shift_tokens_right
        prepare_model_for_kbit_training replace_lora_weights_loftq bloom_model_postprocess_past_key_value
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING""",
    "peft.auto": _AUTO,
    "peft.config": "PeftConfig PeftConfigMixin PromptLearningConfig __version__ _get_commit_hash",
    "peft.functional": f"""cast_adapter_dtype delete_adapter inject_adapter_in_model set_adapter set_requires_grad
        {_STATE}""",
    "peft.helpers": """update_forward_signature update_generate_signature update_signature check_if_peft_model
        rescale_adapter_scale disable_input_dtype_casting DoraCaching KappaTuneSelector find_kappa_target_modules
        MontecloraTrainerMixin""",
    "peft.import_utils": _PROBES,
    "peft.mapping": _MAPPINGS,
    "peft.mapping_func": "get_peft_model",
    "peft.mixed_model": "PeftMixedModel",
    "peft.optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "peft.optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
    "peft.optimizers.loraplus": "create_loraplus_optimizer",
    "peft.optimizers.riemannian": "create_riemannian_optimizer",
    "peft.peft_model": f"""PeftModel {_TASKS} TunerLayerStatus TunerModelStatus get_layer_status get_model_status""",
    "peft.tuners": f"{_CONFIGS} {_OTHER} {_LORA_EXTRAS} LoraModel MultitaskPromptEmbedding",
    "peft.tuners._buffer_dict": "BufferDict",
    "peft.tuners.tuners_utils": f"BaseTuner BaseTunerLayer {_TUNER_FUNCTIONS} ModulesToSaveWrapper {_ERRORS}",
    "peft.tuners.lora": f"{_CONFIGS} {_LAYERS} {_LORA_EXTRAS} LoraModel Linear4bit Linear8bitLt GPTQLoraLinear",
    "peft.tuners.lora.arrow": "create_arrow_model ArrowLoraLinearLayer",
    "peft.tuners.lora.bnb": "Linear4bit Linear8bitLt",
    "peft.tuners.lora.config": _CONFIGS,
    "peft.tuners.lora.conversion": "convert_to_lora save_as_lora",
    "peft.tuners.lora.corda": "CordaEigens preprocess_corda",
    "peft.tuners.lora.dora": "DoraLinearLayer DoraEmbeddingLayer DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer",
    "peft.tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "peft.tuners.lora.intruders": "reduce_intruder_dimension",
    "peft.tuners.lora.layer": f"{_LAYERS} _LoraFactorsProxy",
    "peft.tuners.lora.loraga": "preprocess_loraga estimate_gradients",
    "peft.tuners.lora.model": "LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "peft.tuners.lora.monteclora": "MontecloraSampler",
    "peft.tuners.lora.variants": """DoraLinearVariant DoraEmbeddingVariant DoraConv1dVariant DoraConv2dVariant
        DoraConv3dVariant ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant KasaLinearVariant
        MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant MiCALinearVariant MiCAEmbeddingVariant
        BlockDiagonalLinear calculate_alora_offsets is_alora_relevant_in_batch get_alora_offsets_for_forward
        get_alora_offsets_for_generate""",
    "peft.utils": f"""{_CONSTANTS} {_TABLES} {_HELPERS} {_STATE} {_WRAPPERS} {_ERRORS} {_TYPES} PeftWarning
        load_peft_weights set_additional_trainable_modules resolve_quantization_backend""",
    "peft.utils.constants": f"{_CONSTANTS} {_TABLES}",
    "peft.utils.error": _ERRORS,
    "peft.utils.hotswap": """hotswap_adapter hotswap_adapter_from_state_dict check_hotswap_configs_compatible
        prepare_model_for_compiled_hotswap""",
    "peft.utils.integrations": """init_empty_weights skip_init_on_device dequantize_module_weight gather_params_ctx
        dequantize_bnb_weight""",
    "peft.utils.loftq_utils": "replace_lora_weights_loftq",
    "peft.utils.merge_utils": "task_arithmetic magnitude_prune ties dare_linear dare_ties prune",
    "peft.utils.other": f"""{_CONSTANTS} {_TABLES} {_HELPERS} {_WRAPPERS} set_additional_trainable_modules
        match_target_against_key get_pattern_key _get_module_names_tied_with_embedding _get_no_split_modules""",
    "peft.utils.peft_types": f"{_TYPES} register_peft_method",
    "peft.utils.incremental_pca": "IncrementalPCA",
    "peft.utils.quantization_utils": """QuantizationBackend Bnb8bitBackend Bnb4bitBackend HqqBackend TorchaoBackend
        resolve_quantization_backend quantization_extra_repr get_quantization_kwargs""",
    "peft.utils.save_and_load": f"{_STATE} load_peft_weights torch_load",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping convert_peft_config_for_transformers",
    "peft.utils.warning": "PeftWarning",
}
for _method, _names in OTHER_METHODS.items():
    for _module in ("", ".config", ".layer", ".model"):
        MODULES[f"peft.tuners.{_method}{_module}"] = f"{_names} {_TABLES}"

# fastpeft module -> names of PEFT's that live there; "theirs=ours" where fastpeft calls it otherwise.
HOMES: dict[str, str] = {
    "fastpeft.auto": _AUTO,
    "fastpeft.configs": f"{_CONFIGS} {_TYPES} PeftConfig PeftConfigMixin",
    "fastpeft.configs.base": "__version__",
    "fastpeft.convert": "convert_to_lora save_as_lora",
    "fastpeft.errors": f"{_ERRORS} PeftWarning",
    "fastpeft.interop.helpers": f"""{_PROBES} check_if_peft_model rescale_adapter_scale disable_input_dtype_casting
        fsdp_auto_wrap_policy _get_no_split_modules=no_split_modules""",
    "fastpeft.interop.hotswap": """hotswap_adapter hotswap_adapter_from_state_dict check_hotswap_configs_compatible
        prepare_model_for_compiled_hotswap""",
    "fastpeft.interop.transformers_weights": "build_peft_weight_mapping",
    "fastpeft.kbit": "prepare_model_for_kbit_training",
    "fastpeft.layers": """BaseTunerLayer LoraLayer LoraVariant Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention
        ParamWrapper AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper check_adapters_to_merge""",
    "fastpeft.layers.buffers": "BufferDict",
    "fastpeft.layers.tokens": "TrainableTokensLayer",
    "fastpeft.layers.block_diagonal": "BlockDiagonalLinear",
    "fastpeft.layers.dora": "DoraCaching",
    "fastpeft.layers.base": "_get_in_out_features=in_out_features",
    "fastpeft.mapping": f"{_MAPPINGS} get_peft_model",
    "fastpeft.model": "PeftModel",
    "fastpeft.optimizers": "create_lorafa_optimizer create_loraplus_optimizer LoraFAOptimizer",
    "fastpeft.prepare.loftq": "replace_lora_weights_loftq",
    "fastpeft.prepare": "preprocess_corda preprocess_loraga get_eva_state_dict initialize_lora_eva_weights",
    "fastpeft.prepare.corda": "CordaEigens",
    "fastpeft.prepare.lora_ga": "estimate_gradients",
    "fastpeft.state_dict": f"""{_STATE} _get_tuner_state_dict_key_prefixes=adapter_key_prefixes
        _filter_state_dict_by_key_prefixes=filter_by_prefixes""",
    "fastpeft.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "fastpeft.storage": "load_peft_weights",
    "fastpeft.tasks": _TASKS,
    "fastpeft.tuner": "BaseTuner LoraModel",
    "fastpeft.tuner.activated": """calculate_alora_offsets is_alora_relevant_in_batch get_alora_offsets_for_forward
        get_alora_offsets_for_generate""",
    "fastpeft.tuner.constants": """CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME TOKENIZER_CONFIG_NAME
        EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR DUMMY_TARGET_MODULES
        DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=LORA_TARGET_MODULES""",
    "fastpeft.tuner.conversion": "convert_peft_config_for_transformers=convert_config_for_transformers",
    "fastpeft.tuner.functional": "set_adapter set_requires_grad delete_adapter cast_adapter_dtype UPCAST_DTYPES",
    "fastpeft.tuner.merging": "task_arithmetic magnitude_prune ties dare_linear dare_ties",
    "fastpeft.tuner.offload": "onload_layer=onload",
    "fastpeft.tuner.replicate": "clone_module replicate_layers",
    "fastpeft.tuner.targets": """check_target_module_exists inspect_matched_modules
        _find_minimal_target_modules=find_minimal_target_modules
        _maybe_include_all_linear_layers=include_all_linear_layers""",
    "fastpeft.tuner.tied": "_get_module_names_tied_with_embedding=names_tied_with_embedding",
    "fastpeft.tuner.walk": "infer_device _get_submodules=submodule_and_parent",
}


@cache
def names_of(module: str) -> frozenset[str]:
    """The names of PEFT's module `module`; empty if fastpeft serves no such module."""
    return frozenset(MODULES.get(module, "").split())


@cache
def submodules_of(module: str) -> frozenset[str]:
    """The last parts of the names of the served modules directly inside `module`."""
    start = f"{module}."
    return frozenset(name[len(start) :].partition(".")[0] for name in MODULES if name.startswith(start))


def is_package(module: str) -> bool:
    """Whether served modules lie inside `module`."""
    return bool(submodules_of(module))


@cache
def package_of(module: str, name: str) -> str:
    """The one module that a name without a home is called after, of those that have it."""
    method = module.split(".")[2:3]
    if method and method[0] in OTHER_METHODS:
        return f"peft.tuners.{method[0]}"
    owners = [f"peft.tuners.{method}" for method, names in OTHER_METHODS.items() if name in names.split()]
    return owners[0] if owners else next(owner for owner in MODULES if name in names_of(owner))


@cache
def where(module: str, name: str) -> tuple[str, str] | None:
    """The fastpeft module and attribute behind `module.name`; None if fastpeft does not implement it."""
    method = module.split(".")[2:3]
    if method and method[0] in OTHER_METHODS and name in _LAYERS.split():
        return None  # another method's `Linear` is not LoRA's
    return _homes().get(name)


@cache
def _homes() -> dict[str, tuple[str, str]]:
    found = {}
    for home, names in HOMES.items():
        for entry in names.split():
            theirs, _, ours = entry.partition("=")
            found[theirs] = (home, ours or theirs)
    return found
