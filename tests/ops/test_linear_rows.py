"""The product of few rows with a large weight: every logit of a decoded token is one of its sums."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from called import Called
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import no_worse
from torch import nn
from torch.nn import Parameter

from fastpeft.ops import decisions, gemm, lora_linear
from fastpeft.ops.backend import OPS, backend, cpu_extension
from fastpeft.ops.linear_rows import few, linear_few, reference

needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="no C++ extension")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def up_to_8_rows(monkeypatch):
    """As on a processor on which ours was measured to be faster."""
    monkeypatch.setattr(decisions, "linear_rows", lambda dtype: 8 if dtype in DTYPES else 0)


def assert_right(m, k, n, dtype, bias, gap):
    x = torch.randn(m, k + gap).to(dtype)[:, :k]
    w = (torch.randn(n, k + gap) / max(k, 1) ** 0.5).to(dtype)[:, :k]
    b = torch.randn(n).to(dtype) if bias else None
    exact = reference(x.double(), w.double(), None if b is None else b.double())
    sizes = x.double().abs() @ w.double().abs().T + (0 if b is None else b.double().abs())
    no_worse(OPS["auto"].linear_rows(x, w, b), F.linear(x, w, b), exact, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16, 4), (3, 17, 33), (4, 1025, 37), (7, 2100, 70), (9, 40, 100)])
def test_each_instruction_set(isa, shape, dtype):
    torch.manual_seed(0)
    for bias in (False, True):
        assert_right(*shape, dtype, bias, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_beyond_the_caches(isa, dtype):
    torch.manual_seed(0)
    columns = 523 if dtype is torch.float32 else 1045
    assert_right(1, columns, 8300, dtype, True, 2)


@needs_extension
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 20), k=st.integers(0, 1200), n=st.integers(0, 90), dtype=st.sampled_from(DTYPES),
    bias=st.booleans(), gap=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(m, k, n, dtype, bias, gap, seed):
    torch.manual_seed(seed)
    assert_right(m, k, n, dtype, bias, gap)


@needs_extension
def test_error_of_a_long_sum_is_at_most_twice_the_vendors():
    torch.manual_seed(0)
    x, w = torch.randn(3, 14336), torch.randn(64, 14336)
    exact = x.double() @ w.double().T
    ours, theirs = (
        ((y.double() - exact).norm() / exact.norm()).item() for y in (OPS["auto"].linear_rows(x, w, None), x @ w.T)
    )
    assert ours <= 2 * theirs


@needs_extension
def test_a_row_has_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    x, w = torch.randn(5, 300), torch.randn(900, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for t in (1, 2, 5):
            torch.set_num_threads(t)
            results.append(OPS["auto"].linear_rows(x, w, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_float64_is_the_reference_and_dtypes_may_differ():
    x, w, b = torch.randn(2, 9).double(), torch.randn(5, 9).double(), torch.randn(5).double()
    assert torch.equal(OPS["auto"].linear_rows(x, w, b), reference(x, w, b))
    mixed = OPS["auto"].linear_rows(x.bfloat16(), w.float(), b.float())
    assert mixed.dtype is torch.bfloat16
    torch.testing.assert_close(mixed, reference(x.bfloat16(), w.float(), b.float()))


def test_the_operator_is_well_formed():
    torch.library.opcheck(
        torch.ops.fastpeft.linear_rows.default, (torch.randn(3, 40), torch.randn(50, 40), torch.randn(50))
    )
    torch.library.opcheck(torch.ops.fastpeft.linear_rows.default, (torch.randn(1, 8), torch.randn(5, 8), None))


@needs_extension
@pytest.mark.parametrize(
    "w, b", [(torch.randn(5, 8), None), (torch.randn(5, 9), torch.randn(4)), (torch.randn(5), None)]
)
def test_shapes_that_do_not_fit(w, b):
    with pytest.raises(RuntimeError):
        OPS["auto"].linear_rows(torch.randn(2, 9), w, b)


@needs_extension
def test_when_it_is_taken(up_to_8_rows):
    x, w = torch.randn(8, 256), torch.randn(256, 256)
    assert few("auto", x, w)
    assert few("auto", x.bfloat16(), w.bfloat16())
    assert not few("reference", x, w)
    assert not few("auto", torch.randn(9, 256), w)
    assert not few("auto", x, w[:255])
    assert not few("auto", x, w.t())
    assert not few("auto", x, w.bfloat16())
    assert not few("auto", x.double(), w.double())
    torch.set_float32_matmul_precision("high")
    try:
        assert not few("auto", x, w)
    finally:
        torch.set_float32_matmul_precision("highest")
    with Called() as called:
        gemm.linear("auto", x, w, None)
        gemm.linear("auto", torch.randn(9, 256), w, None)
    assert called.names[0] == "fastpeft::linear_rows" and "fastpeft::linear_rows" not in called.names[1:]


@needs_extension
def test_a_layer_without_a_graph(up_to_8_rows):
    x, w, b = torch.randn(2, 3, 256), torch.randn(300, 256) / 16, torch.randn(300)
    assert linear_few(x, w, b) is None  # a graph may be recorded
    with torch.no_grad():
        torch.testing.assert_close(linear_few(x, w, b), F.linear(x, w, b))
        torch.testing.assert_close(linear_few(x[0, 0], w, None), F.linear(x[0, 0], w))
        assert linear_few(x.bfloat16(), w, b) is None
        assert linear_few(x, w, b.bfloat16()) is None
        assert linear_few(torch.randn(9, 256), w, b) is None
        assert linear_few(torch.randn(0, 256), w, b) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert linear_few(x, w, b) is None
        with backend("reference"):
            assert linear_few(x, w, b) is None
        assert linear_few(torch.randn(2, 255), w, b) is None  # F.linear says what is wrong
    with torch.inference_mode():
        torch.testing.assert_close(linear_few(x, w, b), F.linear(x, w, b))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_small_operator_s_large_base_product(up_to_8_rows, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 512).to(dtype).requires_grad_()
    w, b = (Parameter(t.to(dtype), requires_grad=False) for t in (torch.randn(400, 512) / 22, torch.randn(400)))
    A, B = (Parameter(t.to(dtype)) for t in (torch.randn(8, 512) / 22, torch.randn(400, 8)))

    def formula(x, w, b, A, B):
        return F.linear(x, w, b) + 0.5 * F.linear(F.linear(x, A), B)

    operands = x, w, b, A, B
    exact = formula(*(t.double() for t in operands))
    theirs, ours = formula(*operands), lora_linear(x, w, b, A, B, 0.5)
    no_worse(ours, theirs, exact)
    with torch.no_grad():
        assert torch.equal(lora_linear(x, w, b, A, B, 0.5), ours)
        nothing = Parameter(torch.zeros_like(B))
        assert torch.equal(lora_linear(x, w, b, A, nothing, 0.5), OPS["auto"].linear_rows(x.detach(), w, b))
    for t, g in zip((x, A, B), torch.autograd.grad(ours.sum(), (x, A, B))):
        (wanted,) = torch.autograd.grad(formula(*operands).sum(), t)
        torch.testing.assert_close(g, wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max().item())


@needs_extension
def test_the_vendor_s_under_torch_compile(up_to_8_rows):
    x, w = torch.randn(4, 256), torch.randn(300, 256)
    compiled = torch.compile(lambda: gemm.linear("auto", x, w, None), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), F.linear(x, w))


@needs_extension
def test_by_the_table_of_decisions(monkeypatch):
    maker, table = cpu_extension().maker(), decisions.load()[0]

    def ask(entry, dtype=torch.float32):
        changed = {**table, "linear_rows": {"cpu": {"float32": entry}}}
        monkeypatch.setattr(decisions, "load", lambda: (changed, "a test"))
        decisions.linear_rows.cache_clear()
        return decisions.linear_rows(dtype)

    try:
        assert ask({"rows": 0, "processors": None}) == 0
        assert ask({"rows": 5, "processors": ["none of them"]}) == 0
        assert ask({"rows": 5, "processors": None}, torch.float64) == 0
        if cpu_extension().isa() != "scalar":
            assert ask({"rows": 5, "processors": None}) == 5
            assert ask({"rows": 5, "processors": [maker]}) == 5
    finally:
        decisions.linear_rows.cache_clear()


@pytest.mark.parametrize("entry", [None, {"rows": 5}, {"rows": None, "processors": None}])
def test_a_table_whose_entry_cannot_be_used_is_named(entry, assert_named_unusable):
    table = copy.deepcopy(decisions.load()[0])
    table["linear_rows"]["cpu"]["float32"] = entry
    assert_named_unusable(table)


@needs_extension
def test_a_patched_model_s_head_takes_it(up_to_8_rows):
    transformers = pytest.importorskip("transformers")
    import fastpeft

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1200, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()  # fmt: skip
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    ids = torch.arange(5)[None]
    before = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    fastpeft.patch(model)
    head = model.get_base_model().lm_head
    with Called() as called, torch.no_grad():
        head(torch.randn(1, 1, 64))
    assert "fastpeft::linear_rows" in called.names
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0), before)
    hidden = torch.randn(1, 2, 64, requires_grad=True)
    assert head(hidden).requires_grad  # with a graph it is the model's own
    seen = []
    handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        head(hidden)
    handle.remove()
    assert seen == [torch.Size([1, 2, 1200])]
    fastpeft.unpatch(model)
    assert type(head) is nn.Linear and "forward" not in head.__dict__
