"""Triton kernels and their launchers: no autograd, no operator registration, nothing from the floors above.

Importing this package imports neither triton nor torch; importing one of its modules imports both. `why_unavailable`
says, before that, whether a launch can work:

    reason = fastpeft.kernels.why_unavailable("cuda")      # None, or a sentence a person can act on

| module | what |
|---|---|
| `lora_linear` | the operators of `ops/lora_linear.py`, one function each |
| `lora_shrink`, `lora_expand`, `lora_outer`, `lora_wide` | the kernels behind it |
| `lora_embedding` | forward and backward of an embedding with an adapter |
| `dora_linear`, `weight_norm` | what DoRA does beside a base product, and the norms it divides by |
| `rms_norm`, `layer_norm` | the norms; the kernels behind them are in `norm` and `norm_shrink` |
| `glu`, `activation` | activations, gated or not, alone and with the adapter's product of the result |
| `rope` | rotary position embeddings |
| `nf4` | weights of 4 bits: decoded, and multiplied with |
| `philox` | dropout masks |
"""

from __future__ import annotations

import importlib.util
import os
import sys

__all__ = ["interpreted", "why_unavailable"]


def interpreted() -> bool:
    """True if Triton kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), which takes tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in {"1", "true", "on", "yes", "y"}


def _intercepted() -> bool:
    """True while something stands in for Triton's launcher, e.g. a PTX emulator that takes CPU tensors."""
    jit = sys.modules.get("triton.runtime.jit")
    return jit is not None and not jit.JITFunction.run.__module__.startswith("triton.")


def why_unavailable(device: object = "cuda") -> str | None:
    """Why Triton kernels cannot be launched on tensors of `device` here; None if they can.

    `device` is a `torch.device`, or its name ("cuda:1", "cpu", "xpu").
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; on Linux, `pip install triton`"
    if interpreted() or _intercepted():
        return None
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return (
            "Triton compiles for GPUs, and the tensors are on the CPU; set TRITON_INTERPRET=1 before triton is first "
            "imported to run the kernels in its interpreter (slow, for tests)"
        )
    import torch

    if not hasattr(torch, kind) or not getattr(torch, kind).is_available():
        return f"this PyTorch ({torch.__version__}) sees no {kind} device"
    if kind == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(int(index) if index else None)
        if capability < (8, 0):
            return f"the GPU's compute capability is {capability[0]}.{capability[1]}; the Triton kernels need 8.0"
    return None
