"""What the tests of the two norms share: operands drawn by hypothesis, results against float64, PyTorch's own norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastpeft.ops import products

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def norm_case(
    rows: int,
    k: int,
    dtype: torch.dtype,
    out: torch.dtype,
    adapter: torch.dtype,
    parameter: torch.dtype,
    *,
    members: int,
    rank: int,
    p: float,
    gap: int = 8,
    spread: float = 1.0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Operands of every operator of a norm; the matrices are column blocks of wider ones."""

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def block(columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * new(rows, columns + gap)).to(dtype)[:, :columns]

    return {
        "x": block(k, dtype, spread),
        "residual": block(k, dtype, spread),
        "dy": block(k, out),
        "d_h": block(k, dtype),
        "ds": block(members * rank, adapter),
        "weight": new(k).to(parameter),
        "bias": new(k).to(parameter),
        "A": (new(members * rank, k) / k**0.5).to(adapter),
        "offset": 0.0,
        "scaling": [0.5 * (g + 1) for g in range(members)],
        "p": p,
        "seed": torch.tensor([987654321987], device=device) if p else None,
        "out": out,
    }


@st.composite
def norm_cases(draw: st.DrawFn, rows: int = 90, columns: int = 200, rank: int = 20) -> dict[str, Any]:
    """Such operands with every option, drawn from a seed."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(FLOATS))
    out, adapter, parameter = (draw(st.sampled_from((dtype, torch.float32))) for _ in range(3))
    case = norm_case(
        draw(st.integers(0, rows)),
        draw(st.integers(1, columns)),
        *(dtype, out, adapter, parameter),
        members=draw(st.integers(1, 3)),
        rank=draw(st.integers(1, rank)),
        p=draw(st.sampled_from((0.0, 0.05, 0.6))),
        gap=draw(st.integers(0, 9)),
        spread=draw(st.sampled_from((1.0, 0.05, 30.0))),
    )
    for name in ("weight", "bias"):
        case[name] = case[name] if draw(st.booleans()) else None
    if draw(st.booleans()):
        case["scaling"] = [draw(st.floats(0.1, 4.0))] * len(case["scaling"])
    return case | {"offset": draw(st.sampled_from((0.0, 1.0)))}


def exactly(case: dict[str, Any]) -> dict[str, Any]:
    """The same operands in float64, every result too."""
    wide = {key: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in case.items()}
    return wide | {"out": torch.float64}


def magnitudes(c: dict[str, Any], mean: Tensor, rstd: Tensor) -> dict[str, tuple[Tensor | None, ...]]:
    """The sums that the results of `c`, in float64, are made of, with every term positive; mean is 0 for RMSNorm.

    By operator, "shrink" and "rim" being those with the narrow products; parameters that are None have None.
    """
    factor = 1.0 if c["weight"] is None else (c["weight"] + c["offset"]).abs()
    h = (c["x"].abs() + mean[:, None].abs()) * rstd[:, None]
    y = h * factor if c["bias"] is None else h * factor + c["bias"].abs()
    adapter, dropout = c["A"].abs(), (c["scaling"], c["p"], c["seed"])
    rim = c["dy"].abs()
    dA = products.shrink_backward_reference(c["ds"].abs(), y, adapter, *dropout, rim)

    def gradients(dy: Tensor, d_h: Tensor | float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        g = dy * factor
        dx = rstd[:, None] * (g + g.mean(1, keepdim=True) + h * (g * h).mean(1, keepdim=True)) + d_h
        d_weight = None if c["weight"] is None else (dy * h).sum(0)
        return dx, d_weight, None if c["bias"] is None else dy.sum(0)

    dx, d_weight, d_bias = gradients(rim, 0.0)
    return {
        "y": (y,),
        "s": (products.shrink_reference(y, adapter, *dropout),),
        "plain": gradients(c["dy"].abs(), 0.0),
        "d_h": gradients(c["dy"].abs(), c["d_h"].abs())[:1],
        "shrink": (dx, dA, d_weight, d_bias),
        "no dx": (dA,),
    }


def compare(no_worse: Callable[..., None], ours: Any, torchs: Any, exact: Any, magnitude: Any = None) -> None:
    """Each result against PyTorch's in the same dtype and in float64; empty ones (not asked for) are left out."""
    for i, (o, t, e) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert o.shape == t.shape == e.shape and o.dtype == t.dtype
        if o.numel():
            no_worse(o, t, e, magnitude[i] if magnitude else None)


def results(function: Callable[..., Any], *operands: Tensor | None) -> list[Tensor]:
    """Outputs and gradients of what requires one, for fixed output gradients."""
    outputs = function(*operands)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    grads = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in outputs]
    wanted = [t for t in operands if t is not None and t.requires_grad]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, grads)]


def doubles(*operands: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in operands]


def kept_bytes(call: Callable[[], Any], *owned: Tensor | None) -> int:
    """Bytes that autograd keeps of `call`, those of `owned` left out."""
    known = {t.untyped_storage().data_ptr() for t in owned if t is not None}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = call()
    assert alive is not None
    return sum(kept.values())
