"""The `attention` operator inside a module's own code, where that asks Transformers' table for its attention function.

    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, …)

Under the table's name the code finds one that answers like it, but for Transformers' own `sdpa` function: the operator
takes calls that have no mask and no dropout, on operands for which it is faster (`ops.attention.ours`), and hands every
other one on. For each kind of call the two are compared first, output and gradients against float64, ours with at most
twice the function's own error. On a GPU PyTorch's attention is a fused kernel already, and nothing is put on.
"""

from __future__ import annotations

import functools
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import decisions
from ..ops.attention import computed, formula, ours, takes
from .forwards import TENSORS, eager
from .inputs import NoInput, example_call
from .observe import run_quietly
from .own_code import OwnCodeForward, innermost, replaced, take_off, try_model
from .report import Row
from .tolerance import agrees, with_gradients

_KIND = "attention"
_TABLE = ("transformers.modeling_utils", "AttentionInterface")
_SDPA = ("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
_TOKENS = 33  # of a trial

# What the function may be told by name. An argument that we do not know may change what it computes.
_USUAL = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
_UNUSUAL = ("position_bias", "cache", "softcap", "output_attentions")


class Attention:
    """When an attention is the operator, and which kinds of call have been tried. A model's modules share one."""

    def __init__(self) -> None:
        self.kinds: dict[Any, bool] = {}
        self.probing = False  # short sequences, which are not worth it, are computed too
        self.met: set[nn.Module] = set()  # those whose call was the operator's while probing

    def stand_in(self, home: dict[str, Any], name: str) -> Any:
        """What a module's code finds under the table's name."""
        return _Table(home, name, self)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """In the place of Transformers' sdpa_attention_forward, with its arguments and results."""
        found = self._operands(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
        if found is None:
            kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
            return _sdpa()(module, query, key, value, attention_mask, **kwargs)
        if self.probing:
            self.met.add(module)
        return computed(query, key, value, *found).transpose(1, 2), None

    def _operands(
        self,
        module: nn.Module,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        dropout: Any,
        scaling: Any,
        is_causal: Any,
        kwargs: dict[str, Any],
    ) -> tuple[bool, float] | None:
        """causal and scale; None where the call is not the operator's."""
        unusual = (value for name in _UNUSUAL if (value := kwargs.get(name)) is not None)
        if mask is not None or dropout != 0 or any(value is not False for value in unusual):
            return None
        if not (type(q) in TENSORS and type(k) in TENSORS and type(v) in TENSORS and eager()):
            return None
        if not (q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]):
            return None
        if q.shape[3] != k.shape[3] or q.shape[1] != k.shape[1] * getattr(module, "num_key_value_groups", 1):
            return None
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        scale = q.shape[3] ** -0.5 if scaling is None else scaling
        if type(is_causal) is not bool or not isinstance(scale, float):
            return None
        causal = is_causal and q.shape[2] > 1
        if (causal and q.shape[2] != k.shape[2]) or not (takes if self.probing else ours)(q, k, v, scale):
            return None
        kind = (q.shape[1], k.shape[1], q.shape[3], causal, scale)
        if kind not in self.kinds:
            # In a thread of its own no mode, hook or graph of the step under way sees the trial.
            with ThreadPoolExecutor(1) as pool:
                self.kinds[kind] = pool.submit(self._tried, module, *kind).result()
        return (causal, scale) if self.kinds[kind] else None

    def _tried(self, module: nn.Module, heads: int, kv_heads: int, width: int, causal: bool, scale: float) -> bool:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, _TOKENS, width, generator=generator) for h in (heads, kv_heads, kv_heads))
        dout = torch.randn(2, heads, _TOKENS, width, generator=generator)

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            return (_sdpa()(module, q, k, v, None, dropout=0.0, scaling=scale, is_causal=causal)[0].transpose(1, 2),)

        try:
            other = with_gradients(theirs, [q, k, v], [dout])
            mine = with_gradients(lambda q, k, v: (computed(q, k, v, causal, scale),), [q, k, v], [dout])
        except Exception:  # whatever the function raises for what it was not made for
            return False
        wide = [t.double() for t in (q, k, v)]
        true = with_gradients(lambda q, k, v: formula(q, k, v, causal, scale)[:1], wide, [dout.double()])
        found = list(zip(mine, other, true, strict=True))
        return all(a.shape == b.shape == c.shape and agrees(a, b, c) for a, b, c in found)

    def __deepcopy__(self, memo: Any) -> Attention:
        return self

    def __getstate__(self) -> Any:
        return {}  # elsewhere the function may be another: it is tried again

    def __setstate__(self, state: Any) -> None:
        self.__init__()  # type: ignore[misc]


class _Table:
    """Answers like Transformers' table, but for the function that the operator stands in for."""

    __slots__ = ("attention", "home", "name", "table")

    def __init__(self, home: dict[str, Any], name: str, attention: Attention) -> None:
        self.home, self.name, self.attention = home, name, attention
        self.table = home[name]

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        table = self.home[self.name]  # also one that other code has put there since
        function = table.get_interface(*args, **kwargs)
        return self.attention if function is _sdpa() and table is self.table and eager() else function

    def __getitem__(self, key: Any) -> Any:
        return self.home[self.name][key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.home[self.name], name)


def apply(root: nn.Module, example_inputs: Any, verify: bool) -> list[Row]:
    """Put the operator into the code of the attentions that come to it; a row for each. On an exception the caller
    unpatches."""
    if decisions.attention_tokens() == float("inf") or _sdpa() is None:
        return []
    tables = {module: found for module in root.modules() if (found := _table_of(module))}
    if not tables:
        return []
    attention, names = Attention(), {module: name for name, module in root.named_modules()}
    try:
        target, args, kwargs = example_call(root, example_inputs)
        before = run_quietly(target, args, kwargs) if verify else None
    except NoInput:
        return []
    except Exception:  # whatever the model's own code raises; the report's note says so for the whole of the model
        return []
    done: dict[nn.Module, OwnCodeForward] = {}
    for module, name in tables.items():
        forward = module.__dict__.get("forward")
        if isinstance(forward, OwnCodeForward):
            forward.replace({**forward.substitutes, name: attention})
        else:
            module.__dict__["forward"] = forward = OwnCodeForward(module, {name: attention})
        done[module] = forward
    wrong = try_model([attention], target, args, kwargs, before)
    rows = []
    for module, forward in done.items():
        if wrong is None and module in attention.met:
            form = "without mask and dropout one operator call in its own code"
            rows.append(Row(names[module], _KIND, "attention", form))
            continue
        take_off(forward, {tables[module]})
        if wrong is not None:
            rows.append(Row(names[module], _KIND, reason=wrong))
    attention.met.clear()
    return rows


def _table_of(module: nn.Module) -> str | None:
    """The name by which a module's forward, on the CPU and with parameters in fp32, asks for the table."""
    forward = module.__dict__.get("forward")
    if replaced(module) and not isinstance(forward, OwnCodeForward):
        return None
    function = innermost(type(module).forward)
    if function is None:
        return None
    for name in function.__code__.co_names:
        kind = type(function.__globals__.get(name))
        if (kind.__module__, kind.__name__) == _TABLE:
            parameters = (p for p in module.parameters() if p.dtype is torch.float32 and p.is_cpu)
            return name if next(parameters, None) is not None else None
    return None


def _sdpa() -> Any:
    """Transformers' function; None where it is not loaded or takes arguments that are not known here."""
    function = getattr(sys.modules.get(_SDPA[0]), _SDPA[1], None)
    return function if function is not None and _understood(function) else None


@functools.cache
def _understood(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(p.name in (*_USUAL, *_UNUSUAL) or p.kind is p.VAR_KEYWORD for p in parameters)
