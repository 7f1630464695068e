"""Shared fixtures. `pytest --device cuda` runs the device-agnostic tests on a GPU, untouched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Triton kernels run in the interpreter unless a GPU is asked for. Triton reads its variable when a kernel is first
# defined, so it is set before any test module is imported; ours tells pytest-xdist's workers, which have no argv.
if "--device cuda" in " ".join(sys.argv).replace("=", " "):
    os.environ["FASTPEFT_TEST_DEVICE"] = "cuda"
if os.environ.get("FASTPEFT_TEST_DEVICE") != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device of the device-agnostic tests")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen on the command line."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: no CUDA device is available")
    return torch.device(name)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker a core: more threads would only fight each other
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses much where other processes compete for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fastpeft_command() -> Callable[..., Any]:
    """`fastpeft_command("finetune", "--out", …)`: the command in this process; an unexpected exception is raised."""
    from typer.testing import CliRunner

    from fastpeft.cli.app import app

    def run(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run
