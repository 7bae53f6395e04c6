"""The factors of an adapter that does what several do together: exact and of their summed rank, or the nearest of a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from registry.changes import Change, Combined, LowRank
from registry.errors import NotFinite
from registry.locations import Location
from registry.merge.combine import Combination
from registry.merge.lowrank import LowRankDelta, Truncated, approximated, stacked, truncated
from registry.merge.rounding import Array
from registry.merge.sums import FactorReader, Factors
from registry.merge.values import Values
from registry.merge.weight import whole
from registry.tensors import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Factors left `[n, r]` and right `[r, m]`, float32, of scale 1.

    `energy` is the squared norm of the wanted delta, `lost` that of what is not in them; both are None where nothing was left out.
    """

    left: Array
    right: Array
    energy: float | None = None
    lost: float | None = None

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return int(self.left.shape[1])


@final
class Joiner:
    """Makes the tensors of a combined adapter out of the files of the base and of the united folder."""

    def __init__(self, base: Location, folder: Location) -> None:
        self._factors = FactorReader(folder)
        self._values = Values(base, folder, self._factors)

    def factors(self, change: Change, rank: int | None) -> Joined:
        """The factors of what inputs do to one tensor together.

        Args:
            change: the tensor's: low-rank steps alone, or a combination of such.
            rank: of the result; None for the exact sum, which the method must allow.

        Raises:
            NotFinite: a value is too large for float32, or was none.
        """
        settled, _ = self._values.settled(change)
        combined = next((step for step in settled.steps if isinstance(step, Combined)), None)
        if combined is None:
            term = stacked([self._delta(change, settled.deltas)], [1.0])
            return _joined(term, change) if rank is None else _cut(truncated(term, rank), change)
        assert rank is not None  # noqa: S101 - such methods have no exact factors; the caller sees to it
        deltas = [self._delta(change, part.deltas) for part in combined.parts]
        return _cut(approximated(Combination(combined, deltas), rank, change.target.name), change)

    def whole(self, change: Change) -> Array:
        """The values of a tensor that is saved whole, float32 in its own shape.

        Raises:
            NotFinite: as for `factors`.
        """
        return _narrowed(whole(self._values.of(change)).reshape(change.target.shape).numpy(), change)

    def _delta(self, change: Change, deltas: Sequence[LowRank]) -> LowRankDelta:
        return LowRankDelta(change.shape, [self._factors.read(step) for step in deltas])


def _cut(found: Truncated, change: Change) -> Joined:
    return replace(_joined(found.factors, change), energy=found.energy, lost=found.discarded)


def _joined(term: Factors, change: Change) -> Joined:
    return Joined(left=_narrowed(term.left * term.scale, change), right=_narrowed(term.right, change))


def _narrowed(values: Array, change: Change) -> Array:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise NotFinite(change.target.name, DType.F32.long_name)
    return narrow
