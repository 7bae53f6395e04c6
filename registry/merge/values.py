"""The values of a changed weight, where that takes more than low-rank sums: every tuner and every combination, in float64 on torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from registry.changes import Change, Combined, LowRank, Part, Step, Tuned, matrix_shape
from registry.locations import Location
from registry.merge.combine import coefficients, combine
from registry.merge.lowrank import LowRankDelta
from registry.merge.reading import read_elements, read_tensor
from registry.merge.single import SingleSum
from registry.merge.sums import FactorReader
from registry.merge.tuners import TUNERS
from registry.merge.weight import Dense, RowWise, Weight, transposed
from registry.tensors import DType, StoredTensor


@final
class Stored:
    """A weight as it lies in a file, seen as a matrix with so many columns."""

    def __init__(self, location: Location, tensor: StoredTensor, columns: int) -> None:
        self._location, self._tensor, self._columns = location, tensor, columns

    @property
    def shape(self) -> tuple[int, int]:
        return matrix_shape(self._tensor.spec, self._columns)

    def rows(self, first: int, last: int) -> Tensor:
        count = (last - first) * self._columns
        flat = read_elements(self._location, self._tensor, first * self._columns, count)
        return torch.from_numpy(flat).view(last - first, self._columns)


@dataclass(frozen=True, slots=True)
class Values:
    """Makes the weights that changes describe from the files of a base and of an adapter."""

    base: Location
    adapter: Location
    factors: FactorReader

    def of(self, change: Change) -> Weight:
        """The weight after a change."""
        before = self._start(change)
        if change.target.dtype is DType.F32 and change.steps and len(change.deltas) == len(change.steps):
            return SingleSum(before, [self.factors.read(step) for step in change.deltas])
        return self._after(change.steps, before)

    def settled(self, change: Change) -> tuple[Change, tuple[float, ...]]:
        """The same change as plain low-rank sums, where a combination comes down to one coefficient for each of its low-rank parts.

        Also gives these coefficients; none, and the change as it is, where it does not come down to that.
        """
        step = change.steps[0] if len(change.steps) == 1 else None
        if not isinstance(step, Combined) or not all(part.is_low_rank for part in step.parts):
            return change, ()
        before = self._start(change)
        found = coefficients(step, before, [self._part(part, before) for part in step.parts])
        if found is None:
            return change, ()
        steps = [
            replace(each, scale=each.scale * factor)
            for factor, part in zip(found, step.parts, strict=True)
            for each in part.deltas
        ]
        return replace(change, steps=tuple(steps)), found

    def _start(self, change: Change) -> Weight:
        if change.replacement is not None:
            return Stored(self.adapter, change.replacement, change.shape[1])
        if change.source is not None:
            return Stored(self.base, change.source, change.shape[1])
        return Dense(torch.zeros(change.shape, dtype=torch.float64))

    def _after(self, steps: Sequence[Step], before: Weight) -> Weight:
        for step in steps:
            if isinstance(step, LowRank):
                before = self._sum(step, before)
            elif isinstance(step, Tuned):
                before = self._tuned(step, before)
            else:
                before = combine(step, before, [self._part(part, before) for part in step.parts])
        return before

    def _sum(self, step: LowRank, before: Weight) -> Weight:
        factors = self.factors.read(step)
        left, right = torch.from_numpy(factors.left), torch.from_numpy(factors.right)
        end, columns = factors.end, slice(step.column, step.column + right.shape[1])

        def add(rows: Tensor, first: int) -> Tensor:
            start, stop = max(first, step.row), min(first + rows.shape[0], end)
            if start < stop:
                product = left[start - step.row : stop - step.row] @ right
                rows[start - first : stop - first, columns] += product.mul_(step.scale)
            return rows

        return RowWise(before, add)

    def _tuned(self, step: Tuned, before: Weight) -> Weight:
        tensors = {name: torch.from_numpy(read_tensor(self.adapter, each)) for name, each in step.tensors.items()}
        tensors |= {name: torch.from_numpy(read_tensor(self.base, each)) for name, each in step.base.items()}
        tuner = TUNERS[step.method]
        if step.transposed:
            return transposed(tuner(tensors, step.options, transposed(before)))
        return tuner(tensors, step.options, before)

    def _part(self, part: Part, before: Weight) -> Weight:
        """The weight after a part's steps; of a low-rank part only what it adds, from which inner products follow without the weight."""
        if part.is_low_rank:
            return LowRankDelta(before.shape, [self.factors.read(step) for step in part.deltas])
        start = before if part.replacement is None else Stored(self.adapter, part.replacement, before.shape[1])
        return self._after(part.steps, start)
