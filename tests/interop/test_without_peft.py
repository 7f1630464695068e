"""The same with `install_as_peft()` in a process where peft is not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scenarios import SCENARIOS

for _package in ("trl", "accelerate", "datasets"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

Run = Callable[[str], str]


@pytest.fixture(scope="module")
def results(without_peft: Run) -> dict[str, str | None]:
    output = without_peft(
        f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import scenarios; scenarios.main()"
    )
    lines = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, results[name]


def test_peft_is_really_absent(without_peft: Run) -> None:
    """The premise of this file: no finder, no metadata, no answer from Transformers; and fastpeft alone works."""
    without_peft(
        "import importlib.metadata, importlib.util, torch, fastpeft\n"
        "from transformers.utils import is_peft_available\n"
        "assert importlib.util.find_spec('peft') is None and not is_peft_available()\n"
        "assert 'peft' not in {d.name for d in importlib.metadata.distributions()}\n"
        "config = fastpeft.LoraConfig(target_modules=['0'])\n"
        "net = fastpeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)\n"
        "assert type(net) is fastpeft.PeftModel and net(torch.ones(1, 4)).shape == (1, 4)\n"
        "# Transformers said no and remembers it; installing makes it ask again.\n"
        "fastpeft.install_as_peft()\n"
        "import peft\n"
        "assert is_peft_available() and peft.PeftModel is fastpeft.PeftModel and isinstance(net, peft.PeftModel)\n"
        "fastpeft.uninstall_as_peft()\n"
        "assert importlib.util.find_spec('peft') is None and not is_peft_available()\n"
    )


def test_installing_too_late_for_a_trainer_warns(without_peft: Run) -> None:
    output = without_peft(
        "import warnings, fastpeft, transformers.trainer\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    fastpeft.install_as_peft()\n"
        "print(*(w.message for w in caught if w.category is fastpeft.PeftWarning))\n"
    )
    assert "transformers.trainer" in output and "before importing" in output


def test_pickles_load_without_peft(without_peft: Run, tmp_path: Path) -> None:
    """A config pickled where peft is installed, and its class is a subclass of peft's, loads where it is not."""
    import pickle

    import fastpeft

    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(fastpeft.LoraConfig(r=3)))
    without_peft(
        "import pickle, fastpeft\n"
        f"config = pickle.load(open({str(path)!r}, 'rb'))\n"
        "assert type(config) is fastpeft.LoraConfig and config.r == 3\n"
    )
