"""Running code in a process that has everything but peft."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import fastpeft

PRELUDE = "import site, sys; sys.path.insert(0, {root!r}); site.addsitedir({farm!r})\n"


@pytest.fixture(scope="session")
def without_peft(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Runs Python code where peft is not installed, and returns what it printed.

    Site-packages is replaced by a folder of links to all that is in it except peft and peft's metadata, so that neither
    the import system nor `importlib.metadata` can know of it.
    """
    farm = tmp_path_factory.mktemp("site-packages")
    for folder in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for entry in Path(folder).iterdir():
            if entry.name != "peft" and not entry.name.startswith("peft-") and not (farm / entry.name).exists():
                (farm / entry.name).symlink_to(entry)
    prelude = PRELUDE.format(root=str(Path(fastpeft.__file__).parents[1]), farm=str(farm))

    def run(code: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-S", "-c", prelude + code], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run
