"""Where fastpeft's classes become peft's: `fastpeft._bridge_hook`, on the ground floor so that layers may use it."""

from .._bridge_hook import Bridged, bridged, forget

__all__ = ["Bridged", "bridged", "forget"]
