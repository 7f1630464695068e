"""Mistakes that a user of the command line can mend: shown as one sentence, without a traceback."""

from __future__ import annotations

from fastpeft.errors import FastpeftError


class CommandError(FastpeftError):
    """What is wrong and what to do about it; exit code 2."""


class DataError(CommandError, ValueError):
    """Training data that cannot be read; names file, line and key."""
