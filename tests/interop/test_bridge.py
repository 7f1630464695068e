"""Where the real peft is installed, fastpeft's objects pass as peft's, and no code of peft runs in them."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft._bridge_hook import Bridged, bridged, forget

peft = pytest.importorskip("peft")


@dataclasses.dataclass
class Settings(Bridged):
    _peft_name = "peft.tuners.lora.config.LoraConfig"
    r: int = 8
    names: list = dataclasses.field(default_factory=list)


class Model(nn.Module, Bridged):
    _peft_name = "peft.peft_model.PeftModelForCausalLM"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class LoraLayer(Bridged):
    _peft_name = "peft.tuners.lora.layer.LoraLayer"


class Linear(nn.Module, LoraLayer):
    _peft_name = "peft.tuners.lora.layer.Linear"


def test_every_counterpart_is_passed_for() -> None:
    config, model, layer = Settings(), Model(nn.Linear(2, 2)), Linear()
    assert isinstance(config, Settings) and isinstance(config, peft.LoraConfig) and isinstance(config, peft.PeftConfig)
    assert (
        isinstance(model, Model) and isinstance(model, peft.PeftModelForCausalLM) and isinstance(model, peft.PeftModel)
    )
    assert isinstance(layer, peft.tuners.lora.Linear) and isinstance(layer, peft.tuners.lora.LoraLayer)
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert not isinstance(layer, peft.tuners.lora.Embedding)
    assert not isinstance(model, peft.PeftModelForSeq2SeqLM)
    assert type(layer) is Linear  # registered, not replaced: attribute lookups in the layer cost what they did
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == ("Model", "Model", __name__)


def test_no_code_of_peft_runs() -> None:
    """peft's __init__, forward, __getattr__, and methods that only peft has, are never reached."""
    for made in (Model(nn.Linear(2, 2)), Settings()):
        order = type(made).__mro__
        assert all(not base.__module__.startswith("peft") for base in order[: order.index(object)])

    class Inner(nn.Linear):
        def get_prompt(self) -> str:  # peft.PeftModel has a method of this name
            return "inner"

    model = Model(Inner(2, 2))
    assert model.get_prompt() == "inner" and not hasattr(model, "create_or_update_model_card")
    assert not hasattr(Settings(), "save_pretrained")


def test_dataclass_machinery() -> None:
    config = Settings(r=4, names=["a"])
    assert config == Settings(r=4, names=["a"]) and config != Settings()
    assert dataclasses.asdict(config) == {"r": 4, "names": ["a"]} and repr(config) == "Settings(r=4, names=['a'])"
    assert [field.name for field in dataclasses.fields(config)] == ["r", "names"]
    changed = dataclasses.replace(config, r=5)
    assert changed.r == 5 and type(changed) is type(config)
    # peft's own code reads what it has noted about its fields, when a library hands it one of our configs.
    field = {field.name: field for field in dataclasses.fields(config)}["r"]
    assert field.metadata == peft.LoraConfig.__dataclass_fields__["r"].metadata and field.default == 8
    assert not Settings.__dataclass_fields__["r"].metadata


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles(protocol: int) -> None:
    config = Settings(r=4)
    for made in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config, protocol))):
        assert made == config and type(made) is type(config)
    model = Model(nn.Linear(2, 2))
    stream = io.BytesIO()
    torch.save(model, stream, pickle_protocol=protocol)
    stream.seek(0)
    for made in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert type(made) is type(model) and torch.equal(made.inner.weight, model.inner.weight)


def test_class_replaced_by_a_wrapper_library() -> None:
    """FSDP2 puts a class of its own in front of a module's class."""

    class Sharded:
        pass

    model = Model(nn.Linear(2, 2))
    cls = type(model)
    model.__class__ = type(f"FSDP{cls.__name__}", (Sharded, cls), {})
    assert isinstance(model, Sharded) and isinstance(model, peft.PeftModel)
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_compiles_without_graph_breaks() -> None:
    model = Model(nn.Linear(2, 2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_class_is_made_once() -> None:
    assert bridged(Settings) is bridged(Settings) is type(Settings()) is bridged(type(Settings()))


def test_public_configs_and_models() -> None:
    """The classes that users and trainers hold."""
    config = fastpeft.LoraConfig(r=2, target_modules=["0"])
    assert isinstance(config, peft.LoraConfig) and isinstance(pickle.loads(pickle.dumps(config)), peft.LoraConfig)
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    assert isinstance(model, fastpeft.PeftModel) and isinstance(model, peft.PeftModel)
    assert isinstance(model.base_model, peft.LoraModel)
    assert isinstance(model.base_model, peft.tuners.tuners_utils.BaseTuner)
    layer = model.base_model.model[0]
    assert isinstance(layer, peft.tuners.lora.Linear) and isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    saved = fastpeft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    wrapper = fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), saved).base_model.model[1]
    assert isinstance(wrapper, peft.utils.ModulesToSaveWrapper)
    assert isinstance(wrapper, peft.utils.other.AuxiliaryTrainingWrapper)
    mro = type(model).__mro__
    assert peft.PeftModel in mro[mro.index(object) :]


def test_task_classes() -> None:
    for name in ("CausalLM", "Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        ours, theirs = getattr(fastpeft, f"PeftModelFor{name}"), getattr(peft, f"PeftModelFor{name}")
        assert issubclass(bridged(ours), theirs) and issubclass(bridged(ours), fastpeft.PeftModel)


def test_a_broken_peft_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An install of peft that cannot be imported is worth a warning, and fastpeft works."""

    class Broken:
        @staticmethod
        def find_spec(name: str, path=None, target=None):
            if name == "peft":
                raise RuntimeError("half an install")

    real = {name: module for name, module in sys.modules.items() if name == "peft" or name.startswith("peft.")}
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    forget()
    try:
        with pytest.warns(UserWarning, match="half an install") as caught:
            assert type(Settings()) is Settings and type(Linear()) is Linear
        assert len(caught) == 1
    finally:
        monkeypatch.undo()
        forget()
    assert isinstance(Settings(), peft.LoraConfig)


def test_importing_fastpeft_imports_neither_peft_nor_transformers() -> None:
    code = "import sys, fastpeft; assert not {'peft', 'transformers', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
