"""Fused operators into a model, in place and reversibly: observe, plan, verify, apply, report.

`fastpeft.patch` is the function that one calls and also this package. Python binds the package to that name whenever a
module of it is imported, so the package can be called too: `fastpeft.patch(model)` works in either case.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .apply import patch, report, unpatch
from .report import Report, Row

__all__ = ["Report", "Row", "patch", "report", "unpatch"]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return patch(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
