"""A tensor of the result, block by block: reads what it starts from, has it computed, and tells what happened to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast, final

import numpy as np

from registry.changes import Change
from registry.locations import Location
from registry.merge.reading import Scratch
from registry.merge.records import NOTHING, BlockRecord
from registry.merge.rounding import WORDS, Array, round_once, values_of
from registry.merge.sums import FactorReader, RoundedSum
from registry.tensors import StoredTensor

if TYPE_CHECKING:
    from registry.merge.weight import Weight


# Values in float64 are worked through in parts that stay in the cache, and that keep the memory for them small.
_PART_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Sources:
    """What a plan reads."""

    base: Location
    adapter: Location


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a result. `base`: the bytes of the base's tensor that went into it, None where another shape replaces it."""

    data: memoryview
    base: memoryview | None = None
    record: BlockRecord = NOTHING


def torch_in_one_thread() -> AbstractContextManager[None]:
    """Around what computes with torch: see `registry.merge.weight.one_thread`."""
    from registry.merge.weight import one_thread  # noqa: PLC0415 - torch takes a second to import, and most merges need none

    return one_thread()


# Fills the bytes of some rows of a result, given the first row and the bytes that they start from, and tells what happened to them.
_Rows = Callable[[int, memoryview | None, memoryview, Scratch], BlockRecord]


@final
class ComputedTensor:
    """A changed tensor with the values of its factors; its blocks may be asked for by several threads at once.

    Low-rank sums, as good as every merge, need numpy alone; torch is imported for everything else. `coefficients` are what a combination
    of several adapters comes down to for this tensor, where it does.
    """

    def __init__(self, change: Change, sources: Sources, factors: FactorReader) -> None:
        self._sources = sources
        self.coefficients: tuple[float, ...] = ()
        self._change, self._rows = change, self._summed(change, factors) if change.is_rounded_sum else None
        if self._rows is None:
            self._compute(change, factors)

    def _summed(self, change: Change, factors: FactorReader) -> _Rows:
        origin = change.replacement or change.source
        assert origin is not None  # noqa: S101 - `is_rounded_sum` has seen it
        dtypes, total = (origin.spec.dtype, change.target.dtype), _low_rank(change, factors)
        extra = total.record() if change.replacement is None else NOTHING

        def add(first: int, start: memoryview | None, out: memoryview, scratch: Scratch) -> BlockRecord:
            assert start is not None  # noqa: S101
            record = total.add(first, start, dtypes, out, scratch)
            return record + extra if first == 0 else record

        return add

    def _compute(self, change: Change, factors: FactorReader) -> None:
        from registry.merge.values import Values  # noqa: PLC0415 - torch takes a second to import, and most merges need none

        values = Values(self._sources.base, self._sources.adapter, factors)
        change, self.coefficients = values.settled(change)
        self._change = change
        if change.is_rounded_sum:
            self._rows = self._summed(change, factors)
            return
        weight = values.of(change)
        extra = _low_rank(change, factors).record() if change.steps and change.is_low_rank else None
        # Nothing here may hold `self`: in a cycle, the values would live on until the garbage collector comes by.
        self._rows = lambda first, start, out, scratch: _from_weight(weight, change, first, start, out, extra)

    def block(self, first: int, last: int, scratch: Scratch) -> Block:
        """Rows `first … last`, on buffers that nobody else uses meanwhile."""
        change, elements = self._change, (last - first) * self._change.shape[1]
        source = change.source if change.source and change.source.spec.shape == change.target.shape else None
        at = first * change.shape[1]
        base = _read(self._sources.base, source, "base", at, elements, scratch)
        replacement = _read(self._sources.adapter, change.replacement, "replacement", at, elements, scratch)
        out = scratch.take("result", elements * change.target.dtype.itemsize_bytes)
        record = cast("_Rows", self._rows)(first, base if replacement is None else replacement, out, scratch)
        if replacement is not None or not change.is_rounded_sum:
            record = _compared(change, record, base, out)
        return Block(out, base, replace(record, coefficients=self.coefficients))


def _low_rank(change: Change, factors: FactorReader) -> RoundedSum:
    return RoundedSum([factors.read(step) for step in change.deltas], change.shape)


def _read(
    location: Location, tensor: StoredTensor | None, role: str, at: int, elements: int, scratch: Scratch
) -> memoryview | None:
    if tensor is None:
        return None
    size = tensor.spec.dtype.itemsize_bytes
    data = scratch.take(role, elements * size)
    location.read_into(tensor.file, tensor.offset_bytes + at * size, data)
    return data


def _from_weight(
    weight: Weight, change: Change, first: int, start: memoryview | None, out: memoryview, extra: BlockRecord | None
) -> BlockRecord:
    """Rows of a weight in float64, rounded once. `extra` is what the factors tell of a low-rank change, all blocks together."""
    dtype, columns = change.target.dtype, change.shape[1]
    result = np.frombuffer(cast("bytes", out), WORDS[dtype])
    is_compared = start is not None and change.source is not None and change.replacement is None
    total, step = NOTHING, max(1, _PART_ELEMENTS // columns)
    for row in range(0, result.size // columns, step):
        values = weight.rows(first + row, min(first + row + step, first + result.size // columns)).numpy().reshape(-1)
        part = slice(row * columns, row * columns + values.size)
        result[part] = round_once(np.ascontiguousarray(values), dtype)
        total += BlockRecord(elements=values.size, finite=bool(np.isfinite(values_of(result[part], dtype)).all()))
        if is_compared:
            total += _reach(values, change, cast("memoryview", start), part, count=extra is None)
    return total + BlockRecord(reached=extra.reached) if extra and is_compared and first == 0 else total


def _reach(values: Array, change: Change, start: memoryview, part: slice, *, count: bool) -> BlockRecord:
    """How many elements a change reaches, and the largest of what it adds."""
    dtype = cast("StoredTensor", change.source).spec.dtype
    with np.errstate(invalid="ignore"):
        delta = np.abs(values - values_of(np.frombuffer(start, WORDS[dtype])[part], dtype))
    return BlockRecord(
        reached=int(np.count_nonzero(delta)) if count else 0, largest_delta=float(delta.max(initial=0.0))
    )


def _compared(change: Change, record: BlockRecord, base: memoryview | None, out: memoryview) -> BlockRecord:
    """What happened to the rows, from the values before and after: where it does not follow from the factors of a sum."""
    if base is None or change.source is None:
        return BlockRecord(elements=record.elements, changed=record.elements, finite=record.finite)
    dtypes = change.source.spec.dtype, change.target.dtype
    old, new = np.frombuffer(base, WORDS[dtypes[0]]), np.frombuffer(out, WORDS[dtypes[1]])
    changed, squares = 0, [0.0, 0.0]
    for first in range(0, old.size, _PART_ELEMENTS):
        part = slice(first, first + _PART_ELEMENTS)
        before, after = values_of(old[part], dtypes[0]), values_of(new[part], dtypes[1])
        same = before if dtypes[0] is dtypes[1] else values_of(round_once(before, dtypes[1]), dtypes[1])
        changed += int(np.count_nonzero(after != same))
        with np.errstate(invalid="ignore", over="ignore"):
            squares[0] += float(before @ before)
            squares[1] += float(np.square(after - before).sum())
    return BlockRecord(
        elements=record.elements,
        base_square=squares[0],
        delta_square=squares[1],
        reached=changed if change.replacement is not None else record.reached,
        changed=changed,
        largest_delta=0.0 if changed else record.largest_delta,
        finite=record.finite,
    )
