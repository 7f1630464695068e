"""What the operators behind `glu` give for one case, and how large the sums behind it are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpeft.ops.activation import ACTIVATIONS
from fastpeft.ops.products import shrink_backward_reference, shrink_reference


def case(
    rows: int, n: int, members: int, rank: int, dtype: torch.dtype, adapter: torch.dtype, p: float, act: str,
    gated: bool = True, gap: int = 8, scaling: list[float] | None = None, device: torch.device | str = "cpu",
) -> dict:  # fmt: skip
    """Operands; gate, up, dh and ds are column blocks of wider matrices."""

    def block(columns: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
        return (size * torch.randn(rows, columns + gap, device=device)).to(dtype)[:, :columns]

    return {
        "gate": block(n, dtype, 2.0),
        "up": block(n, dtype) if gated else None,
        "dh": block(n, dtype),
        "ds": block(members * rank, adapter),
        "A": torch.randn(members * rank, n, device=device).to(adapter),
        "act": act,
        "dropout": (
            scaling or [0.5 * (g + 1) for g in range(members)],
            p,
            torch.randint(2**63 - 1, (1,), device=device) if p else None,
        ),
    }


def everything(ops: object, case: dict, cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All results of the four operators."""
    gate, up, dh, ds, A = (None if case[k] is None else cast(case[k]) for k in ("gate", "up", "dh", "ds", "A"))
    act, dropout = case["act"], case["dropout"]
    out = {"h": ops.glu(gate, up, act)}
    out["dgate"], out["dup"] = ops.glu_backward(dh, gate, up, act)
    out["shrink h"], out["s"] = ops.glu_shrink(gate, up, act, A, *dropout)
    found = ops.glu_shrink_backward(dh, ds, gate, up, act, A, *dropout, True)
    out["shrink dgate"], out["shrink dup"], out["dA"] = found
    *none, out["dA alone"] = ops.glu_shrink_backward(None, ds, gate, up, act, A, *dropout, False)
    assert none == [None, None]
    return {name: t for name, t in out.items() if t is not None}


def magnitudes(case: dict, h: Tensor) -> dict[str, Tensor]:
    """The sums of magnitudes behind the results that are sums, in float64."""
    gate, dh, ds, A, h = (t.double().abs() for t in (case["gate"], case["dh"], case["ds"], case["A"], h))
    up = torch.ones_like(gate) if case["up"] is None else case["up"].double().abs()
    total = dh.clone()
    dA = shrink_backward_reference(ds, h, A, *case["dropout"], total)
    f, d = (function(case["gate"].double()).abs() for function in ACTIVATIONS[case["act"]])
    d = d + 0.5  # where a derivative is zero, terms of about half that cancel
    s = shrink_reference(h, A, *case["dropout"])
    sums = {"s": s, "dA": dA, "dA alone": dA}
    return sums | {"dgate": dh * up * d, "shrink dgate": total * up * d, "shrink dup": total * f}
