"""Single trained tokens, and adapters of tied layers: PEFT's numbers and files, without copying the embedding."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import fastpeft
from fastpeft.layers import TrainableTokensLayer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
IDS = torch.randint(0, 100, (2, 19), generator=torch.Generator().manual_seed(0))
IDS[0, :4] = torch.tensor([1, 2, 3, 4])


def base(kind="tied"):
    torch.manual_seed(0)
    if kind == "scaled":  # an embedding that multiplies its output
        return AutoModelForCausalLM.from_config(Gemma3TextConfig(num_key_value_heads=2, head_dim=8, **SIZES))
    tied = {"tie_word_embeddings": kind == "tied", "pad_token_id": 3}
    return AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=2, **tied, **SIZES))


def make(library, kind, **options):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base(kind), library.LoraConfig(**options))


def train(model):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


TOKENS = [1, 2, 3, 50]
OPTIONS = [
    {"trainable_token_indices": TOKENS},
    {"trainable_token_indices": {"embed_tokens": TOKENS}, "use_dora": True},
    {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}},
    {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [2, 3]}},
    {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    {"target_modules": r".*(q_proj|lm_head)", "ensure_weight_tying": True},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("tied", options) for options in OPTIONS]
    + [("untied", OPTIONS[i]) for i in (0, 2, 6)]
    + [("scaled", OPTIONS[i]) for i in (0, 6)],
)
def test_equals_peft(kind, options, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = make(fastpeft, kind, **options), make(peft, kind, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert train(ours) == pytest.approx(train(theirs), rel=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4, msg=name)
    want = ours.eval()(IDS).logits
    again = fastpeft.PeftModel.from_pretrained(base(kind), tmp_path / "theirs").eval()
    torch.testing.assert_close(again(IDS).logits, want, atol=1e-4, rtol=1e-4)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(IDS).logits, base(kind).eval()(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_merged_and_unloaded():
    model = make(fastpeft, "tied", trainable_token_indices=TOKENS)
    train(model)
    want = model.eval()(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-5, rtol=1e-4)
    assert fastpeft.get_base_model_state_dict(model).keys() == base().state_dict().keys()
    merged = model.merge_and_unload()
    assert isinstance(merged.get_input_embeddings(), nn.Embedding)
    torch.testing.assert_close(merged(IDS).logits, want, atol=1e-5, rtol=1e-4)


def layer_of(embedding, **tokens):
    layer = TrainableTokensLayer(embedding, next(iter(tokens)))
    for name, indices in tokens.items():
        layer.update_layer(name, token_indices=indices)
    layer.set_adapter(list(tokens))
    return layer


def test_the_table_is_not_copied():
    layer = layer_of(nn.Embedding(10_000, 16).requires_grad_(False), default=[5, 7])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        layer(torch.tensor([[5, 6, 7]])).sum().backward()
    assert max(sizes) <= 10_000  # the table of places


def test_several_adapters_with_tokens_of_their_own():
    layer = layer_of(nn.Embedding(20, 4).requires_grad_(False), a=[1, 2], b=[-1])
    with torch.no_grad():
        for rows in layer.trainable_tokens_delta.values():
            rows += 1
    x = torch.arange(20)
    want = layer.get_merged_weights(["a", "b"])
    assert torch.equal(layer(x), want)
    layer.merge()
    assert torch.equal(layer(x), want)
    layer.unmerge()
    layer.set_adapter("b")
    assert torch.equal(layer(x)[:3], layer.base_layer.weight[:3]) and torch.equal(layer(x)[-1], want[-1])
    layer.update_layer("c", token_indices=[19])
    layer.set_adapter(["b", "c"])
    with pytest.raises(ValueError, match="adapter c are already defined"):
        layer(x)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"padding_idx": 2}])
def test_options_of_the_embedding(options):
    table = nn.Embedding(10, 4, **options)
    layer = layer_of(nn.Embedding.from_pretrained(table.weight.data.clone(), **options), default=[1, 2])
    x = torch.tensor([[1, 1, 2, 3, 9]])
    want = table(x)
    torch.testing.assert_close(layer(x), want)
    y, coefficients = layer(x), torch.randn(1, 5, 4)
    (y * coefficients).sum().backward()
    (want * coefficients).sum().backward()
    torch.testing.assert_close(layer.trainable_tokens_delta["default"].grad, table.weight.grad[[1, 2]])


def test_bad_indices_and_names():
    with pytest.raises(ValueError, match="must be distinct rows of a table of 100 tokens"):
        make(fastpeft, "tied", trainable_token_indices=[100])
    with pytest.raises(ValueError, match="not found in the base model"):
        make(fastpeft, "tied", trainable_token_indices={"absent": [1]})
    with pytest.raises(ValueError, match="but not both"):
        make(fastpeft, "tied", trainable_token_indices={"embed_tokens": [1]}, modules_to_save=["embed_tokens"])
    indices = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices"):
        make(fastpeft, "tied", trainable_token_indices=indices, ensure_weight_tying=True)
