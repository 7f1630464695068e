"""Names that decide which modules of a model are adapted, and the files an adapter is kept in."""

from __future__ import annotations

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

#: `target_modules="all-linear"`: every linear layer but the output layer.
ALL_LINEAR = "all-linear"
#: `target_modules` of an adapter that adapts nothing (used to load weights into later).
DUMMY_TARGET_MODULES = "dummy-target-modules"
#: From this many names on, `target_modules` is condensed to the shortest list of suffixes that means the same.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
SEQ_CLS_HEAD_NAMES = ("score", "classifier")
#: The config of a model that has none.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

#: Mamba's fused kernels read these weights directly, past any adapter.
MAMBA_MODEL_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
MAMBA_UNSUPPORTED_MODULES = frozenset({"conv1d", "out_proj"})

# What to adapt when the config does not say: the attention's query and value projections (arXiv 2106.09685, table 5),
# or the projection they are fused into. Architectures by the name that projection has in them.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): (
        "bart cohere cohere2 gemma gemma2 gemma3_text glm4 gpt_neo gptj granite granitemoe llama llama4 mistral "
        "mixtral olmo olmo2 olmo3 opt qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2"
    ),
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query", "value", "q_proj", "v_proj"): "vit",  # renamed within Transformers 5
    ("q", "v"): "mt5 t5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen phi3",
    ("Wqkv",): "mpt",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

#: model_type → default `target_modules` of LoRA: a list of names, or a regular expression.
LORA_TARGET_MODULES: dict[str, list[str] | str] = {
    model_type: list(modules) for modules, model_types in _DEFAULT_TARGETS.items() for model_type in model_types.split()
}
# The vision and audio towers have modules of the same names, so only a regular expression tells them apart.
LORA_TARGET_MODULES["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"
