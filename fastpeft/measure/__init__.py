"""Measuring what training costs: bytes kept for the backward, time per step, peak memory.

Shared by `fastpeft bench` and the programs under bench/. Nothing here knows about adapters: a contender is a callable.
"""

from fastpeft.measure.live import LiveMemory
from fastpeft.measure.memory import PeakMemory, resident_bytes
from fastpeft.measure.saved import SavedActivations
from fastpeft.measure.steps import Contender, StepTimes, interleave

__all__ = ["Contender", "LiveMemory", "PeakMemory", "SavedActivations", "StepTimes", "interleave", "resident_bytes"]
