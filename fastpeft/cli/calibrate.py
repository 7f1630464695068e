"""`fastpeft bench --calibrate`: which paths products and attention take is measured on this machine and written down.

For each dtype, `linear_4bit` and its backward are timed by both paths, interleaved, on more and more rows; the table's
entry is the largest number of rows up to which decoding in place was never the slower one. On the CPU the products of
`gemm` are timed beside the vendor's, and attention with its gradient beside PyTorch's; the entries are the numbers of
rows and of queries from which on ours was never the slower one. `ops/decisions.py` has the form and the place of the
file.
"""

from __future__ import annotations

import copy
import datetime
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from fastpeft.cli.console import console
from fastpeft.cli.models import pick_device
from fastpeft.measure import Contender, interleave
from fastpeft.ops import decisions
from fastpeft.ops.backend import OPS, native_calls, route
from fastpeft.ops.nf4 import Weight4bit, quantize_4bit
from fastpeft.ops.nf4_linear import input_gradient, linear

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
GEMM_ROWS = (16, 32, 64, 128, 256, 512)
ATTENTION_TOKENS = (8, 16, 32, 64, 128, 256)
FEW_ROWS = (1, 2, 4, 8, 16, 31)
SHAPE = (1536, 576)
HEADS = (8, 2, 64)  # of queries, of keys, and their columns


def calibrate(
    device_name: str,
    threads: int | None,
    rows: tuple[int, ...] = ROWS,
    shape: tuple[int, int] = SHAPE,
    steps: int = 7,
    gemm_rows: tuple[int, ...] = GEMM_ROWS,
    few_rows: tuple[int, ...] = FEW_ROWS,
    attention_tokens: tuple[int, ...] = ATTENTION_TOKENS,
) -> Path:
    """Measure, show the entries before and after, write the user's table; returns the file.

    Raises CommandError where the device is not there; ValueError where the table in force cannot be read.
    """
    if threads:
        torch.set_num_threads(threads)
    device = pick_device(device_name)
    table = copy.deepcopy(decisions.load()[0])
    entries = table["linear_4bit"].setdefault(device.type, {})
    before = copy.deepcopy(entries)
    with console.status("measuring the 4-bit products"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            panel_bytes = entries.get(name, {}).get("panel_bytes", decisions.MAX_PANEL_BYTES)
            forward, backward = _measure(device, dtype, panel_bytes, rows, shape, steps)
            entries[name] = {"forward": forward, "backward": backward, "panel_bytes": panel_bytes}
    lines = []
    if device.type == "cpu" and native_calls():
        gemm = table["gemm"]["cpu"]["float32"]
        with console.status("measuring large fp32 products"):
            found = {"rows": _from_rows(gemm_rows, shape, steps), "processors": None}
        lines.append(f"large fp32 products: {_from_line(gemm, 'rows')} → {_from_line(found, 'rows')}")
        table["gemm"]["cpu"]["float32"] = found
        attention = table["attention"]["cpu"]["float32"]
        with console.status("measuring attention"):
            found = {"tokens": _from_tokens(attention_tokens, steps), "processors": None}
        lines.append(f"attention in fp32: {_from_line(attention, 'tokens')} → {_from_line(found, 'tokens')}")
        table["attention"]["cpu"]["float32"] = found
        few = table["linear_rows"]["cpu"]
        with console.status("measuring products of few rows"):
            for name in entries:
                most = _few_rows(few_rows, shape, getattr(torch, name), steps)
                old = few.get(name, {"rows": 0})["rows"]
                lines.append(f"products of few rows, {name}: ours up to {old} → {most}")
                few[name] = {"rows": most, "processors": None}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    table["measured"] = f"{today}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = decisions.save(table)
    _show(before, entries, device.type, lines, path)
    return path


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _measure(
    device: torch.device,
    dtype: torch.dtype,
    panel_bytes: int,
    rows: tuple[int, ...],
    shape: tuple[int, int],
    steps: int,
) -> tuple[int, int]:
    """Up to how many rows decoding in place is not slower: forward, backward."""
    weight, backend = quantize_4bit(torch.randn(*shape, device=device), "nf4", 64, True), route(device)

    def in_place(product: Callable[[torch.Tensor], Any], x: torch.Tensor) -> bool:
        def by(limit: int) -> Callable[[int], torch.Tensor]:
            def step(_: int) -> torch.Tensor:
                with decisions.forced(decisions.Rows(limit, limit, panel_bytes)):
                    return product(x).flatten()[:1]

            return step

        times = interleave(
            [Contender("in place", by(len(x))), Contender("panels", by(0))], steps=steps, warmup=2, device=device
        )
        return times["in place"].median <= times["panels"].median

    return (
        _up_to(rows, lambda m: in_place(lambda x: _forward(backend, x, weight), _rows(m, shape[1], dtype, device))),
        _up_to(
            rows, lambda m: in_place(lambda x: input_gradient(backend, x, weight), _rows(m, shape[0], dtype, device))
        ),
    )


def _forward(backend: str, x: torch.Tensor, weight: Weight4bit) -> torch.Tensor:
    return linear(backend, x, weight, None)


def _rows(m: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(m, columns, device=device).to(dtype)


def _up_to(rows: tuple[int, ...], faster: Callable[[int], bool]) -> int:
    most = 0
    for m in rows:
        if not faster(m):
            break
        most = m
    return most


def _from_rows(rows: tuple[int, ...], shape: tuple[int, int], steps: int) -> int | None:
    """From how many rows on our three products, forward, backward and onto, together were not slower than PyTorch's."""
    weight, ops = torch.randn(*shape), OPS["auto"]

    def faster(m: int) -> bool:
        x, dy = torch.randn(m, shape[1]), torch.randn(m, shape[0])
        dx = torch.zeros_like(x)

        def ours(_: int) -> torch.Tensor:
            y = ops.gemm(x, weight.t())
            ops.gemm_(dx, dy, weight, True)
            return y[0, :1] + ops.gemm(dy, weight)[0, :1]

        def theirs(_: int) -> torch.Tensor:
            y = torch.mm(x, weight.t())
            dx.addmm_(dy, weight)
            return y[0, :1] + torch.mm(dy, weight)[0, :1]

        return _not_slower(ours, theirs, steps)

    return _from(rows, faster)


def _from_tokens(tokens: tuple[int, ...], steps: int) -> int | None:
    """From how many queries on our causal attention and its gradient together were not slower than PyTorch's."""
    (heads, kv_heads, width), ops = HEADS, OPS["auto"]
    scale = width**-0.5

    def faster(n: int) -> bool:
        # As projections of all heads leave them.
        q, k, v = (torch.randn(1, n, h, width).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
        dout = torch.randn_like(q)
        leaves = q0, k0, v0 = [t.detach().requires_grad_() for t in (q, k, v)]

        def ours(_: int) -> torch.Tensor:
            out, log_sum = ops.attention(q, k, v, True, scale)
            return ops.attention_backward(dout, q, k, v, out, log_sum, True, scale)[0][0, 0, 0, :1]

        def theirs(_: int) -> torch.Tensor:
            out = torch.nn.functional.scaled_dot_product_attention(q0, k0, v0, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(out, leaves, dout)[0][0, 0, 0, :1]

        return _not_slower(ours, theirs, steps)

    return _from(tokens, faster)


def _from(sizes: tuple[int, ...], faster: Callable[[int], bool]) -> int | None:
    least = None
    for n in reversed(sizes):
        if not faster(n):
            break
        least = n
    return least


def _not_slower(ours: Callable[[int], torch.Tensor], theirs: Callable[[int], torch.Tensor], steps: int) -> bool:
    times = interleave(
        [Contender("ours", ours), Contender("theirs", theirs)], steps=steps, warmup=2, device=torch.device("cpu")
    )
    return times["ours"].median <= times["theirs"].median


def _few_rows(rows: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, steps: int) -> int:
    """Up to how many rows `linear_rows` was not slower than PyTorch's product."""
    weight = torch.randn(*shape).to(dtype)

    def faster(m: int) -> bool:
        x = torch.randn(m, shape[1]).to(dtype)
        return _not_slower(
            lambda _: OPS["auto"].linear_rows(x, weight, None)[0, :1],
            lambda _: torch.nn.functional.linear(x, weight)[0, :1],
            steps,
        )

    return _up_to(rows, faster)


def _from_line(entry: dict[str, Any], unit: str) -> str:
    if entry[unit] is None:
        return "the vendor's"
    of = "" if entry["processors"] is None else f", on processors of {', '.join(entry['processors'])}"
    return f"ours from {entry[unit]} {unit}{of}"


def _show(before: dict[str, Any], after: dict[str, Any], device_type: str, lines: list[str], path: Path) -> None:
    table = Table(
        box=box.ROUNDED, border_style="faint", title=f"4-bit products on {device_type}: decoded in place up to"
    )
    for column in ("dtype", "rows, forward", "rows, backward"):
        table.add_column(column)
    for name, entry in after.items():
        old = before.get(name, {})
        table.add_row(name, *(f"{old.get(key, '–')} → {entry[key]}" for key in ("forward", "backward")))
    console.print(table)
    for line in lines:
        console.print(escape(line))
    console.print(f"[faint]written to[/faint] {escape(str(path))}; delete it to have the package's own table again")
