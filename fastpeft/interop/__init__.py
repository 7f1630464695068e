"""Working together with the real peft, and in its place."""

from .._bridge_hook import bridged

__all__ = ["bridged"]
