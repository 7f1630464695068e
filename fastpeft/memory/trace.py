"""The operators of a layer as they run, and which of them a recomputation has to run again.

`Recorder` writes down, below autograd, every operator of a forward: what it reads, what it writes to, what it makes.
From the tensors that autograd wanted to keep one can then go backwards through the record: an operator is run again
only if something that is wanted depends on it. The last product of a block, whose output goes to the next block, never
is, though an `autograd.Function` around it runs again to its end. Outputs that are kept (see `modes`) cut the way: what
only led to them is not run again either.

`Replay` runs beside a second call of the same code and answers operator by operator: with what was kept, with the
operator itself, or, where nothing depends on it, with memory that is never read.

A value is a storage and all that was written to it. An operator that changes a kept value in place (an adapter adding
to the base product) is not run again: what was kept is the value at the end. So a value that something else read
between two writes is not kept but made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_RANDOM = torch.Tag.nondeterministic_seeded
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}
_QUESTIONS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Changed(RuntimeError):
    """The recomputation does other operators than the forward did."""


class Op:
    """One call of an operator."""

    __slots__ = ("func", "kept", "makes", "outputs", "question", "reads", "seeded", "shapes", "writes")

    def __init__(self, func: Any, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        self.func = func
        self.reads = reads  # values, the written ones too
        self.writes = writes
        self.makes: tuple[int, ...] = ()  # values
        self.outputs: Any = None  # while it may be kept: what the operator returned
        self.kept: Any = None  # positions among the kept tensors, in the structure of what it returned
        self.shapes: Any = None  # what it returned, without the memory
        self.seeded = _RANDOM in func.tags
        self.question = any(tag in func.tags for tag in _QUESTIONS)


class Shape:
    """Enough of a tensor to make one like it."""

    __slots__ = ("device", "dtype", "size", "stride")

    def __init__(self, t: Tensor) -> None:
        self.size, self.stride, self.dtype, self.device = t.shape, t.stride(), t.dtype, t.device

    def is_of(self, t: Tensor) -> bool:
        return (t.shape, t.stride(), t.dtype) == (self.size, self.stride, self.dtype)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def storage_key(t: Tensor) -> int:
    """Identity of the memory behind t, on the meta device too, where there is no address."""
    return t.untyped_storage()._cdata


def _key_of(thing: Any) -> int | None:
    if isinstance(thing, Tensor):
        return storage_key(thing)
    return thing._cdata if isinstance(thing, torch.UntypedStorage) else None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that the operator writes to. One that merely lies elsewhere afterwards has not been written to."""
    if is_view(func):
        return
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


class Recorder(TorchDispatchMode):
    """Records a forward. `candidate(op, args, outputs)` says which outputs may be kept and are held until `close`."""

    def __init__(self, candidate: Callable[[Any, tuple[Any, ...], Any], bool]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.opaque = False  # something is wanted whose memory cannot be followed
        self._candidate = candidate
        self._values: dict[int, int] = {}  # storage to value
        self._count = 0
        self._makers: dict[int, Op] = {}  # of a value that was made empty

    def value_of(self, t: Tensor) -> int | None:
        """The value behind a tensor made here; None for an input, a parameter, anything from outside."""
        if type(t) not in _PLAIN and hasattr(t, "__tensor_flatten__"):
            self.opaque = True
            return None
        value = self._values.get(storage_key(t))
        return value if value is not None and value >= 0 else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _PLAIN.issuperset(types):
            return NotImplemented  # a subclass does what it does with ordinary tensors, and those come by here again
        keys = [key for key in map(_key_of, tree_leaves((args, kwargs))) if key is not None]
        reads = tuple(self._value(key) for key in keys)
        writes = tuple(
            self._value(_key_of(a)) for t in _written(func, args, kwargs) for a in tree_leaves(t) if a is not None
        )
        op = Op(func, reads, writes)
        outputs = func(*args, **kwargs)
        made = []
        for t in tree_leaves(outputs):
            if isinstance(t, Tensor):
                key = storage_key(t)
                if key not in keys:
                    self._values[key] = self._count
                    made.append(self._count)
                    self._count += 1
        op.makes = tuple(made)
        if made:
            op.shapes = tree_map(lambda t: Shape(t) if isinstance(t, Tensor) else t, outputs)
            if self._candidate(func, args, outputs):
                op.outputs = outputs
            if func in _EMPTY:
                self._makers[made[0]] = op
        elif writes:
            written = [t for t in _written(func, args, kwargs) if isinstance(t, Tensor)]
            if self._candidate(func, args, written):
                self._fill(written)
        self.ops.append(op)
        return outputs

    def _fill(self, parts: list[Tensor]) -> None:
        """A candidate wrote to memory that was made empty, perhaps by parts: to be kept is what was made."""
        for part in parts:
            maker = self._makers.get(self._values[storage_key(part)])
            if maker is not None and maker.outputs is None:
                whole = part if part._base is None else part._base
                if maker.shapes.is_of(whole):
                    maker.outputs = whole

    def _value(self, key: int | None) -> int:
        """The value of a storage; what comes from outside gets a negative one, so that writes to it are seen."""
        assert key is not None
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = -1 - len(self._values)
        return value

    def forget(self) -> None:
        """Let go of everything that is held."""
        for op in self.ops:
            op.outputs = None

    def foreign(self, storages: set[int]) -> set[int]:
        """The values of storages from outside."""
        return {value for key, value in self._values.items() if key in storages and value < 0}

    def close(self, wanted: set[int], keep: Callable[[list[Op]], set[int]]) -> Record:
        """The record, given the values that autograd wants. `keep` picks among the operators holding their outputs."""
        record = Record(self.ops)
        if self.opaque:
            record.run = None
        else:
            supplied: set[int] = set()
            chosen = self._choose(keep(self.ops))
            for index in chosen:
                supplied.update(self.ops[index].makes)
            needed = set(wanted)
            for index in range(len(self.ops) - 1, -1, -1):
                self._decide(record, index, index in chosen, needed, supplied)
        self.forget()
        return record

    def _decide(self, record: Record, index: int, chosen: bool, needed: set[int], supplied: set[int]) -> None:
        op = self.ops[index]
        made = not needed.isdisjoint(op.makes)
        if chosen:
            if made:
                op.kept = tree_map(record.add, op.outputs)
            return
        if made or not needed.isdisjoint(set(op.writes) - supplied) or op.question:
            record.run.add(index)  # type: ignore[union-attr]
            needed.update(op.reads)
        elif op.seeded:
            record.run.add(index)  # type: ignore[union-attr]

    def _choose(self, picked: set[int]) -> set[int]:
        """Those of the picked operators that may be kept."""
        chosen = {i for i in picked if self.ops[i].outputs is not None}
        while True:
            supplied = {value for i in chosen for value in self.ops[i].makes}
            whole = {i for i in chosen if self._whole(i, supplied)}
            if whole == chosen:
                return chosen
            chosen = whole

    def _whole(self, index: int, supplied: set[int]) -> bool:
        """May the last value of what this operator made stand for all that was read of it?

        Not if something but a writer read it before the last write, and not if a writer made or wrote to other things
        that are not kept: it would have to run again. Nor if the operator itself wrote to such things.
        """
        if not supplied.issuperset(self.ops[index].writes):
            return False
        made = set(self.ops[index].makes)
        read = False
        for op in self.ops[index + 1 :]:
            if not made.isdisjoint(op.writes):
                if read or op.seeded or not supplied.issuperset((*op.writes, *op.makes)):
                    return False
            elif not made.isdisjoint(op.reads) and not is_view(op.func):
                read = True
        return True


class Record:
    """Which operators to run again (None: all of them), and what is kept."""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops
        self.run: set[int] | None = set()
        self.kept: list[Tensor] = []

    def add(self, output: Any) -> Any:
        """Keep a tensor; returns its place. Other things are returned as they are."""
        if not isinstance(output, Tensor):
            return output
        self.kept.append(output)
        return _Place(len(self.kept) - 1)

    def writes_to(self, value: int) -> bool:
        """Would an operator that runs again write to this value?"""
        return any(value in op.writes for i, op in enumerate(self.ops) if self.run is None or i in self.run)


class Replay(TorchDispatchMode):
    """Answers the operators of a second run. Raises Changed when they are not those of the first."""

    def __init__(self, record: Record, kept: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.paused = False
        self._record = record
        self._kept = kept
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or self._record.run is None:
            return func(*args, **kwargs)
        if not _PLAIN.issuperset(types):
            return NotImplemented
        index = self._next
        self._next += 1
        ops = self._record.ops
        if index >= len(ops) or ops[index].func is not func:
            was = ops[index].func if index < len(ops) else "nothing more"
            raise Changed(f"operator {index} of the recomputation is {func}, in the forward it was {was}")
        op = ops[index]
        if op.kept is not None:
            # .data has a version of its own: autograd counts a write before it comes here and is not done.
            return tree_map(lambda place: self._kept[place.index].data if isinstance(place, _Place) else place, op.kept)
        if index in self._record.run or is_view(func):
            return func(*args, **kwargs)
        if op.writes:
            written = list(_written(func, args, kwargs))
            if op.makes:  # nothing of it is wanted, neither what it made nor what it changed
                return tree_map(lambda s: s.empty() if isinstance(s, Shape) else s, op.shapes)
            returns = len(func._schema.returns)
            return None if returns == 0 else written[0] if returns == 1 else tuple(written[:returns])
        if op.shapes is None:
            return func(*args, **kwargs)  # it makes no tensor and asks nothing: a size, a flag
        return tree_map(lambda s: s.empty() if isinstance(s, Shape) else s, op.shapes)


class _Place:
    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def is_view(func: Any) -> bool:
    """The operator returns parts of its arguments, or moves one to other memory, and computes nothing."""
    if func.overloadpacket is torch.ops.aten.set_:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
