"""What the operator tests share: the instruction sets of this processor, the tolerance, tables that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tolerance

from fastpeft.ops import decisions
from fastpeft.ops.backend import cpu_extension


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels that this processor has, in turn."""
    extension = cpu_extension()
    if extension is None:
        pytest.skip("fastpeft was installed without its C++ extension")
    before = extension.isa()
    try:
        extension.select_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension.select_isa(before)


@pytest.fixture(scope="session")
def no_worse() -> Callable[..., None]:
    """tolerance.no_worse(ours, torchs, exact, magnitude)."""
    return tolerance.no_worse


@pytest.fixture
def fused_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the autograd.Function even for the tiny inputs of gradcheck."""
    import sys

    for name in ("glu", "lora_linear", "lora_linear_group"):  # the package has functions of the same names
        monkeypatch.setattr(sys.modules[f"fastpeft.ops.{name}"], "NATIVE_ELEMENTS", -1)


@pytest.fixture
def assert_named_unusable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Any], None]]:
    """assert_named_unusable(table): as the user's table of decisions it is refused, with the file's name."""

    def check(table: Any) -> None:
        monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path))
        (tmp_path / "decisions.json").write_text(json.dumps(table))
        decisions.forget()
        with pytest.raises(ValueError, match="decisions.json cannot be used"):
            decisions.load()

    yield check
    monkeypatch.undo()
    decisions.forget()
