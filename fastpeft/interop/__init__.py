"""Working together with the real peft, and in its place."""

from .._bridge_hook import bridged
from .as_peft import install_as_peft, uninstall_as_peft

__all__ = ["bridged", "install_as_peft", "uninstall_as_peft"]
