"""Memory traffic of a LoRA linear layer, forward and backward, counted without a GPU.

    python tools/count_traffic.py                       # 4096 x 4096, rank 16, bf16, 132 multiprocessors
    python tools/count_traffic.py --tokens 8192 --rank 64

One unit is one pass over a tokens x width matrix in 16 bit. K = N = width, so x, y, dy and dx are a unit each; the
weight itself, the same for all, is left out. A launch reads and writes each of its operands once (checked against the
emulator's count of distinct bytes in tests/ptxsim). Matrix products of the vendor and PyTorch's element-wise operators
are written down below, one row a launch; the Triton kernels' launches are recorded from the launchers themselves, with
the adapters, s, ds and the partial sums that cross programs. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ["TRITON_INTERPRET"] = "0"

import torch
from fastpeft.kernels import _launch, lora_linear
from triton.runtime.jit import JITFunction

# What each kernel reads and writes, by parameter.
OPERANDS = {
    "_shrink_kernel": (("p_x", "p_a"), ("p_s",)),
    "_expand_kernel": (("p_y", "p_s", "p_b"), ("p_y",)),
    "_expand_backward_kernel": (("p_dy", "p_s", "p_b"), ("p_ds", "p_db")),
    "_shrink_backward_kernel": (("p_ds", "p_x", "p_a", "p_dx"), ("p_da", "p_dx")),
    "_outer_kernel": (("p_t", "p_x"), ("p_out",)),
    "sum_parts_kernel": (("p_parts", "p_parts2"), ("p_out", "p_out2")),
    "_norm_kernel": (("p_x", "p_r", "p_w", "p_b"), ("p_y", "p_h", "p_mean", "p_rstd")),
    "_norm_backward_kernel": (("p_dy", "p_x", "p_dh", "p_w", "p_mean", "p_rstd"), ("p_dx", "p_dw", "p_db")),
    "_parameters_kernel": (("p_dy", "p_x", "p_mean", "p_rstd"), ("p_dw", "p_db")),
    "_norm_shrink_kernel": (("p_x", "p_w", "p_b", "p_a", "p_seed"), ("p_y", "p_s", "p_mean", "p_rstd")),
    "_norm_shrink_backward_kernel": (
        ("p_dy", "p_ds", "p_x", "p_w", "p_a", "p_mean", "p_rstd", "p_seed"),
        ("p_dx", "p_dw", "p_db"),
    ),
    "_norm_outer_kernel": (("p_ds", "p_x", "p_w", "p_b", "p_mean", "p_rstd", "p_seed"), ("p_da",)),
    "_remake_kernel": (("p_x", "p_w", "p_b", "p_mean", "p_rstd"), ("p_y",)),
    "_wide_kernel": (("p_x", "p_w", "p_bias", "p_s", "p_b"), ("p_y",)),
    "_wide_backward_kernel": (("p_dy", "p_w", "p_ds", "p_a"), ("p_dx",)),
}


# A kernel's name and its operands: {parameter: (elements, bytes)}, twice what it holds if read and written.
Launch = tuple[str, dict[str, tuple[int, int]]]


@contextmanager
def recording(multiprocessors: int = 132, shared_bytes: int = 227 * 1024) -> Iterator[list[Launch]]:
    """Within, launches do nothing but append to the list yielded."""
    log: list[Launch] = []
    run, limits = JITFunction.run, _launch._limits

    def record(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        named = dict(zip(self.arg_names, args, strict=False))
        reads, writes = OPERANDS[self.__name__]
        if self.__name__ == "_shrink_backward_kernel" and named["p_dx"] is None:
            # Without dx, A is not touched.
            reads, writes = ("p_ds", "p_x"), ("p_da",)
        operands: dict[str, tuple[int, int]] = {}
        for name in (*reads, *writes):
            if named[name] is None or (name.endswith("2") and named[name] is named[name[:-1]]):
                continue  # the second pass of one reduction has the same one twice
            elements, size = operands.get(name, (0, 0))
            operands[name] = elements + named[name].numel(), size + named[name].nbytes
        log.append((self.__name__.strip("_"), operands))

    JITFunction.run = record
    _launch._limits = lambda kind, index: _launch.Limits(multiprocessors, shared_bytes)
    try:
        yield log
    finally:
        JITFunction.run, _launch._limits = run, limits


Row = tuple[str, float, float]  # a launch, its passes over x, y, dy and dx, and all its bytes in the same unit


def rows(*pairs: tuple[str, float]) -> list[Row]:
    """Launches that touch little else than the big matrices."""
    return [(name, units, units) for name, units in pairs]


def peft(p: float) -> list[Row]:
    """PEFT's layer in eager mode, adapters in x's dtype: result + lora_B(lora_A(dropout(x))) * scaling."""
    forward = [("y = x Wᵀ", 2.0), ("x Aᵀ", 1.0), ("s Bᵀ", 1.0), ("· scaling", 2.0), ("y + rim", 3.0)]
    backward = [
        ("dy · scaling", 2.0), ("dB = dyᵀ s", 1.0), ("ds = dy B", 1.0), ("dA = dsᵀ x", 1.0), ("ds A", 1.0),
        ("dx = dy W", 2.0), ("dx + rim", 3.0),
    ]  # fmt: skip
    if p:  # native_dropout keeps a mask of one byte an element: half a unit
        forward.insert(1, ("dropout", 2.5))
        backward.insert(5, ("dropout backward", 2.5))
    return rows(*forward, *backward)


def peft_fp32(p: float) -> list[Row]:
    """The same with PEFT's default of fp32 adapters over a 16-bit base, outside autocast: x, s Bᵀ and y in fp32."""
    forward = [
        ("y = x Wᵀ", 2.0), ("x to fp32", 3.0), ("x Aᵀ", 2.0), ("s Bᵀ", 2.0), ("· scaling", 4.0), ("y + rim", 5.0),
        ("y to 16 bit", 3.0),
    ]  # fmt: skip
    backward = [
        ("dy to fp32", 3.0), ("dy to 16 bit", 3.0), ("dy · scaling", 4.0), ("dB = dyᵀ s", 2.0), ("ds = dy B", 2.0),
        ("dA = dsᵀ x", 2.0), ("ds A", 2.0), ("rim to 16 bit", 3.0), ("dx = dy W", 2.0), ("dx + rim", 3.0),
    ]  # fmt: skip
    if p:
        forward.insert(2, ("dropout", 4.5))
        backward.insert(7, ("dropout backward", 4.5))
    return rows(*forward, *backward)


def ours(call: Callable[[], object], elements: int, itemsize: int = 2) -> list[Row]:
    """The launches of `call`; big are the operands of `elements` elements that are no weight and no workspace."""
    with recording() as log:
        call()
    out = []
    for name, operands in log:
        kept = {k: v for k, v in operands.items() if k != "p_w"}
        big = sum(n // elements for k, (n, _) in kept.items() if k in ("p_x", "p_y", "p_dy", "p_dx"))
        out.append((name.removesuffix("_kernel"), float(big), sum(b for _, b in kept.values()) / (elements * itemsize)))
    return out


def forms(tokens: int, width: int, rank: int, p: float, adapter: torch.dtype) -> dict[str, list[Row]]:
    """The launches of each form."""
    x, W = (torch.empty(rows, width, dtype=torch.bfloat16) for rows in (tokens, width))
    A, B, s = (torch.empty(*shape, dtype=adapter) for shape in ((rank, width), (width, rank), (tokens, rank)))
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    n, rest = x.numel(), ([2.0], p, seed)
    shrink = ours(lambda: lora_linear.lora_shrink(x, A, *rest), n)
    expand = ours(lambda: lora_linear.lora_expand_(x, s, B, [width]), n)
    expand_backward = ours(lambda: lora_linear.lora_expand_backward(x, s, B), n)
    dA_and_rim = ours(lambda: lora_linear.lora_shrink_backward(s, x, A, *rest, x), n)
    dA_alone = ours(lambda: lora_linear.lora_shrink_backward(s, x, A, *rest), n)
    wide = ours(lambda: lora_linear.lora_linear_wide(x, W, None, s, B, [width]), n)
    wide_backward = ours(lambda: lora_linear.lora_linear_wide_backward(x, W, s, A, *rest), n)
    rim = s.numel() / n
    base, base_dx = rows(("y = x Wᵀ", 2.0)), rows(("dx = dy W", 2.0))
    copy_x, copy_dy = rows(("copy of x", 2.0)), rows(("copy of dy", 2.0))
    # The rim of dx is in the product only where no mask falls on it.
    bordered = [("y = [x s] [W B]ᵀ", 2.0, 2.0 + rim)]
    bordered_dx = base_dx if p else [("dx = [dy ds] [W; A]", 2.0, 2.0 + rim)]
    dA = dA_and_rim if p else dA_alone
    return {
        "PEFT, eager": peft(p),
        "PEFT, eager, fp32 adapters": peft_fp32(p),
        "plain": [*shrink, *base, *expand, *expand_backward, *base_dx, *dA_and_rim],
        "bordered, x and dy copied": [
            *copy_x, *shrink, *bordered, *copy_dy, *expand_backward, *bordered_dx, *dA,
        ],
        "bordered, x and dy arrive in place": [*shrink, *bordered, *expand_backward, *bordered_dx, *dA],
        "bordered, s made where x is made": [*bordered, *expand_backward, *bordered_dx, *dA],
        "one Triton product": [*shrink, *wide, *expand_backward, *wide_backward, *dA_alone],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--fp32-adapters", action="store_true", help="adapters in fp32 in our forms too")
    parser.add_argument("--rows", action="store_true", help="every launch of every form")
    options = parser.parse_args()
    adapter = torch.float32 if options.fp32_adapters else torch.bfloat16
    print("| form | dropout | passes over x, y, dy, dx | with s, ds, adapters, partial sums | launches |")
    print("|---|---|---|---|---|")
    for p in (0.0, 0.05):
        for name, launches in forms(options.tokens, options.width, options.rank, p, adapter).items():
            passes, units = (sum(row[i] for row in launches) for i in (1, 2))
            print(f"| {name} | {p:g} | {passes:g} | {units:.2f} | {len(launches)} |")
            if options.rows:
                for launch, passes, units in launches:
                    print(f"| · {launch} | | {passes:g} | {units:.3f} | |")


if __name__ == "__main__":
    main()
