"""What a user does with a `PeftModel`: run, switch, merge, look at it; with PEFT's results."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig, PeftModel, get_peft_model

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def trained(library, base, names=("default",), **config):
    """A model with adapters that are not nothing, the same for both libraries."""
    config = {"target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False, **config}
    torch.manual_seed(2)
    model = library.get_peft_model(base, library.LoraConfig(r=3, **config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, library.LoraConfig(r=2, **config))
    return model.eval()


def pair(make, **options):
    return trained(fastpeft, make(), **options), trained(peft, make(), **options)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_forward_and_loss_are_pefts(llama, task):
    ours, theirs = pair(llama, task_type=task)
    assert type(ours).__name__ == type(theirs).__name__
    for model in (ours, theirs):
        model.train()
    results = [
        m(input_ids=IDS, labels=IDS) if task != "FEATURE_EXTRACTION" else m(input_ids=IDS) for m in (ours, theirs)
    ]
    torch.testing.assert_close(results[0].logits, results[1].logits)
    results = [m(IDS, output_hidden_states=True).hidden_states[-1].sum() for m in (ours, theirs)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("task", "auto", "inputs"),
    [
        ("SEQ_CLS", "LlamaForSequenceClassification", {"labels": torch.tensor([0, 1, 0])}),
        ("TOKEN_CLS", "LlamaForTokenClassification", {"labels": torch.zeros_like(IDS)}),
        (
            "QUESTION_ANS",
            "LlamaForQuestionAnswering",
            {"start_positions": torch.ones(3), "end_positions": torch.ones(3)},
        ),
    ],
)
def test_task_classes_train_like_pefts(llama, task, auto, inputs):
    import transformers

    inputs = {k: v.long() for k, v in inputs.items()}
    losses = []
    for model in pair(lambda: llama(cls=getattr(transformers, auto)), task_type=task):
        loss = model(input_ids=IDS, **inputs).loss  # in evaluation mode: some heads have a dropout
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        losses.append(torch.cat([loss.detach()[None], grads]))
    torch.testing.assert_close(*losses)


def test_seq2seq_generates():
    from transformers import T5Config, T5ForConditionalGeneration

    def make():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=40, decoder_start_token_id=0)
        )

    ours, theirs = pair(make, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    out = [m.generate(input_ids=IDS, max_new_tokens=5, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*out)
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (ours, theirs)]
    torch.testing.assert_close(*losses)


def test_forward_signatures_name_the_arguments():
    """Trainer drops the columns of a dataset that the forward does not name."""
    for name in ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        cls = f"PeftModelFor{name}"
        theirs = [p for p in inspect.signature(getattr(peft, cls).forward).parameters if p != "task_ids"]
        assert list(inspect.signature(getattr(fastpeft, cls).forward).parameters) == theirs


def test_generate_with_an_adapter_per_sample(llama):
    names = ["default", "__base__", "other"]
    ours, theirs = pair(llama, names=("default", "other"), task_type="CAUSAL_LM")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": names}
    mixed = ours.generate(input_ids=IDS, **options)
    assert torch.equal(mixed, theirs.generate(input_ids=IDS, **options))
    beams = {**options, "num_beams": 2}
    assert torch.equal(ours.generate(input_ids=IDS, **beams), theirs.generate(input_ids=IDS, **beams))
    for i, name in enumerate(names):  # one sample of the batch is that sample alone
        if name != "__base__":
            ours.set_adapter(name)
            alone = ours(IDS[i : i + 1]).logits
        else:
            with ours.disable_adapter():
                alone = ours(IDS[i : i + 1]).logits
        torch.testing.assert_close(ours(IDS, adapter_names=names).logits[i : i + 1], alone)
    assert not any(m._forward_pre_hooks for m in ours.modules())


def test_adapter_names_are_checked(llama):
    model = trained(fastpeft, llama())
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nothing, typo"):
        model(IDS, adapter_names=["typo", "nothing", "default"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(IDS, adapter_names=["default"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(IDS, adapter_names=["default"] * 3)


def test_disabled_and_enabled(llama):
    base = llama()
    expected = base(IDS).logits
    model = trained(fastpeft, base, modules_to_save=["lm_head"])
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    adapted = model(IDS).logits
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
        torch.testing.assert_close(model(IDS).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, expected)
        torch.testing.assert_close(model(IDS).logits, expected)
        assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS).logits, adapted)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_disabling_does_not_make_a_frozen_adapter_trainable(llama):
    """DPO's reference: a frozen adapter must not start to train because it was switched off once."""
    model = trained(fastpeft, llama(), inference_mode=True, modules_to_save=["lm_head"])
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_changes_inside_disable_adapter_hold(llama):
    model = trained(fastpeft, llama(), names=("default", "other"))
    with model.disable_adapter():
        model.set_adapter("other")
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0  # noqa: B018
    assert model.has_active_enabled_adapter and model.get_model_status().enabled is True


def test_irregular_layers_are_warned_about(llama):
    model = trained(fastpeft, llama())
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    with (
        pytest.warns(match="some adapter layers that are enabled and others that are disabled"),
        model.disable_adapter(),
    ):
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


@pytest.mark.parametrize("active", ["default", "other", ["default", "other"]])
def test_merging_is_pefts(llama, active):
    ours, theirs = pair(llama, names=("default", "other"), modules_to_save=None)
    for model in (ours, theirs):
        model.base_model.set_adapter(active)
    before = ours(IDS).logits
    torch.testing.assert_close(before, theirs(IDS).logits)
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(ours(IDS).logits, before, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(merged) is type(expected) and not hasattr(merged, "peft_config")
    for (name, p), (other, q) in zip(merged.state_dict().items(), expected.state_dict().items()):
        assert name == other
        torch.testing.assert_close(p, q)


def test_unload_gives_the_model_back(llama):
    base = llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    plain = trained(fastpeft, base, modules_to_save=["lm_head"], target_parameters=["o_proj.weight"]).unload()
    # like PEFT, the copy of a module that was trained whole stays
    assert plain is base and list(plain.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in plain.state_dict().items())


def test_deleting(llama):
    model = trained(fastpeft, llama(), names=("default", "other", "third"), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="Adapter nothing does not exist"):
        model.delete_adapter("nothing")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    with pytest.warns(match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    assert model.base_model.model.lm_head.active_adapters == ["other"]
    assert not any("default" in name for name in model.state_dict())
    model.set_adapter("third")
    with pytest.raises(ValueError, match="Adapter nothing not found"):
        model.set_adapter("nothing")
    assert model.active_adapter == "third"


def test_two_saved_copies_of_a_module_cannot_be_active_at_once(llama):
    model = trained(fastpeft, llama(), names=("default", "other"), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])
    assert model.get_model_status().active_adapters == ["default"]


@pytest.mark.parametrize("library_call", ["get_layer_status", "get_model_status"])
def test_status_is_pefts(llama, library_call):
    changes = [
        lambda m: None,
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.merge(adapter_names=["other"]),
        lambda m: m.base_model.model.model.layers[1].self_attn.q_proj.enable_adapters(False),
        lambda m: m.base_model.model.model.layers[1].mlp.up_proj.set_adapter("other"),
        lambda m: m.set_requires_grad("other", False),
        lambda m: m.delete_adapter("default"),
    ]
    ours, theirs = pair(llama, names=("default", "other"), target_parameters=["o_proj.weight"])
    for change in changes:
        results = []
        for model in (ours, theirs):
            try:
                change(model)
            except Exception as error:
                results.append(type(error))
            status = getattr(model, library_call)()
            results.append(
                [dataclasses.asdict(s) for s in status] if isinstance(status, list) else dataclasses.asdict(status)
            )
        assert results[: len(results) // 2] == results[len(results) // 2 :]


def test_status_of_models_without_a_peft_model(mlp):
    with pytest.raises(ValueError, match="No adapter layers found"):
        fastpeft.get_model_status(mlp)
    fastpeft.inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), mlp)
    status = fastpeft.get_model_status(mlp)
    assert (status.base_model_type, status.adapter_model_type, status.num_adapter_layers) == ("other", "None", 1)


def test_printed_parameters_are_pefts(llama, capsys):
    ours, theirs = pair(llama, modules_to_save=["lm_head"])
    ours.print_trainable_parameters()
    first = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert first == capsys.readouterr().out


def test_attributes_come_from_the_model(llama):
    model = trained(fastpeft, llama())
    assert model.config.hidden_size == 32 and model.base_model.model is model.get_base_model()
    assert model.get_input_embeddings() is model.get_base_model().get_input_embeddings()
    with pytest.raises(AttributeError, match="nonsense"):
        model.nonsense  # noqa: B018
    assert not hasattr(PeftModel.__new__(PeftModel), "base_model")  # no endless recursion while unpickling
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_reaches_the_adapters(llama):
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_kbit_preparation_of_a_plain_model(llama):
    base = llama().to(torch.bfloat16)
    prepared = fastpeft.prepare_model_for_kbit_training(base)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in prepared.parameters())


def test_several_adapters_of_different_rank_train_apart(llama):
    model = trained(fastpeft, llama(), names=("default", "other")).train()
    model.base_model.set_adapter(["default", "other"])
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_mixed_models_are_said_to_be_missing(mlp):
    with pytest.raises(NotImplementedError, match="mixed=True"):
        get_peft_model(mlp, LoraConfig(target_modules=["lin0"]), mixed=True)
