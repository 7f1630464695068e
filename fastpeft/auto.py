"""`AutoPeftModel…`: base model and adapter in one call, from the adapter's path alone."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from . import storage
from .configs import PeftConfig
from .model import PeftModel
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .tuner.constants import TOKENIZER_CONFIG_NAME

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

#: Packages that a config without a task may name as the home of its base model's class. Importing runs code.
IMPORT_ALLOWLIST = ("diffusers", "lerobot", "megatron-core", "transformers")


class _BaseAutoPeftModel:
    """Loads the base model that an adapter's config names, and the adapter onto it."""

    #: Name of the Transformers class that loads the base model; None: the config's `auto_mapping` says it.
    _target_name: ClassVar[str | None] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is designed to be instantiated using `{name}.from_pretrained(path_of_the_adapter)`.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model, then the adapter.

        A tokenizer beside the adapter that has more tokens than the model has embeddings makes the embeddings grow.

        Args:
            pretrained_model_name_or_path: of the adapter: a directory, or the id of a hub repository.
            adapter_name: the name it gets.
            is_trainable: False: freeze it, and switch to evaluation mode.
            config: use this for the adapter instead of the one beside its weights.
            revision: of the adapter's repository.
            import_allowlist: packages that the base model's class may be imported from, where no task decides.
            kwargs: for the base model's `from_pretrained`, and for finding the adapter.

        Raises:
            ValueError: this class is not the one for the config's task, or the package is not allowed.
        """
        adapter_kwargs = storage.hub_kwargs({**kwargs, "revision": revision})
        found = storage.load_config(pretrained_model_name_or_path, **adapter_kwargs)
        target = cls._base_class(found, import_allowlist)
        kwargs.pop("subfolder", None)  # the adapter's
        base = target.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        cls._grow_embeddings(base, str(pretrained_model_name_or_path), revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            **adapter_kwargs,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, import_allowlist: list[str] | None) -> Any:
        """The class that loads the base model."""
        task = getattr(config.task_type, "value", config.task_type)
        if task is not None:
            wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
            if cls._target_name is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    f"(e.g. `Auto{wanted.__name__}` for `task_type='{task}'`)"
                )
            if cls._target_peft_class is not wanted:
                raise ValueError(
                    f"Expected target PEFT class: {wanted.__name__}, but you have asked for: "
                    f"{cls._target_peft_class.__name__} make sure that you are loading the correct model for your task "
                    f"type ({task})."
                )
            import transformers

            return getattr(transformers, cls._target_name)
        if config.auto_mapping is None:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library = config.auto_mapping["parent_library"]
        allowed = IMPORT_ALLOWLIST if import_allowlist is None else import_allowlist
        if not any(library == name or library.startswith(f"{name}.") for name in allowed):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(importlib.import_module(library), config.auto_mapping["base_model_class"])

    @staticmethod
    def _grow_embeddings(base: Any, path: str, revision: str | None, kwargs: dict[str, Any]) -> None:
        token = kwargs.get("token", kwargs.get("use_auth_token"))
        exists = os.path.exists(os.path.join(path, TOKENIZER_CONFIG_NAME)) or (
            not os.path.isdir(path)
            and storage.file_exists_on_hub(
                path, TOKENIZER_CONFIG_NAME, revision=revision, repo_type=kwargs.get("repo_type"), token=token
            )
        )
        if not exists or not hasattr(base, "get_input_embeddings"):
            return
        from transformers import AutoTokenizer

        trust = kwargs.get("trust_remote_code", False)
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, token=token, trust_remote_code=trust)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters of no particular task."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of language models."""

    _target_name = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of encoder-decoder language models."""

    _target_name = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of sequence classifiers."""

    _target_name = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of token classifiers."""

    _target_name = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of models that find answers."""

    _target_name = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of models whose hidden states are wanted."""

    _target_name = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
