"""The Triton launchers against the float64 reference: any shape, rank, dtype and row stride, with and without dropout.

A result may be off by twice what PyTorch's own operators are off in the same dtypes, or by one rounding, whichever is
more. Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fastpeft.kernels import lora_linear as triton_ops
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.ops import philox, products

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32)]  # of x and of the adapter


@dataclass
class Case:
    """One group: operands, and its seven results in float64 and as PyTorch's own operators make them."""

    M: int
    K: int
    splits: list[int]
    r: int
    p: float = 0.0
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16)
    scaling: list[float] | None = None
    bias: bool = True
    pad: int = 8  # every operand is a column block of something so much wider, as in a stacked group
    wide: bool = True  # the products with the weight as well, which take long in the interpreter
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        new = lambda *shape: torch.randn(*shape, device=self.device)  # noqa: E731
        (dtype, adapter), N, G = self.dtypes, sum(self.splits), len(self.splits)
        self.scaling = self.scaling or [2.0] * G
        self.x = new(self.M, self.K + self.pad).to(dtype)[:, : self.K]
        self.dy = new(self.M, N + self.pad).to(dtype)[:, :N]
        self.base = new(self.M, N + self.pad).to(dtype)[:, :N]
        self.dx = new(self.M, self.K + self.pad).to(dtype)[:, : self.K]
        self.A = (new(G * self.r, self.K) / max(self.K, 1) ** 0.5).to(adapter)
        self.B = new(N, self.r).to(adapter)
        self.weight = (new(N, self.K) / max(self.K, 1) ** 0.5).to(dtype)
        self.b = new(N).to(dtype) if self.bias else None
        self.seed = torch.tensor([987654321987], device=self.device) if philox.threshold(self.p) else None
        exact = [None if t is None else t.double() for t in (self.x, self.dy, self.A, self.B)]
        s, ds = self._narrow(*exact)
        self.s, self.ds = s.to(adapter), ds.to(adapter)

    def _narrow(self, x, dy, A, B):
        s = products.shrink_reference(x, A, self.scaling, self.p, self.seed)
        parts = zip(dy.split(self.splits, 1), B.split(self.splits))
        return s, torch.cat([dy_g @ B_g for dy_g, B_g in parts], 1)

    def members(self):
        """(columns of s, columns of y) of each member."""
        ends = torch.tensor([0, *self.splits]).cumsum(0).tolist()
        return [(slice(g * self.r, (g + 1) * self.r), slice(*ends[g : g + 2])) for g in range(len(self.splits))]

    def masks(self, dtype):
        kept = philox.keep_scale(self.p)
        for g in range(len(self.splits)):
            mask = torch.ones(self.M, self.K, device=self.device)
            if self.seed is not None:
                mask = philox.keep_mask(self.seed, g, self.M, self.K, self.p) * kept
            yield mask.to(dtype)

    def eager(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The results by PyTorch's operators, operand by operand, all in `dtype` or in the operands' own."""
        to = lambda t: t if dtype is None or t is None else t.to(dtype)  # noqa: E731
        x, dy, A, B, s, ds, W, b = map(to, (self.x, self.dy, self.A, self.B, self.s, self.ds, self.weight, self.b))
        y, dx, rim = to(self.base).clone(), to(self.dx).clone(), 0
        out = {"s": [], "ds": [], "dB": [], "dA": []}
        for (rank, columns), c, mask in zip(self.members(), self.scaling, self.masks(x.dtype), strict=True):
            z = (x * mask).to(A.dtype)
            out["s"].append(c * F.linear(z, A[rank]))
            out["ds"].append(dy[:, columns].to(B.dtype) @ B[columns])
            out["dB"].append(dy[:, columns].to(B.dtype).t() @ s[:, rank])
            out["dA"].append(c * (ds[:, rank].t() @ z))
            y[:, columns] += F.linear(s[:, rank], B[columns])
            rim = rim + (c * (ds[:, rank] @ A[rank])) * mask
        out = {name: torch.cat(parts, 0 if name in ("dA", "dB") else 1) for name, parts in out.items()}
        out |= {"y": y, "dx": (dx + rim).to(dx.dtype)}
        if self.wide:
            out |= {"wide": F.linear(x, W, b), "wide_dx": (dy @ W + rim).to(dx.dtype)}
            for rank, columns in self.members():
                out["wide"][:, columns] += F.linear(s[:, rank], B[columns])
        return out

    def triton(self) -> dict[str, torch.Tensor]:
        y, dx = self.base.clone(), self.dx.clone()
        rest = (self.scaling, self.p, self.seed)
        triton_ops.lora_expand_(y, self.s, self.B, self.splits)
        pairs = [
            triton_ops.lora_expand_backward(self.dy[:, columns], self.s[:, rank], self.B[columns])
            for rank, columns in self.members()
        ]
        out = {
            "s": triton_ops.lora_shrink(self.x, self.A, *rest),
            "ds": torch.cat([ds for ds, _ in pairs], 1),
            "dB": torch.cat([dB for _, dB in pairs], 0),
            "dA": triton_ops.lora_shrink_backward(self.ds, self.x, self.A, *rest, dx),
            "y": y,
            "dx": dx,
        }
        if self.wide:
            out["wide"] = triton_ops.lora_linear_wide(self.x, self.weight, self.b, self.s, self.B, self.splits)
            out["wide_dx"] = triton_ops.lora_linear_wide_backward(self.dy, self.weight, self.ds, self.A, *rest)
        return out


def check(case: Case) -> dict[str, torch.Tensor]:
    exact, eager, ours = case.eager(torch.float64), case.eager(), case.triton()
    for name, truth in exact.items():
        got = ours[name]
        assert got.shape == truth.shape and got.dtype == eager[name].dtype, name
        error, allowed = ((t.double() - truth).norm().item() for t in (got, eager[name]))
        rounding = torch.finfo(got.dtype).eps / 2 * truth.norm().item()
        assert error <= max(2 * allowed, rounding), f"{name}: error {error:.2e}, PyTorch's {allowed:.2e} in {case}"
    return ours


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_group_of_three(dtypes, p, device):
    check(Case(40, 136, [64, 32, 32], 16, p, dtypes, device=device))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 40),
    K=st.integers(1, 80),
    splits=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    r=st.integers(1, 20),
    p=st.sampled_from([0.0, 0.3]),
    dtypes=st.sampled_from(DTYPES),
    equal=st.booleans(),
)
def test_any_shape(M, K, splits, r, p, dtypes, equal):
    scaling = None if equal else [0.5 * (g + 1) for g in range(len(splits))]
    check(Case(M, K, splits, r, p, dtypes, scaling, bias=equal))


@pytest.mark.parametrize("r, dtypes", [(72, (FP32, FP32)), (200, (BF16, BF16))])
def test_large_ranks(r, dtypes, device):
    """Beyond what fits in registers beside a fused pass, the passes are taken one by one."""
    check(Case(20, 72, [33, 20], r, 0.1, dtypes, device=device))


def test_long_reductions_are_split(device):
    """Enough rows and columns that every reduction goes through the workspace, with the same bits every time."""
    case = Case(260, 2112, [264], 4, dtypes=(FP16, FP16), wide=False, device=device)
    first, second = check(case), case.triton()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_offsets_beyond_32_bits(device):
    """Rows that lie 2^31 elements apart, as the last tokens of a long stacked activation do."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("takes 26 GB")
    case = Case(2, 32, [32], 4, 0.1, (FP16, FP16), device=device)
    expected = case.triton()
    far = [torch.empty(2**31 + 64, dtype=FP16, device=device).as_strided((2, 32), (2**31, 1)) for _ in range(4)]
    for name, matrix in zip(("x", "dy", "base", "dx"), far, strict=True):
        setattr(case, name, matrix.copy_(getattr(case, name)))
    y, dx = case.base, case.dx  # `triton` works on copies, whose rows are close together again
    got = case.triton()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    triton_ops.lora_expand_(y, case.s, case.B, case.splits)
    triton_ops.lora_shrink_backward(case.ds, case.x, case.A, case.scaling, case.p, case.seed, dx)
    assert torch.equal(y, expected["y"]) and torch.equal(dx, expected["dx"])


def test_everything_dropped(device):
    """p = 1 gives zeros, not 0/0."""
    case = Case(5, 40, [16], 4, 1.0, (FP32, FP32), device=device)
    out = case.triton()
    assert not out["s"].any() and not out["dA"].any() and torch.equal(out["dx"], case.dx)


@pytest.mark.parametrize("M, K, N", [(0, 16, 16), (3, 0, 16), (3, 16, 0)])
def test_empty_operands(M, K, N, device):
    case = Case(M, K, [N], 4, device=device)
    for name, value in case.triton().items():
        truth = case.eager(torch.float64)[name]
        assert value.shape == truth.shape, name
        torch.testing.assert_close(value.double(), truth, rtol=1e-2, atol=1e-2)


def test_a_transposed_weight(device):
    """Transformers' Conv1D keeps W as (K, N)."""
    case = Case(20, 48, [40], 8, device=device)
    expected = case.triton()
    case.weight = case.weight.t().contiguous().t()
    got = case.triton()
    assert torch.equal(got["wide"], expected["wide"]) and torch.equal(got["wide_dx"], expected["wide_dx"])


def test_what_cannot_be_written_in_place_is_refused(device):
    s, B = torch.ones(4, 2, device=device), torch.ones(6, 2, device=device)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        triton_ops.lora_expand_(torch.zeros(6, 4, device=device).t(), s, B, [6])
    with pytest.raises(ValueError, match="splits"):
        triton_ops.lora_expand_(torch.zeros(4, 6, device=device), s, B, [5])
    with pytest.raises(TypeError, match="float64"):
        triton_ops.lora_shrink(torch.zeros(4, 6, device=device).double(), B.t().double(), [1.0])
