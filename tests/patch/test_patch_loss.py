"""The loss without the logits: the same loss and gradients, logits for whoever looks, and who is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from patch_models import LIBRARIES, MODELS, inputs_of, llama, lora, lora_llama, run, traces
from torch import Tensor, nn

from fastpeft import patch, report, unpatch
from fastpeft.patch import loss as loss_module
from fastpeft.patch.logits import Logits

WITH_LOSS = [name for name in MODELS if name != "vit"]


def heads(model: nn.Module) -> list[Any]:
    return [row for row in report(model).rows if row.kind.startswith("head")]


def step(model: Any, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output of a step and its gradients."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs_of(model) | more)
    output.loss.backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Any, other: Any, **more: Any) -> Any:
    """`model` learns as `other` does; returns its output."""
    (ours, found), (theirs, expected) = step(model, **more), step(other, **more)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert found.keys() == expected.keys() and found
    largest = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():  # some, such as a key's bias, are zero but for rounding
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, name
    return ours


@pytest.fixture
def pair(device: torch.device) -> tuple[Any, Any]:
    """A Llama with LoRA, patched and as it is."""
    model = lora_llama().to(device)
    return patch(copy.deepcopy(model), blocks="never"), model


@pytest.mark.parametrize("name", WITH_LOSS)
def test_full_fine_tuning_of_every_kind_of_model(name: str, device: torch.device) -> None:
    """Tied embeddings among them (GPT-2, BERT, T5), biased heads, losses that the model's forward spells out itself."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device).eval()
    patched = patch(copy.deepcopy(model), blocks="never")
    assert [row.fused for row in heads(patched)] == ["linear_cross_entropy"]
    output = assert_same_step(patched, model)
    assert type(output.logits) is Logits and output.logits.pending
    assert torch.equal(output.logits, model(**inputs_of(model)).logits)


def test_nothing_as_large_as_the_logits(device: torch.device) -> None:
    """Forward and backward of a whole model never allocate what eager allocates several times over."""
    torch.manual_seed(0)
    model = lora(llama(vocab_size=60000)).to(device)
    logits = 2 * 40 * 60000 * 4
    sizes: dict[str, int] = {}
    views = (torch.ops.aten.t.default, torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default)  # of the weight

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if type(t) is Tensor and not t.is_meta and t.shape[-1:] != (64,) and func not in views:
                    sizes[which] = max(sizes[which], t.numel() * t.element_size())
            return out

    for which in ("eager", "patched"):
        sizes[which] = 0
        with Watch():
            step(model)
        patch(model, blocks="never")
    assert sizes["eager"] >= logits
    assert sizes["patched"] <= logits // 8 or device.type != "cpu"


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_head_with_an_adapter(library: str, dropout: float, device: torch.device) -> None:
    """With dropout the logits that are looked at have the mask that the loss had."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "lm_head"], "lora_dropout": dropout}
    model = lora(llama(), library, **options).to(device).train(bool(dropout))
    patched = patch(copy.deepcopy(model), blocks="never")
    assert [row.fused for row in heads(patched)] == ["linear_cross_entropy"]
    if not dropout:
        assert_same_step(patched, model)
        return
    torch.manual_seed(5)
    output, found = step(patched)
    after = torch.get_rng_state()
    labels = F.pad(inputs_of(patched)["labels"], (0, 1), value=-100)[:, 1:].flatten()
    logits = output.logits + 0
    torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), labels))
    assert torch.equal(torch.get_rng_state(), after)
    patched.zero_grad()
    torch.manual_seed(5)
    output = patched(**inputs_of(patched))
    F.cross_entropy(output.logits.flatten(0, 1) * 1.0 + 0, labels).backward()
    for name, parameter in patched.named_parameters():
        if name in found:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-4, atol=1e-6)


def test_adapters_of_the_head_may_change(device: torch.device) -> None:
    torch.manual_seed(0)
    model = lora(llama(), "peft", target_modules=["lm_head"]).to(device)
    patched = patch(copy.deepcopy(model), blocks="never")
    for m in (patched, model):
        m.disable_adapter_layers()
    with torch.no_grad():
        ours, theirs = (m(**inputs_of(m)) for m in (patched, model))
    assert torch.equal(ours.loss, theirs.loss) and type(ours.logits) is Tensor
    for m in (patched, model):
        m.enable_adapter_layers()
    assert_same_step(patched, model)
    for m in (patched, model):
        m.merge_adapter()
    with torch.no_grad():
        ours, theirs = (m(**inputs_of(m)) for m in (patched, model))
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_a_head_that_is_trained_beside_adapters(device: torch.device) -> None:
    torch.manual_seed(0)
    model = lora(llama(), "peft", target_modules=["q_proj"], modules_to_save=["lm_head"]).to(device)
    patched = patch(copy.deepcopy(model), blocks="never")
    assert {row.fused for row in heads(patched)} == {"linear_cross_entropy"}
    assert assert_same_step(patched, model).logits.pending


def test_arguments_of_the_loss(pair: tuple[Any, Any]) -> None:
    patched, model = pair
    labels = inputs_of(model)["labels"]
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    masked = labels.clone()
    masked[:, ::3] = -100
    other = labels.clone()
    other[0, :9] = 7
    for more in (
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"labels": masked},
        {"labels": other, "ignore_index": 7},
        {"shift_labels": shifted},
        {"attention_mask": (labels > 9).long()},
        {"labels": labels[:, -8:].contiguous(), "logits_to_keep": 8},
        {"output_hidden_states": True},
    ):
        assert assert_same_step(patched, model, **more).logits.pending, more
    ours, theirs = (m(**inputs_of(m), return_dict=False) for m in pair)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def test_without_labels_nothing_is_different(pair: tuple[Any, Any]) -> None:
    patched, model = pair
    inputs = {"input_ids": inputs_of(model)["input_ids"]}
    ours, theirs = (m(**inputs).logits for m in pair)
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, theirs)
    patched.eval(), model.eval()
    ours, theirs = (m.generate(input_ids=inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False) for m in pair)
    assert torch.equal(ours, theirs)
    with torch.inference_mode():
        output = patched(**inputs_of(patched))
    assert type(output.logits) is Tensor and output.loss.is_inference()


def test_a_loss_of_ones_own(pair: tuple[Any, Any]) -> None:
    """On the logits of a forward with labels: whatever it does, and its gradient."""

    def knowledge(output: Any) -> Tensor:
        p = output.logits.log_softmax(-1)
        return output.loss - 0.1 * (p.exp() * p).sum(-1).mean() + output.logits[:, 0].square().mean()

    def shifted_by_hand(output: Any) -> Tensor:
        logits = output.logits[..., :-1, :].contiguous()
        assert not isinstance(logits, Logits) or logits.pending
        return nn.CrossEntropyLoss(label_smoothing=0.1)(logits.view(-1, 128), labels[..., 1:].reshape(-1))

    labels = inputs_of(pair[1])["labels"]
    for loss_of in (knowledge, shifted_by_hand):
        gradients = []
        for model in pair:
            model.zero_grad()
            loss_of(model(**inputs_of(model))).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_asked_for_after_the_step(device: torch.device) -> None:
    """With a frozen head they are still right; with a trained one they would not be, and it says so."""
    torch.manual_seed(0)
    frozen, trained = patch(lora_llama().to(device)), patch(llama().to(device))
    for model, late in ((frozen, False), (trained, True)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        expected = model(input_ids=inputs_of(model)["input_ids"]).logits
        output, _ = step(model)
        optimizer.step()
        assert output.logits.shape == expected.shape and torch.isfinite(output.loss)
        if late:
            with pytest.raises(RuntimeError, match=r'too late.*patch\(model, loss="never"\)'):
                output.logits.argmax(-1)
        else:
            assert torch.equal(output.logits, expected)


def test_the_gradient_of_the_logits_needs_the_logits(pair: tuple[Any, Any]) -> None:
    patched, model = pair
    output = patched(**inputs_of(patched))
    with pytest.raises(RuntimeError, match='loss="never"'):
        torch.autograd.grad(output.loss, output.logits)
    patch(patched, loss="never")
    assert not heads(patched)
    ours, theirs = (torch.autograd.grad(o.loss, o.logits)[0] for o in (m(**inputs_of(m)) for m in pair))
    torch.testing.assert_close(ours, theirs)


def test_mixed_precision_as_accelerate_has_it(device: torch.device) -> None:
    """autocast around the forward, outputs cast up: still no logits. No further from fp32 than eager is, twice over."""
    operations = pytest.importorskip("accelerate.utils.operations")
    torch.manual_seed(0)
    model = lora_llama().to(device)
    patched = patch(copy.deepcopy(model), blocks="never")
    _, exact = step(model)
    found = []
    for m in (patched, model):
        m.forward = operations.convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(m.forward))
        output, gradients = step(m)
        assert output.loss.dtype == output.logits.dtype == torch.float32
        found.append(gradients)
        if m is patched:
            assert output.logits.pending
    for name, truth in exact.items():
        assert (found[0][name] - truth).norm() <= 2 * (found[1][name] - truth).norm() + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    exact = lora_llama().to(device)
    model = copy.deepcopy(exact).to(dtype)
    patched = patch(copy.deepcopy(model), blocks="never")
    assert {row.fused for row in heads(patched)} == {"linear_cross_entropy"}, heads(patched)
    exact.load_state_dict(model.state_dict())
    (ours, _), (theirs, _), (truth, _) = step(patched), step(model), step(exact)
    assert ours.loss.dtype == theirs.loss.dtype
    assert abs(ours.loss - truth.loss) <= 2 * abs(theirs.loss - truth.loss) + 1e-3


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(unused: bool, tmp_path: Path, device: torch.device) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = lora_llama().to(device)
        patched = patch(copy.deepcopy(model), blocks="never")
        wrapped = nn.parallel.DistributedDataParallel(patched, find_unused_parameters=unused)
        output = wrapped(**inputs_of(patched))
        output.loss.backward()
        _, expected = step(model)
        for name, parameter in patched.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_hooks_on_the_head(pair: tuple[Any, Any]) -> None:
    patched, model = pair
    seen: list[Tensor] = []
    for m in pair:
        m.get_base_model().lm_head.register_forward_hook(lambda module, args, out: seen.append(out.detach() + 0))
    assert_same_step(patched, model)
    torch.testing.assert_close(*seen)
    for m in pair:
        m.get_base_model().lm_head.register_full_backward_hook(lambda module, d_in, d_out: seen.append(d_out[0]))
    seen.clear()
    assert_same_step(patched, model)
    torch.testing.assert_close(seen[1], seen[3])


def test_copies_pickles_and_unpatching(pair: tuple[Any, Any], device: torch.device) -> None:
    patched, model = pair
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert assert_same_step(again, model).logits.pending
    unpatch(patched)
    assert not traces(patched)
    assert type(assert_same_step(patched, model).logits) is Tensor


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(smoothing: float, tmp_path: Path, pair: tuple[Any, Any]) -> None:
    """Training with accumulated batches of unequal numbers of items; evaluation with metrics of the logits."""
    curves, scores = [], []
    ids = torch.randint(3, 128, (12, 20), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(20) < i, -100)} for i, row in enumerate(ids)]

    def accuracy(prediction: Any) -> dict[str, float]:
        shifted = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {
            "accuracy": float(shifted[prediction.label_ids[:, 1:] >= 0].mean()),
            "sum": float(prediction.predictions.sum()),
        }

    for model in pair:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            label_smoothing_factor=smoothing,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows[:5], compute_metrics=accuracy
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        metrics = trainer.evaluate()
        scores.append([metrics[f"eval_{key}"] for key in ("loss", "accuracy", "sum")])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3) and curves[0][-1] < curves[0][0]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.slow
def test_compile_takes_the_models_own_path(pair: tuple[Any, Any]) -> None:
    patched, model = pair
    torch._dynamo.reset()
    output = torch.compile(patched, backend="aot_eager", fullgraph=True)(**inputs_of(patched))
    torch.testing.assert_close(output.loss, model(**inputs_of(model)).loss)
    torch._dynamo.reset()


def sharper(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """A loss that is no cross-entropy of logits."""
    return F.cross_entropy(logits.flatten(0, 1).sort(-1).values, labels.flatten())


def doubled_head(model: Any) -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.lm_head.__class__ = Twice


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output)


def other_loss(model: Any) -> None:
    model.loss_function = sharper


LEFT: dict[Callable[[Any], None], str] = {
    doubled_head: "not an nn.Linear",
    hooked: "other code has registered hooks",
    other_loss: "uses the logits for more than the loss",
}


@pytest.mark.parametrize("change", LEFT, ids=lambda f: f.__name__)
def test_left_as_it_is_with_the_reason(change: Callable[[Any], None], device: torch.device) -> None:
    torch.manual_seed(0)
    model = llama().to(device)
    change(model)
    before = run(model)
    patch(model, blocks="never")
    (row,) = heads(model)
    assert row.fused is None and LEFT[change] in row.reason
    assert not any(isinstance(m.__dict__.get("forward"), loss_module.HeadForward) for m in model.modules())
    ours = run(model)
    assert torch.equal(ours[0], before[0])


def test_an_unknown_option() -> None:
    with pytest.raises(ValueError, match="loss must be one of auto, never"):
        patch(llama(), loss="sometimes")
