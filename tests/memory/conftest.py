"""The tiny models of the patch tests, and one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "patch"))


@pytest.fixture(autouse=True)
def _small(one_thread: None) -> None:
    """These models gain nothing from threads."""
