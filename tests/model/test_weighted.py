"""`add_weighted_adapter`: the numbers of PEFT for every way to combine adapters."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft.tuner import merging

peft = pytest.importorskip("peft")
from peft.utils import merge_utils  # noqa: E402


def adapted(library, base, ranks: dict[str, int], targets, **config):
    torch.manual_seed(3)
    model = None
    for name, r in ranks.items():
        c = library.LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=targets, init_lora_weights=False, **config)
        if model is None:
            model = library.get_peft_model(base, c, adapter_name=name)
        else:
            model.add_adapter(name, c)
    return model


EQUAL_RANKS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
ANY_RANKS = ["cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.6]])
@pytest.mark.parametrize("kind", EQUAL_RANKS + ANY_RANKS)
def test_combinations_are_pefts(mixed, kind, weights):
    import copy

    ranks = {"x": 4, "y": 4 if kind in EQUAL_RANKS else 3}
    base = copy.deepcopy(mixed)
    models = []
    for library, model in ((fastpeft, mixed), (peft, base)):
        model = adapted(library, model, ranks, ["emb", "conv", "lin"])
        torch.manual_seed(4)
        options = {"density": 0.4} if kind not in ("linear", "cat", "svd") else {}
        if "ties" in kind:
            options["majority_sign_method"] = "frequency"
        if kind == "svd":
            options |= {"svd_rank": 2, "svd_clamp": 0.9}
        model.add_weighted_adapter(["x", "y"], weights, "merged", combination_type=kind, **options)
        models.append(model)
    ours, theirs = (m.state_dict() for m in models)
    assert list(ours) == list(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    configs = [m.peft_config["merged"].to_dict() for m in models]
    assert configs[0] == configs[1]
    assert not any(p.requires_grad for n, p in models[0].named_parameters() if ".merged" in n)
    assert models[0].active_adapters == ["x"]


def test_cat_is_exact(mlp):
    model = adapted(fastpeft, mlp, {"x": 2, "y": 3}, ["lin0", "lin1"])
    model.add_weighted_adapter(["x", "y"], [0.5, -2.0], "sum", combination_type="cat")
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        expected = 0.5 * layer.get_delta_weight("x") - 2.0 * layer.get_delta_weight("y")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)


def test_adapters_on_different_layers(mlp):
    model = fastpeft.get_peft_model(
        mlp, fastpeft.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False), "x"
    )
    model.add_adapter("y", fastpeft.LoraConfig(r=2, target_modules=["lin1"], init_lora_weights=False))
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum", combination_type="linear")
    assert model.peft_config["sum"].target_modules == {"lin0", "lin1"}
    base = model.base_model.model
    torch.testing.assert_close(base.lin0.get_delta_weight("sum"), base.lin0.get_delta_weight("x"))
    torch.testing.assert_close(base.lin1.get_delta_weight("sum"), base.lin1.get_delta_weight("y"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["x", "z"], [1, 1], "m", "svd"), "Adapter z does not exist"),
        ((["x", "y"], [1, 1], "m", "linear"), r"same r value.*\{'x': 2, 'y': 3}"),
        ((["x", "y"], [1, 1], "m", "nonsense"), "Invalid combination_type: nonsense"),
        ((["x", "y"], [1], "m", "svd"), "one weight per adapter"),
        ((["x", "y"], [1, 1], "m", "ties_svd"), "pass `density`"),
        (([], [], "m", "svd"), "no adapter"),
    ],
)
def test_what_cannot_be_combined_is_said_and_nothing_is_added(mlp, arguments, message):
    model = adapted(fastpeft, mlp, {"x": 2, "y": 3}, ["lin0"])
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["x", "y"] and list(model.state_dict()) == before


def test_shared_saved_modules_and_parameters_are_refused(mlp):
    model = adapted(fastpeft, mlp, {"x": 2, "y": 2}, ["lin0"], modules_to_save=["lin1"])
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        model.add_weighted_adapter(["x", "y"], [1, 1], "m")
    model.delete_adapter("y")
    model.add_weighted_adapter(["x"], [1.0], "y")  # one alone is fine


def test_an_existing_name_is_left_alone(mlp):
    model = adapted(fastpeft, mlp, {"x": 2, "y": 2}, ["lin0"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.add_weighted_adapter(["x", "y"], [1, 1], "y")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_formulas_are_pefts(density, vote):
    torch.manual_seed(0)
    tasks, weights = [torch.randn(7, 5) for _ in range(3)], torch.tensor([0.5, -1.0, 2.0])
    for name in ("magnitude_prune", "dare_linear", "ties", "dare_ties"):
        extra = (vote,) if name.endswith("ties") else ()
        if density == 0.0 and name.startswith("dare"):
            continue  # nothing is kept: 0 / 0
        results = []
        for library in (merging, merge_utils):
            torch.manual_seed(1)
            results.append(getattr(library, name)([t.clone() for t in tasks], weights, density, *extra))
        assert torch.equal(*results)
    with pytest.raises(ValueError, match="Density should be >= 0"):
        merging.ties(tasks, weights, -0.1)
