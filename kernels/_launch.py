"""What every launcher needs: the device's limits, tile sizes computed from them, the device guard, the second pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ._device import sum_parts_kernel

MEMBERS = 4  # a kernel takes the scalings of up to so many members as arguments


@dataclass(frozen=True)
class Limits:
    """What tile sizes are computed from."""

    multiprocessors: int
    shared_bytes: int  # that one program may use


@functools.cache
def _limits(kind: str, index: int | None) -> Limits:
    if kind == "cuda":
        prop = torch.cuda.get_device_properties(index)
        shared = getattr(prop, "shared_memory_per_block_optin", 0) or getattr(prop, "shared_memory_per_block", 0)
        return Limits(prop.multi_processor_count, shared or 64 * 1024)
    if kind == "xpu":
        prop = torch.xpu.get_device_properties(index)
        return Limits(prop.gpu_subslice_count, getattr(prop, "local_mem_size", 64 * 1024))
    # Interpreter and emulator: any fixed choice, here an A100's, so that what is counted there is what would run.
    return Limits(108, 163 * 1024)


def limits(device: torch.device) -> Limits:
    """Limits of `device`; asked of the driver once."""
    return _limits(device.type, device.index)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device the current one: Triton launches on the current device's current stream."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


def config(warps: int, stages: int, **blocks: int) -> dict[str, Any]:
    """Keyword arguments of a launch. Fusing a * b + c is asked for: Triton 3.10 will no longer do it by default."""
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two >= n, kept within least … most."""
    return max(least, min(most, triton.next_power_of_2(max(n, 1))))


def products(big: torch.Tensor, adapter: torch.Tensor) -> int:
    """How many bfloat16 products `dot` makes of one, which is what registers go by: 1, 3 (one operand fp32) or 6."""
    if adapter.dtype != torch.float32:
        return 1  # the big operand is rounded to the adapter's dtype
    return 3 if big.dtype == torch.bfloat16 else 6


def per_pass(members: int, most: int) -> int:
    """How many members a pass takes when it can take `most`: as few passes as that allows, of even size."""
    passes = triton.cdiv(members, max(most, 1))
    return triton.cdiv(members, passes)


def aligned(*matrices: torch.Tensor) -> bool:
    """True if every row starts on 16 elements and 16 bytes: what Triton needs to know for vector loads."""
    return all(t.data_ptr() % 16 == 0 and (t.stride(0) % 16 == 0 or t.stride(1) % 16 == 0) for t in matrices)


def unit_columns(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` itself if its rows are contiguous (any row stride), else a copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def require_unit_columns(name: str, matrix: torch.Tensor) -> None:
    """Error for a result to be written in place that has no contiguous rows."""
    if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
        raise ValueError(f"{name}: rows must be contiguous (any row stride), got strides {tuple(matrix.stride())}")


def require_float(**tensors: torch.Tensor) -> None:
    """Error for a dtype the kernels do not have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(
                f"{name} is {tensor.dtype}; the Triton kernels take bfloat16, float16 and float32, the reference "
                "backend takes any"
            )


def padded(values: Sequence[float], count: int = MEMBERS) -> list[float]:
    """`values` with zeros up to `count`."""
    return [*values, *[0.0] * (count - len(values))]


def chunks(count: int, size: int = MEMBERS) -> list[tuple[int, int]]:
    """[first, last) of successive chunks of 0 … count."""
    return [(i, min(i + size, count)) for i in range(0, count, size)]


def splits_for(programs: int, steps: int, least_steps: int, most_programs: int) -> tuple[int, int]:
    """(parts, steps per part) of a reduction of `steps` steps, so that programs * parts come near `most_programs`."""
    parts = max(1, min(most_programs // max(programs, 1), steps // max(least_steps, 1)))
    per_part = triton.cdiv(max(steps, 1), parts)
    return triton.cdiv(max(steps, 1), per_part), per_part


def partials(parts: int, out: torch.Tensor) -> torch.Tensor:
    """Where a kernel writes `parts` partial results of `out`: `out` itself for one part, else an fp32 workspace."""
    return out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)


def sum_partials(*reductions: tuple[torch.Tensor, torch.Tensor]) -> None:
    """out = parts.sum(0) in a fixed order, for one or two (parts, out), in one launch.

    Nothing to do where the kernel wrote `out` itself. `out` is contiguous.
    """
    todo = [(parts, out) for parts, out in reductions if parts is not out]
    if not todo:
        return
    BN = 512
    (parts, out), (parts2, out2) = todo[0], todo[-1]
    blocks = [triton.cdiv(out.numel(), BN) for _, out in todo]
    most = max(parts.shape[0], parts2.shape[0])
    sum_parts_kernel[(sum(blocks),)](
        parts, out, out.numel(), parts.shape[0], blocks[0], parts2, out2, out2.numel(), parts2.shape[0],
        VECTOR=out.numel() % 16 == 0, VECTOR2=out2.numel() % 16 == 0,
        **config(4, 1, BP=power_of_two(most, 1, 8), BN=BN),
    )  # fmt: skip
