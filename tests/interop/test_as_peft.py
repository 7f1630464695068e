"""`install_as_peft()` in a process where the real peft is installed but not imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap

import pytest

import fastpeft
from fastpeft.interop import names
from fastpeft.interop.placeholders import placeholder


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_home_in_the_table_exists() -> None:
    """A name of PEFT's whose home moved would fail only when some library imports it."""
    served = {name for module in names.MODULES for name in names.names_of(module)}
    for home, entries in names.HOMES.items():
        module = importlib.import_module(home)
        for entry in entries.split():
            theirs, _, ours = entry.partition("=")
            assert hasattr(module, ours or theirs), f"{home} has no {ours or theirs}"
            assert theirs in served, f"{theirs} has a home but no module of peft serves it"


def test_the_table_covers_the_real_peft() -> None:
    """Every public name of `peft` and of the LoRA modules can be imported from fastpeft in its place."""
    peft = pytest.importorskip("peft")
    if getattr(peft, "__version__", "") != names.PEFT_VERSION:
        pytest.skip(f"the table is that of PEFT {names.PEFT_VERSION}")
    for module in ("peft", "peft.tuners", "peft.tuners.lora", "peft.functional"):
        public = set(importlib.import_module(module).__all__)
        public = {name for name in public if "_TARGET_MODULES_MAPPING" not in name}
        assert not public - names.names_of(module) - {"MultitaskPromptEmbedding"}, module


def test_import_peft_means_fastpeft() -> None:
    run(
        """
        import fastpeft, importlib.metadata, importlib.util, sys
        fastpeft.install_as_peft()
        fastpeft.install_as_peft()  # twice is once
        assert importlib.util.find_spec("peft").origin == "fastpeft"
        import peft
        assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
        assert importlib.metadata.metadata("peft")["Name"] == "peft"
        assert importlib.metadata.packages_distributions()["peft"][0] == "peft"
        assert importlib.util.find_spec("peft.tuners.lora.layer") is not None
        assert importlib.util.find_spec("peft.no_such_module") is None
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        assert LoraConfig is fastpeft.LoraConfig and type(LoraConfig()) is LoraConfig
        assert PeftModel is fastpeft.PeftModel and peft.tuners.lora.layer.Linear is Linear
        assert issubclass(Linear, LoraLayer) and issubclass(LoraLayer, BaseTunerLayer)
        from transformers.utils import is_peft_available
        assert is_peft_available()
        for error, code in ((ImportError, "from peft import nonsense"), (ModuleNotFoundError, "import peft.nonsense")):
            try:
                exec(code)
            except error:
                continue
            raise AssertionError(code)
        import peft.config
        peft.config.__version__ = "9.8"  # assigning to a name assigns where it lives
        peft.config.__version__ = "9.9"
        assert LoraConfig().peft_version == "9.9" and peft.__version__ == "0.21.2"
        del peft.config.__version__  # as pytest's monkeypatch does to undo each
        assert LoraConfig().peft_version == "9.8"
        del peft.config.__version__
        assert LoraConfig().peft_version == "0.21.2"
        """
    )


def test_uninstall_brings_the_real_peft_back() -> None:
    pytest.importorskip("peft")
    run(
        """
        import fastpeft
        fastpeft.install_as_peft()
        import peft as ours
        fastpeft.uninstall_as_peft()
        import peft
        assert peft is not ours and hasattr(peft, "__file__")
        assert isinstance(fastpeft.LoraConfig(), peft.LoraConfig)
        try:
            fastpeft.install_as_peft()
        except fastpeft.FastpeftError as error:
            assert "already imported" in str(error) and peft.__version__ in str(error)
        else:
            raise AssertionError("installed over the real peft")
        """
    )


def test_methods_that_are_not_implemented() -> None:
    """TRL imports `PrefixTuningConfig` and asks `isinstance`; only making one is an error, which names the method."""
    config = placeholder("peft.tuners.prefix_tuning", "PrefixTuningConfig")
    assert not isinstance(fastpeft.LoraConfig(), config) and config.__name__ == "PrefixTuningConfig"
    with pytest.raises(fastpeft.UnsupportedOptionError, match="PrefixTuningConfig is not implemented.*LORA"):
        config(num_virtual_tokens=4)
    with pytest.raises(AttributeError, match="PrefixTuningConfig is not implemented"):
        config.from_pretrained("somewhere")
    with pytest.raises(fastpeft.UnsupportedOptionError, match="create_arrow_model is not implemented"):
        placeholder("peft", "create_arrow_model")()
    table = "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING"
    assert table in names.names_of("peft.utils") and placeholder("peft.utils", table) == {}
    assert names.where("peft.tuners.lokr.layer", "Linear") is None  # LoKr's Linear is not LoRA's
    assert names.where("peft.tuners.lora.layer", "Linear") is not None
