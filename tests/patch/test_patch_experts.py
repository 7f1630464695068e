"""A mixture's experts with LoRA on their stacked parameters: PEFT's numbers, and no sum of all experts anywhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from patch_models import LIBRARIES, assert_same, inputs_of, lora, run, traces
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft import patch, unpatch
from fastpeft.measure import SavedActivations
from fastpeft.patch import experts as experts_module
from fastpeft.patch.experts import ExpertsForward

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
ATTENTION = ["q_proj", "o_proj"]
DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48}
HEADS = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LLAMA4 = {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 80}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# Its config, and the operator by which its products are made.
MIXTRAL = {"num_local_experts": 4}
GPT_OSS = MIXTRAL | {"head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("mixtral", MIXTRAL, "lora_experts"),
    "mixtral, eager": ("mixtral", MIXTRAL | {"experts_implementation": "eager"}, "lora_linear"),
    "mixtral, batched": ("mixtral", MIXTRAL | {"experts_implementation": "batched_mm"}, "batched products"),
    "gpt_oss": ("gpt_oss", GPT_OSS, "lora_experts"),  # transposed, with biases
    "gpt_oss, eager": ("gpt_oss", GPT_OSS | {"experts_implementation": "eager"}, "lora_linear"),
    "llama4": ("llama4_text", LLAMA4, "batched products"),  # transposed, and PEFT is not told
    "deepseek_v3": ("deepseek_v3", DEEPSEEK | HEADS | {"first_k_dense_replace": 1}, "lora_experts"),
}


def model_of(name: str, library: str = "peft", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | config))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # some models leave them as they come from the allocator, or zero
                parameter.normal_(std=0.1)
    torch.manual_seed(1)
    return lora(model, library, **({"target_modules": ATTENTION, "target_parameters": EXPERTS} | options))


def rows_of(model: nn.Module) -> list[Any]:
    """The report's rows of the experts' parameters."""
    return [row for row in fastpeft.report(model).rows if row.kind.endswith("ParamWrapper")]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(outputs):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return outputs


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", MODELS)
def test_pefts_numbers(name: str, library: str, device: torch.device) -> None:
    expected = run(model_of(name).to(device))
    model = patch(model_of(name, library).to(device))
    rows = rows_of(model)
    operator = MODELS[name][2]
    assert rows and all(row.fused == operator and "the sum of all is not made" in row.form for row in rows), rows
    assert_same(run(model), expected)
    unpatch(model)
    assert not traces(model)
    assert_same(run(model), expected)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["mixtral", "mixtral, eager", "llama4"])
def test_no_sum_of_all_experts_is_made_or_kept(name: str, library: str) -> None:
    """Neither the sum nor its gradient, in a step nor among what is kept for the backward. PEFT's step makes them."""
    model = model_of(name)
    base = next(m for m in model.modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter))
    stack = base.down_proj.numel()
    batch = {"input_ids": inputs_of(model)["input_ids"][:, :6]}  # few tokens: their activations are smaller

    def step(model: Any) -> tuple[int, int]:
        with Largest() as largest:
            with SavedActivations(model) as saved:
                logits = model(**batch).logits
                kept = max(saved.storages.values()) // 4
            logits.sum().backward()
        return largest.elements, kept

    assert min(step(model)) >= stack
    model = patch(model_of(name, library), blocks="never", loss="never")
    assert max(step(model)) < stack


def experts_step(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of the model's first experts alone, for a routing that does not depend on rounding."""
    experts = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(2, 40, 64, generator=generator).to(torch.bfloat16).to(dtype)
    index = torch.rand(40, 4, generator=generator).topk(2).indices
    weights = torch.rand(40, 2, generator=generator).to(torch.bfloat16).to(dtype)
    x.requires_grad_()
    y = experts(x, index, weights)
    y.backward(dy)
    gradients = {name: p.grad.float() for name, p in experts.named_parameters() if p.grad is not None}
    return gradients | {"y": y.detach().float(), "x": x.grad.float()}


@pytest.mark.parametrize("name", ["mixtral", "mixtral, eager", "mixtral, batched"])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_error_in_bf16(name: str, adapter: torch.dtype) -> None:
    """At most twice PEFT's own, of output and gradients, against fp32; with adapters of either dtype."""
    errors: dict[str, list[float]] = {}
    for _ in range(3):
        low = model_of(name, dtype=torch.bfloat16)  # adapters in fp32, as both libraries keep them
        low.to(adapter) if adapter is torch.bfloat16 else None
        exact = experts_step(copy.deepcopy(low).float(), torch.float32)
        theirs = experts_step(copy.deepcopy(low), torch.bfloat16)
        patch(low, blocks="never", loss="never")
        assert all(row.fused for row in rows_of(low)), rows_of(low)
        ours = experts_step(low, torch.bfloat16)
        for key, truth in exact.items():
            sums = errors.setdefault(key, [0.0, 0.0])
            for i, found in enumerate((ours, theirs)):
                sums[i] += ((found[key] - truth).norm() / truth.norm()).item() ** 2
    print({key: f"{(mine / other) ** 0.5:.2f}" for key, (mine, other) in errors.items()})
    assert all(mine <= 2**2 * other for mine, other in errors.values()), errors


@pytest.mark.parametrize("library", LIBRARIES)
def test_switching_disabling_merging(library: str) -> None:
    """What the wrapper's own forward computes is computed at once: another adapter, several, none, merged ones."""
    models = [model_of("mixtral", library) for _ in range(2)]
    for model in models:
        torch.manual_seed(2)
        kind = LIBRARIES[library].LoraConfig
        options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}
        model.add_adapter("other", kind(target_modules=ATTENTION, target_parameters=EXPERTS, **options))
    theirs, ours = models[0], patch(models[1])
    states: list[Callable[[Any], Any]] = [
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ]
    for change in states:
        for model in (ours, theirs):
            change(model)
        assert_same(run(ours), run(theirs), 2e-5) if change is not states[3] else None
        with torch.no_grad():
            batch = inputs_of(ours)
            torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-5)
            with ours.disable_adapter(), theirs.disable_adapter():
                torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "mixtral, eager"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model = patch(model_of(name)).train()
    before = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model), before, tolerance=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_generation_copies_and_pickles(library: str) -> None:
    """generate() with a cache makes no sum either; a copy computes the same, and unpatching it leaves the original."""
    model = model_of("mixtral", library).eval()
    ids = inputs_of(model)["input_ids"][:, :6]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    patch(model)
    stack = 4 * 64 * 80
    with Largest() as largest:
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert largest.elements < stack
    before = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(other), before, 1e-6)
        unpatch(other)
        assert not traces(other)
    assert traces(model)
    assert_same(run(model), before, 1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["mixtral", "mixtral, eager", "mixtral, batched", "gpt_oss", "llama4"])
def test_inference_mode(name: str, library: str) -> None:
    """In which copies of the factors have no version."""
    model = patch(model_of(name, library)).eval()
    batch = {"input_ids": inputs_of(model)["input_ids"]}
    with torch.no_grad():
        expected = model(**batch).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("library", LIBRARIES)
def test_autocast(library: str) -> None:
    """Mean square errors of several draws against fp32 are no more than twice PEFT's."""
    errors: dict[str, list[float]] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        found = []
        for ours in (False, True):
            model = model_of("mixtral, eager", library if ours else "peft")
            with torch.no_grad():
                generator = torch.Generator().manual_seed(seed)
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            exact = run(model)
            if ours:
                patch(model, blocks="never", loss="never")
            with torch.autocast("cpu", torch.bfloat16):
                found.append(run(model))
        for key, truth in [("logits", exact[0]), *exact[1].items()]:
            sums = errors.setdefault(key, [0.0, 0.0])
            for i, result in enumerate(found):
                value = (result[0] if key == "logits" else result[1][key]).float()
                sums[i] += ((value - truth).norm() / truth.norm().clamp_min(1e-12)).item() ** 2
    assert all(mine <= 2**2 * other for other, mine in errors.values()), errors


@pytest.mark.parametrize("library", LIBRARIES)
def test_compile_makes_the_sum(library: str) -> None:
    """Under torch.compile the layers run as they are; the result is the same."""
    model = patch(model_of("mixtral", library)).eval()
    batch = {"input_ids": inputs_of(model)["input_ids"]}
    experts = next(m for m in model.modules() if isinstance(m, nn.Module) and type(m).__name__ == "ParamWrapper")
    x = torch.randn(7, 64)
    index, weights = torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
    expected = experts(x, index, weights)
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="eager")
    torch.testing.assert_close(compiled(x, index, weights), expected, rtol=1e-4, atol=1e-5)
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_experts_compiled_by_themselves_get_the_sum(library: str) -> None:
    model = patch(model_of("mixtral", library), blocks="never", loss="never")
    expected = run(model)
    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            module.compile(backend="eager")
    assert_same(run(model), expected)
    unpatch(model)
    assert all("compiles the experts" in row.reason for row in rows_of(patch(model)))


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_meta_device_counts_no_sum(library: str) -> None:
    """Where memory is estimated without a model's weights."""
    with torch.device("meta"):
        model = patch(model_of("mixtral", library, dtype=torch.bfloat16), verify=False, loss="never")
        ids = torch.zeros(1, 6, dtype=torch.long)
    with Largest() as largest:
        model(input_ids=ids).logits.sum().backward()
    assert largest.elements < 4 * 64 * 80


class Whole(nn.Module):
    """Experts whose code takes the stack as a whole, in a product that it does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,enk->ben", x, self.w)


class InFloat(nn.Module):
    """Experts whose code converts one expert's matrix after another."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 5).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.float() @ self.w[e].float().T for e in range(3)])


class Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Any:
        return self.experts(x)


@pytest.mark.parametrize("library", LIBRARIES)
def test_code_that_needs_the_sum_is_left_with_the_reason(library: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return lora(Holder(Whole()), library, target_modules=[], target_parameters=["experts.w"])

    x = torch.randn(3, 5)
    model = patch(make(), example_inputs=x)
    (row,) = rows_of(model)
    assert row.fused is None and "the sum is made" in row.reason
    torch.testing.assert_close(model(x), make()(x))
    (row,) = rows_of(patch(make()))
    assert row.fused is None and "pass example_inputs=" in row.reason
    (row,) = rows_of(patch(make(), verify=False))
    assert row.fused and "not tried" in row.form


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_experts_sum_is_made_where_only_that_is_asked_for(library: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return lora(Holder(InFloat()), library, target_modules=[], target_parameters=["experts.w"])

    x = torch.randn(3, 5).to(torch.bfloat16)
    model = patch(make(), example_inputs=x)
    (row,) = rows_of(model)
    assert row.fused == "addmm" and "an expert's sum at a time" in row.form
    torch.testing.assert_close(model(x), make()(x), rtol=2e-2, atol=0.2)
    with Largest() as largest:
        model(x).sum().backward()
    assert largest.elements < 4 * 6 * 5  # those of all; B has 96


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer_whose_trial_differs_is_left_as_it_was(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(model_of("mixtral", library))
    with monkeypatch.context() as wrong:
        wrong.setattr(experts_module, "distance", lambda a, b: 0.5)
        model = patch(model_of("mixtral", library), blocks="never", loss="never")
    assert all(row.fused is None and "distance 5.0e-01" in row.reason for row in rows_of(model))
    with Largest() as largest:
        assert_same(run(model), expected)
    assert largest.elements >= 4 * 64 * 80  # the sum is made
    assert not traces(unpatch(model))


def test_one_trial_serves_the_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    run_trial = experts_module._try
    monkeypatch.setattr(experts_module, "_try", lambda *args: (trials.append(1), run_trial(*args)))
    model = patch(model_of("mixtral"))
    assert len(trials) == 1 and sum(isinstance(m.__dict__.get("forward"), ExpertsForward) for m in model.modules()) == 4


def test_a_router_that_is_adapted_as_a_matrix() -> None:
    targets = {"target_modules": [], "target_parameters": ["mlp.gate.weight", *EXPERTS]}
    expected = run(model_of("mixtral", **targets))
    model = patch(model_of("mixtral", **targets))
    assert [row.fused for row in rows_of(model) if row.module.endswith("gate.weight")] == ["lora_linear"] * 2
    assert_same(run(model), expected)


def test_trained_experts_are_left() -> None:
    model = model_of("mixtral")
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.requires_grad_()
    expected = run(model)
    patch(model)
    assert all("is trained" in row.reason for row in rows_of(model))
    assert_same(run(model), expected)


@pytest.fixture
def _process_group() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("library", LIBRARIES)
def test_ddp_and_fsdp2(library: str) -> None:
    expected = run(model_of("mixtral", library))
    model = patch(model_of("mixtral", library))
    nn.parallel.DistributedDataParallel(model)(**inputs_of(model)).loss.backward()
    assert_same((expected[0], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)
    from torch.distributed.fsdp import fully_shard

    model = patch(model_of("mixtral", library))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(**inputs_of(model)).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert_same((expected[0], found), expected)
