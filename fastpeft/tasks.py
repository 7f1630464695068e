"""`PeftModel` by task: the forward's usual arguments by name, and which head is trained whole with the adapter."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .configs import PeftConfig
from .model import PeftModel
from .tuner.activated import get_alora_offsets_for_forward, get_alora_offsets_for_generate


class _PeftModelWithHead(PeftModel):
    """A model whose head is new for the task, so that it is trained and saved whole beside the adapter."""

    head_names: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        self._save_head(peft_config)  # before the adapter is made, so that it stays out of the head
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """As `PeftModel.add_adapter`; the adapter gets its own copy of the head."""
        self._save_head(peft_config)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _save_head(self, config: Any) -> None:
        names = list(config.modules_to_save or ())
        config.modules_to_save = names + [name for name in self.head_names if name not in names]


def _given(**arguments: Any) -> dict[str, Any]:
    """Those of the arguments that were passed; the model's own defaults stand for the others."""
    return {name: value for name, value in arguments.items() if value is not None}


class PeftModelForSequenceClassification(_PeftModelWithHead):
    """A classifier of sequences; its `classifier` or `score` is trained whole with each adapter."""

    _peft_name: ClassVar[str] = "peft.PeftModelForSequenceClassification"
    head_names = ("classifier", "score")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward."""
        given = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return self._run(self.base_model, **given, **kwargs)


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A classifier of tokens; its `classifier` or `score` is trained whole with each adapter."""

    _peft_name: ClassVar[str] = "peft.PeftModelForTokenClassification"


class PeftModelForCausalLM(PeftModel):
    """A language model."""

    _peft_name: ClassVar[str] = "peft.PeftModelForCausalLM"
    pipeline_tag = "text-generation"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward."""
        given = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        kwargs = get_alora_offsets_for_forward(self, input_ids, inputs_embeds, **kwargs)
        return self._run(self.base_model, **given, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`. `adapter_names`: one adapter (or `"__base__"`) per sample."""
        kwargs = get_alora_offsets_for_generate(self, *args, **kwargs)
        if "generation_config" in self.__dict__:  # set on this object, but read by the model
            self.get_base_model().generation_config = self.generation_config
        return super().generate(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""

    _peft_name: ClassVar[str] = "peft.PeftModelForSeq2SeqLM"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward."""
        given = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return self._run(self.base_model, **given, **kwargs)


class PeftModelForQuestionAnswering(_PeftModelWithHead):
    """A finder of answers in a text; its `qa_outputs` is trained whole with each adapter."""

    _peft_name: ClassVar[str] = "peft.PeftModelForQuestionAnswering"
    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward."""
        given = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return self._run(self.base_model, **given, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A model of which the hidden states are wanted."""

    _peft_name: ClassVar[str] = "peft.PeftModelForFeatureExtraction"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward."""
        given = _given(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return self._run(self.base_model, **given, **kwargs)
