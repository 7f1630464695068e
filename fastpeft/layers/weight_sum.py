"""The sum of a frozen weight and its adapter, W + c L R, lent to a module that multiplies by it: never made.

A mixture's experts keep their weights in stacks that belong to no layer, and their code indexes, transposes and
multiplies them as it likes. `WeightSum` stands for the sum and knows its terms. Its products are computed from these,

    x (W + c L R) = x W + c (x L) R

by the operator that fits: `lora_linear` for one expert's matrix, `lora_experts` for a stack and rows sorted by expert
(torch._grouped_mm), batched products for others. Experts of it, its transpose, and a copy in the same dtype stand for
their sums in turn. Whatever else is done with it has the sum itself, an ordinary tensor, made once (`ops.deferred`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ..ops.backend import autocast_enabled, exact
from ..ops.deferred import Deferred
from ..ops.lora_experts import GROUPED_MM, lora_experts, unit_stride
from ..ops.lora_linear import lora_linear
from ..ops.products import MAX_RANK

_PLAIN = (Tensor, Parameter)
_summed: list[None] = []
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSum(Deferred):
    """weight + scaling * left @ right, of which products are made without it.

    weight: (…, P, Q), left: (…, P, r), right: (…, r, Q), two or three dimensions each, on one device. The factors are
    of one dtype, in stacks the weight's.
    """

    kept: ClassVar[dict[Callable[..., Any], Any]] = {}
    advice: ClassVar[str] = "take a copy of the parameter (.clone()) where the module's forward uses it"

    terms: _Terms

    @staticmethod
    def lent_by(wrapper: Any, adapter: str, note: set[str] | None = None) -> Tensor | None:
        """The sum of a ParamWrapper's parameter (of fastpeft or peft) and one of its adapters; None as `of`.

        Of the one expert in a stack of one too, whose delta PEFT adds in another way, and of a module that is compiled.
        """
        parameter = wrapper.get_param()
        if is_compiled(wrapper.get_base_layer()):
            return None
        if parameter.dim() == 2:
            A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            return WeightSum.of(parameter, B, A, wrapper.scaling[adapter], note)
        if wrapper.num_experts == 1:
            return None
        left, right, scaling = wrapper.get_delta_factors(adapter)
        return WeightSum.of(parameter, left, right, scaling, note)

    @staticmethod
    def of(weight: Tensor, left: Tensor, right: Tensor, scaling: float, note: set[str] | None = None) -> Tensor | None:
        """The sum; None where it has to be made.

        note: the names of the operators by which its products are made are added to it, "sum" if that is made, and
        "sum of one" if that of a single expert is.

        It has to be made of tensors that are not plain (sharded, quantised) or not on one device, of a weight that is
        trained, with a rank above 512, and under torch.compile, tracing and functorch's transforms.
        """
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or not (type(weight) in _PLAIN and type(left) in _PLAIN and type(right) in _PLAIN)
            or weight.dtype not in _DTYPES
            or left.dtype is not right.dtype
            or (left.dtype is not weight.dtype and weight.dim() != 2)
            or weight.dim() not in (2, 3)
            or (left.shape[:-1], right.shape[-1]) != (weight.shape[:-1], weight.shape[-1])
            or _summed
            or not weight.device == left.device == right.device
            or (weight.requires_grad and torch.is_grad_enabled())
            or not 1 <= left.shape[-1] <= MAX_RANK
            or not isinstance(scaling, int | float)
        ):
            return None
        if torch.is_grad_enabled():  # else only the experts that are used are copied: a token in decoding has few
            left, right = unit_stride(left), unit_stride(right)
        return _of(_Terms(weight, left, right, float(scaling), note))


def is_compiled(module: nn.Module) -> bool:
    """torch.compile was called on the module itself, which then traces whatever parameter it finds."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


@contextlib.contextmanager
def summed() -> Iterator[None]:
    """Within it every sum is made: for comparing."""
    _summed.append(None)
    try:
        yield
    finally:
        _summed.pop()


class _Terms:
    """What a sum is made of."""

    __slots__ = ("_experts", "left", "note", "of_one", "right", "scaling", "weight")

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float, note: set[str] | None) -> None:
        self.weight, self.left, self.right, self.scaling, self.note = weight, left, right, scaling, note
        self.of_one = False  # matrix out of a stack
        self._experts: dict[bool, tuple[tuple[Tensor, ...], ...]] = {}  # with a graph, and without

    def value(self) -> Tensor:
        """The sum."""
        self.by("sum of one" if self.of_one else "sum")
        with exact(self.weight.device):  # autocast would change the weight's dtype
            if self.weight.dim() == 3:
                return torch.baddbmm(self.weight, self.left, self.right, alpha=self.scaling)
            if self.left.dtype is self.weight.dtype:
                return torch.addmm(self.weight, self.left, self.right, alpha=self.scaling)
            return self.weight + (self.left @ self.right * self.scaling).to(self.weight.dtype)

    def by(self, operator: str) -> None:
        """Note how a product is made."""
        if self.note is not None:
            self.note.add(operator)

    def changed(self, weight: Tensor, left: Tensor, right: Tensor) -> _Terms:
        """Those of a part of the sum."""
        part = _Terms(weight, left, right, self.scaling, self.note)
        part.of_one = self.of_one
        return part

    def expert(self, index: int) -> _Terms:
        """Those of one matrix of the stack.

        The factors are taken apart all at once: the gradient of a tensor taken by its index is as large as the stack.
        """
        graph = torch.is_grad_enabled()
        if graph not in self._experts:
            self._experts[graph] = (self.left.unbind(0), self.right.unbind(0))
        lefts, rights = self._experts[graph]
        part = self.changed(self.weight[index], lefts[index], rights[index])
        part.of_one = True
        return part

    def transposed(self) -> _Terms:
        """Those of the transposed sum, with left and right changing places."""
        return self.changed(self.weight.mT, self.right.mT, self.left.mT)


def _of(terms: _Terms) -> Any:
    if not torch.is_grad_enabled():  # a sum made now would have no graph, wherever it is used
        terms = terms.changed(terms.weight, terms.left.detach(), terms.right.detach())
    weight = terms.weight
    inputs = [t for t in (weight, terms.left, terms.right) if not t.is_inference()]  # copies of this call; no versions
    made: Any = WeightSum(terms.value, weight.shape, weight.dtype, weight.device, inputs)
    made.terms = terms
    return made


def _fits(x: Any, weight: Tensor) -> bool:
    """x is an ordinary tensor that may be multiplied by the weight (any, under autocast)."""
    if type(x) not in _PLAIN or x.device != weight.device:
        return False
    return x.dtype is weight.dtype or (
        x.is_floating_point() and autocast_enabled(x.device) and x.dtype is not torch.float64
    )


def _times(x: Tensor, m: Any, bias: Tensor | None = None) -> Any:
    """x (…, K) times the sum (K, N), plus bias."""
    terms: _Terms = m.terms
    if not m.pending or x.dim() < 2 or x.shape[-1] != terms.weight.shape[0] or not _fits(x, terms.weight):
        return NotImplemented
    terms.by("lora_linear")
    m.consume()
    A, B = terms.left.t(), terms.right.t()
    return lora_linear(x, terms.weight.t(), bias, A, B, terms.scaling)


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """F.linear(x, sum, bias)."""
    return _linear_of(*args, **kwargs)


def _linear_of(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, WeightSum) or weight.dim() != 2 or not weight.pending:
        return NotImplemented
    if not (bias is None or (type(bias) in _PLAIN and bias.dtype is weight.dtype)):
        return NotImplemented
    terms = weight.terms
    if type(input) not in _PLAIN or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        return NotImplemented
    if not _fits(input, terms.weight):
        return NotImplemented
    terms.by("lora_linear")
    weight.consume()
    return lora_linear(input, terms.weight, bias, terms.right, terms.left, terms.scaling)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """x @ sum, of matrices or of stacks; sum @ x, of stacks."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, m = args if func is not Tensor.__rmatmul__ else args[::-1]
    if isinstance(m, WeightSum) and isinstance(x, Tensor) and m.dim() == 2:
        return _times(x, m) if type(x) in _PLAIN else NotImplemented
    stack, other = (m, x) if isinstance(m, WeightSum) else (x, m)
    if not (isinstance(stack, WeightSum) and stack.pending and stack.dim() == 3) or not _fits(
        other, stack.terms.weight
    ):
        return NotImplemented
    if other.dim() != 3 or other.shape[0] != stack.shape[0] or x.shape[2] != m.shape[1]:
        return NotImplemented
    terms = stack.terms
    terms.by("batched products")
    stack.consume()
    if stack is m:
        s = torch.bmm(other, terms.left)
        return torch.baddbmm(torch.bmm(other, terms.weight), s, terms.right, alpha=terms.scaling)
    s = torch.bmm(terms.right, other)
    return torch.baddbmm(torch.bmm(terms.weight, other), terms.left, s, alpha=terms.scaling)


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    """torch._grouped_mm(x, stack, offs=…)."""
    return _grouped_of(*args, **kwargs)


def _grouped_of(x: Any, stack: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not isinstance(stack, WeightSum) or stack.dim() != 3 or not stack.pending or bias is not None:
        return NotImplemented
    terms = stack.terms
    if (
        type(x) not in _PLAIN
        or type(offs) is not Tensor
        or x.dim() != 2
        or x.shape[1] != stack.shape[1]
        or not x.device == offs.device == terms.weight.device
        or x.dtype is not terms.weight.dtype
        or x.dtype is torch.float64  # PyTorch refuses it, with its own message
        or out_dtype not in (None, x.dtype)
    ):
        return NotImplemented
    terms.by("lora_experts")
    stack.consume()
    return lora_experts(x, terms.weight, terms.left.mT, terms.right.mT, terms.scaling, offs)


def _index(func: Any, args: Any, kwargs: Any) -> Any:
    """One expert, by a number in Python or in a tensor; or the experts of a list of numbers in a tensor."""
    stack, index = args
    if not isinstance(stack, WeightSum) or stack.dim() != 3 or not stack.pending:
        return NotImplemented
    terms = stack.terms
    if type(index) is Tensor and index.dtype in (torch.int64, torch.int32):
        if index.dim() == 1:
            return _of(terms.changed(terms.weight[index], terms.left[index], terms.right[index]))
        if index.dim() == 0:
            index = int(index)  # as PyTorch's own indexing reads it
    if type(index) is not int or not -stack.shape[0] <= index < stack.shape[0]:
        return NotImplemented
    return _of(terms.expert(index))


def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    """Every expert."""
    stack = args[0]
    if args[1:] not in ((), (0,)) or kwargs.get("dim", 0) != 0 or stack.dim() != 3 or not stack.pending:
        return NotImplemented
    parts = tuple(_of(stack.terms.expert(e)) for e in range(stack.shape[0]))
    return iter(parts) if func is Tensor.__iter__ else parts


def _transposed(func: Any, args: Any, kwargs: Any) -> Any:
    """t(), transpose() of the last two dimensions."""
    m = args[0]
    if not isinstance(m, WeightSum) or not m.pending or kwargs:
        return NotImplemented
    dims = tuple(d % m.dim() for d in args[1:]) if all(type(d) is int for d in args[1:]) else None
    if dims is None or (not dims and m.dim() != 2) or (dims and {*dims} != {m.dim() - 2, m.dim() - 1}):
        return NotImplemented
    return _of(m.terms.transposed())


def _attribute_T(func: Any, args: Any, kwargs: Any) -> Any:
    """.mT, and .T of a matrix."""
    m = args[0]
    if not m.pending or (func == Tensor.T.__get__ and m.dim() != 2):  # type: ignore[attr-defined]
        return NotImplemented
    return _of(m.terms.transposed())


def _converted(func: Any, args: Any, kwargs: Any) -> Any:
    """to(…), float(): the sum itself where nothing is to be converted."""
    m = args[0]
    if not isinstance(m, WeightSum) or not m.pending or kwargs or len(args) > 2:
        return NotImplemented
    wanted = {Tensor.float: torch.float32, Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16}.get(func)
    wanted = args[1] if wanted is None and len(args) == 2 else wanted
    return m if wanted in (m.dtype, m.device) else NotImplemented


def _methods(*names: str) -> list[Any]:
    return [getattr(of, name) for name in names for of in (Tensor, torch) if hasattr(of, name)]


WeightSum.kept |= {
    F.linear: _linear,
    **dict.fromkeys(_methods("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    Tensor.__getitem__: _index,
    **dict.fromkeys([*_methods("unbind"), Tensor.__iter__], _unbind),
    **dict.fromkeys(_methods("t", "transpose", "swapaxes", "swapdims"), _transposed),
    **dict.fromkeys([Tensor.mT.__get__, Tensor.T.__get__], _attribute_T),  # type: ignore[attr-defined]
    **dict.fromkeys([Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half], _converted),
}
if GROUPED_MM is not None:
    WeightSum.kept[GROUPED_MM] = _grouped
