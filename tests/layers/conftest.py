"""`--device cuda` makes every tensor and module of these tests on the GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device(device):
    if device.type == "cpu":
        yield
    else:
        with torch.device(device):
            yield
