"""Memory traffic of RMSNorm and LayerNorm, forward and backward, counted without a GPU.

    python tools/count_norms.py                         # 4096 x 4096, rank 16, bf16, 132 multiprocessors
    python tools/count_norms.py --tokens 8192 --width 576

For every operator: the bytes that its launches read and write, each operand once (checked against the emulator's count
of distinct bytes in tests/ptxsim), over the bytes it must move: x, y, dy, dx, residual, d_h. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
from count_traffic import recording
from fastpeft.kernels import layer_norm, rms_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16, help="of each of three projections that the norm feeds")
    options = parser.parse_args()
    M, K, r = options.tokens, options.width, 3 * options.rank
    new = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16)  # noqa: E731
    x, w, A, ds, rstd, seed = new(M, K), new(K), new(r, K), new(M, r), torch.empty(M), torch.zeros(1, dtype=torch.int64)
    print("| operator | launches | passes over x, y, dy, dx it must make | bytes moved / bytes of those |")
    print("|---|---|---|---|")
    for kind, module, kept, parameters in (
        ("rms_norm", rms_norm, (x, rstd), (w,)),
        ("layer_norm", layer_norm, (x, rstd, rstd), (w, w)),
    ):
        shrink, no, yes = (A, [2.0] * 3, 0.05, seed, x.dtype), [False] * len(parameters), [True] * len(parameters)
        norm = (*parameters, 1e-6, 0.0)
        calls = {
            "": (2, (x, *norm, x.dtype)),
            "_add": (4, (x, x, *norm, x.dtype)),
            "_backward, frozen": (3, (x, *kept, *parameters, 0.0, None, *no)),
            "_backward": (3, (x, *kept, *parameters, 0.0, None, *yes)),
            "_backward with d_h": (4, (x, *kept, *parameters, 0.0, x, *yes)),
            "_shrink": (2, (x, *norm, *shrink)),
            "_shrink_backward, frozen": (4, (x, ds, *kept, *parameters, 0.0, *shrink, True, *no)),
            "_shrink_backward": (4, (x, ds, *kept, *parameters, 0.0, *shrink, True, *yes)),
        }
        for name, (passes, arguments) in calls.items():
            with recording() as log:
                getattr(module, kind + name.split(",")[0].split(" ")[0])(*arguments)
            moved = sum(size for _, operands in log for _, size in operands.values())
            print(f"| {kind}{name} | {len(log)} | {passes} | {moved / (passes * x.nbytes):.3f} |")


if __name__ == "__main__":
    main()
