"""Weights of 4 bits in bitsandbytes' storage: what they mean, and the products with them as operators.

A weight W (N, K) is cut, row after row, into blocks of `blocksize` elements, each with a scale. Element i is a nibble
q_i, the high half of byte i / 2 where i is even and the low half where it is odd (QLoRA: Dettmers et al., 2023, §3):

    W_i   = code[q_i] * scale_b                 b = i / blocksize; one fp32 product, rounded once to the dtype asked for
    scale_b = absmax_b                          fp32, or where scales are nested ("double quantisation")
    scale_b = nested_code[absmax_b] * nested_absmax[b / nested_blocksize] + offset      a product, then a sum, in fp32

code is NF4's or FP4's table of 16 values. Nothing is converted and nothing copied: the tensors are bitsandbytes' own.

    dequantize_4bit_        out = W[row : row + out.rows, column : column + out.columns]
    linear_4bit             y = x W^T + bias + s B^T           for few rows: W is decoded where it is used
    linear_4bit_backward    dx = dy W + ds A                   for few rows
    quantize_4bit           packed and absmax of a weight, the nearest code (the lower of two that are as near)

Sums are in fp32. `linear_4bit` may leave W unrounded where it is decoded to multiply, which is nearer to the formula.
Many rows are the business of `nf4_linear`: panels of W and the vendor's product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decisions
from .backend import OPS, define, route

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Middles of equally probable parts of a normal distribution, and zero: appendix E of the QLoRA paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign, two bits of exponent and one of mantissa, over the largest, 12.
FP4 = tuple(sign * x / 12 for sign in (1.0, -1.0) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))


class Weight4bit(NamedTuple):
    """A weight (N, K) of 4 bits. The tensors are views of bitsandbytes' storage."""

    packed: Tensor  # uint8, flat, (N*K + 1) / 2 bytes
    absmax: Tensor  # one a block: fp32, or uint8 where scales are nested
    code: Tensor  # fp32 (16)
    nested_code: Tensor | None  # fp32 (256)
    nested_absmax: Tensor | None  # fp32, one for nested_blocksize blocks
    offset: Tensor | None  # fp32, one
    blocksize: int
    nested_blocksize: int
    rows: int  # N
    columns: int  # K
    dtype: torch.dtype  # what the weight was quantised from
    compute_dtype: torch.dtype | None = None  # the base product is made in it; None: in the input's

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return torch.Size((self.rows, self.columns))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def requires_grad(self) -> bool:
        """False: it cannot be trained."""
        return False

    def data_ptr(self) -> int:
        """Where the packed elements lie."""
        return self.packed.data_ptr()

    def to(self, dtype: torch.dtype) -> Weight4bit:
        """The same weight, its products made in `dtype` (as autocast asks)."""
        return self if self.compute_dtype is dtype else self._replace(compute_dtype=dtype)

    def storage(self) -> tuple[Any, ...]:
        """The arguments that every operator takes for the weight."""
        return self[:8]


def weight_4bit(weight: Any, quant_state: Any = None, compute_dtype: torch.dtype | None = None) -> Weight4bit:
    """bitsandbytes' `Params4bit` (or its data, with the `QuantState`) as the operators take it: views, no copy.

    compute_dtype: the dtype of the base product, as `bnb_4bit_compute_dtype`; None for the input's.

    Raises ValueError if the weight is not quantised yet, not a matrix, or in the layout that bitsandbytes makes of it
    for its own inference on CPUs with bf16 arithmetic (`Params4bit` in evaluation), where scales are rounded to bf16.
    """
    state = getattr(weight, "quant_state", None) if quant_state is None else quant_state
    if state is None:
        raise ValueError("the weight is not quantised yet: move its module to a device first (model.to(device))")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this weight for its own inference on this processor, rounding the scales to "
            "bf16: load the model again, and let fastpeft see it before it runs in evaluation"
        )
    if len(state.shape) != 2:
        raise ValueError(f"a 4-bit weight must be a matrix, got {tuple(state.shape)}")
    if state.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {state.blocksize}")
    decisions.ready()
    packed = weight.as_subclass(Tensor) if type(weight) is not Tensor else weight
    packed = packed.detach().reshape(-1).view(torch.uint8)
    nested, (rows, columns) = state.state2, state.shape
    return Weight4bit(
        packed=packed,
        absmax=state.absmax,
        code=state.code,
        nested_code=None if nested is None else nested.code,
        nested_absmax=None if nested is None else nested.absmax,
        offset=None if nested is None else state.offset,
        blocksize=state.blocksize,
        nested_blocksize=0 if nested is None else nested.blocksize,
        rows=rows,
        columns=columns,
        dtype=state.dtype,
        compute_dtype=compute_dtype,
    )


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype | None = None) -> Tensor:
    """W (N, K) in `dtype` (fp32, bf16 or fp16; by default the one it was quantised from): bitsandbytes' bits."""
    out = torch.empty(weight.rows, weight.columns, dtype=dtype or weight.dtype, device=weight.packed.device)
    OPS[route(out.device)].dequantize_4bit_(out, *weight.storage(), weight.columns, 0, 0)
    return out


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    nested_code: Tensor | None = None,
) -> Weight4bit:
    """A weight (N, K), fp32, bf16 or fp16, in 4 bits: bitsandbytes' bits, without bitsandbytes.

    quant_type: "nf4" or "fp4". blocksize: 32 … 4096. nested: quantise the scales too, to 8 bits in blocks of 256;
    nested_code: their table (256), by default bitsandbytes' dynamic one.

    Raises ValueError on other types, block sizes, dtypes and on anything but a matrix.
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(f"a weight (N, K) in fp32, bf16 or fp16 is needed, got {weight.dtype} {tuple(weight.shape)}")
    decisions.ready()
    device = weight.device
    code = torch.tensor(NF4 if quant_type == "nf4" else FP4, device=device)
    packed, absmax = OPS[route(device)].quantize_4bit(weight, code, blocksize)
    rows, columns = weight.shape
    if not nested:
        return Weight4bit(packed, absmax, code, None, None, None, blocksize, 0, rows, columns, weight.dtype)
    offset = absmax.mean()
    nested_code = dynamic_code().to(device) if nested_code is None else nested_code
    small, nested_absmax = _quantize_8bit(absmax - offset, nested_code)
    return Weight4bit(
        packed=packed,
        absmax=small,
        code=code,
        nested_code=nested_code,
        nested_absmax=nested_absmax,
        offset=offset,
        blocksize=blocksize,
        nested_blocksize=NESTED_BLOCKSIZE,
        rows=rows,
        columns=columns,
        dtype=weight.dtype,
    )


NESTED_BLOCKSIZE = 256


def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type (Dettmers et al., 2022: 8-bit Optimizers, §1.3).

    In decade e, from 1e-6 to 1, lie the 2^e middles of as many equal parts of [0.1, 1]; 0 and 1 besides.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (e - 6) * middles).tolist() + (-(10.0 ** (e - 6)) * middles).tolist()
    return torch.tensor(sorted(values))


def _quantize_8bit(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 indices into `code`, and one scale for each 256 values.

    bitsandbytes' CPU kernel first rounds a scaled value to one of 65,536 steps of [-1, 1], for a table look-up.
    """
    n = values.numel()
    padded = F.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    scale = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / scale)[:, None]).clamp(-1, 1)
    if values.device.type == "cpu":
        step = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float()  # the kernel multiplies and adds in one rounding
        scaled = torch.nan_to_num(step).int().float() * 2 / 65535 - 1
    q = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)
    q = torch.where((scale == 0)[:, None], torch.zeros_like(q), q)  # any code times nothing
    return q.flatten()[:n], scale


def scales_reference(
    absmax: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """The fp32 scale of every block."""
    if nested_code is None or nested_absmax is None or offset is None:
        return absmax.float()
    each = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return nested_code[absmax.long()] * each + offset


def decode_reference(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    columns: int,
    rows: int,
) -> Tensor:
    """W (rows, columns) in fp32."""
    q = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: rows * columns]
    scales = scales_reference(absmax, nested_code, nested_absmax, offset, nested_blocksize)
    each = scales.repeat_interleave(blocksize)[: rows * columns]
    return (code[q.long()] * each).view(rows, columns)


def dequantize_reference(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    columns: int,
    row: int,
    column: int,
) -> None:
    """out (n, k) = W[row : row + n, column : column + k]; columns is W's own K."""
    n, k = out.shape
    storage = (packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize)
    W = decode_reference(*storage, columns, row + n)
    out.copy_(W[row:, column : column + k])


def linear_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    rows: int,
    bias: Tensor | None,
    s: Tensor | None,
    B: Tensor | None,
) -> Tensor:
    """y (M, N) in x's dtype, from x (M, K), N = rows, bias (N), s (M, r) and B (N, r)."""
    storage = (packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc) @ decode_reference(*storage, x.shape[1], rows).to(acc).T
    if bias is not None:
        y = y + bias.to(acc)
    if s is not None and B is not None:
        y = y + s.to(acc) @ B.to(acc).T
    return y.to(x.dtype)


def linear_backward_reference(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_code: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    columns: int,
    ds: Tensor | None,
    A: Tensor | None,
) -> Tensor:
    """dx (M, K) in dy's dtype, from dy (M, N), K = columns, ds (M, r) and A (r, K)."""
    storage = (packed, absmax, code, nested_code, nested_absmax, offset, blocksize, nested_blocksize)
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = dy.to(acc) @ decode_reference(*storage, columns, dy.shape[1]).to(acc)
    if ds is not None and A is not None:
        dx = dx + ds.to(acc) @ A.to(acc)
    return dx.to(dy.dtype)


def quantize_reference(weight: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """packed (uint8, flat) and absmax (fp32, one a block).

    The nearest value of the code to w / absmax, by the middles between neighbours: on a middle, the lower of the two.
    """
    order = torch.argsort(code)
    middles = (code[order[:-1]] + code[order[1:]]) / 2
    flat = weight.reshape(-1).float()
    n = flat.numel()
    rest = n % blocksize
    blocks = flat[: n - rest].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).flatten()
    if rest:  # the last, short block is divided, not multiplied by the inverse, in bitsandbytes
        last = flat[n - rest :].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[n - rest :] / last])
    q = torch.bucketize(F.pad(scaled.clamp(-1, 1), (0, n % 2)), middles)
    q = order[q].to(torch.uint8)
    return q[::2] << 4 | q[1::2], absmax


def _dequantize_fake(out: Tensor, packed: Tensor, *rest: Any) -> None:
    return None


def _linear_fake(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[7])


def _linear_backward_fake(dy: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], rest[7])


def _quantize_fake(weight: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    return (
        weight.new_empty((n + 1) // 2, dtype=torch.uint8),
        weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32),
    )


_STORAGE = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_code, Tensor? nested_absmax, Tensor? offset, "
    "int blocksize, int nested_blocksize"
)

define(
    "dequantize_4bit_",
    f"(Tensor(a!) out, {_STORAGE}, int columns, int row, int column) -> ()",
    reference=dequantize_reference,
    fake=_dequantize_fake,
    kernels="nf4",
)
define(
    "linear_4bit",
    f"(Tensor x, {_STORAGE}, int rows, Tensor? bias, Tensor? s, Tensor? B) -> Tensor",
    reference=linear_reference,
    fake=_linear_fake,
    kernels="nf4",
)
define(
    "linear_4bit_backward",
    f"(Tensor dy, {_STORAGE}, int columns, Tensor? ds, Tensor? A) -> Tensor",
    reference=linear_backward_reference,
    fake=_linear_backward_fake,
    kernels="nf4",
)
define(
    "quantize_4bit",
    "(Tensor weight, Tensor code, int blocksize) -> (Tensor packed, Tensor absmax)",
    reference=quantize_reference,
    fake=_quantize_fake,
)
