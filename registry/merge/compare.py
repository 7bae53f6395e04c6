"""How far two task vectors are from each other, `D = W' - W` each: norms, angle, effective rank.

Of low-rank sums all follows from the factors, `r x r` products and one small decomposition; of anything else, from one pass over the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from registry.changes import Change, LowRank
from registry.locations import Location
from registry.merge.rounding import Array
from registry.merge.sums import FactorReader, Factors, inner

if TYPE_CHECKING:
    from registry.merge.weight import Weight

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Angle:
    """Squares of two task vectors' norms, and their inner product. `ranks`: each one's effective rank, None where it is not low-rank."""

    squares: tuple[float, float]
    product: float
    ranks: tuple[float | None, float | None]

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms."""
        return math.sqrt(max(0.0, self.squares[0])), math.sqrt(max(0.0, self.squares[1]))

    @property
    def distance(self) -> float:
        """`‖D_1 - D_2‖`; exactly 0 for equal ones."""
        gap = self.squares[0] - 2 * self.product + self.squares[1]
        # Three nearly equal numbers cancel: what is below their last digits is no distance.
        return math.sqrt(gap) if gap > 1e-14 * (self.squares[0] + self.squares[1]) else 0.0

    @property
    def cosine(self) -> float | None:
        """Of the angle between them; None where one is zero."""
        size = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.product / size)) if size else None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what it does to a weight (None: nothing), and the folder of its factors."""

    change: Change | None
    folder: Location

    @property
    def is_low_rank(self) -> bool:
        """Whether all it does is to add low-rank deltas."""
        if self.change is None:
            return True
        return self.change.replacement is None and all(isinstance(step, LowRank) for step in self.change.steps)


def angle(one: Side, other: Side, base: Location) -> Angle:
    """Compare what two adapters do to one weight of a base model."""
    if one.is_low_rank and other.is_low_rank:
        factors = [_factors(side) for side in (one, other)]
        squares = inner(factors[0], factors[0]), inner(factors[1], factors[1])
        return Angle(squares, inner(*factors), (effective_rank(factors[0]), effective_rank(factors[1])))
    return _streamed(one, other, base)


def _factors(side: Side) -> list[Factors]:
    steps = side.change.steps if side.change else ()
    return [FactorReader(side.folder).read(step) for step in steps if isinstance(step, LowRank)]


def effective_rank(factors: Sequence[Factors]) -> float:
    """The exponential of the entropy of the singular values' shares, 0 for zero (Roy and Vetterli, "The effective rank", 2007).

    k equal singular values give k; one that outweighs the others gives little more than 1.
    """
    values = _singular_values(factors)
    shares = values[values > values.max(initial=0.0) * 1e-12] / values.sum() if values.sum() else values[:0]
    return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0


def _singular_values(factors: Sequence[Factors]) -> Array:
    """Those of the sum of deltas, from the triangles of thin QR decompositions of the stacked factors."""
    if not factors:
        return np.zeros(0)
    rows = max(item.end for item in factors)
    columns = max(item.column + item.right.shape[1] for item in factors)
    rank = sum(item.left.shape[1] for item in factors)
    left, right, at = np.zeros((rows, rank)), np.zeros((rank, columns)), 0
    for item in factors:
        part = slice(at, at + item.left.shape[1])
        left[item.row : item.end, part] = item.left * item.scale
        right[part, item.column : item.column + item.right.shape[1]] = item.right
        at = part.stop
    triangles: list[Array] = [np.linalg.qr(each).R for each in (left, right.T)]
    return np.linalg.svd(triangles[0] @ triangles[1].T, compute_uv=False)


def _streamed(one: Side, other: Side, base: Location) -> Angle:
    from registry.merge.values import Values  # noqa: PLC0415 - torch takes a second to import

    changes = [side.change for side in (one, other)]
    shape = next(change.shape for change in changes if change is not None)
    weights = [
        None if side.change is None else Values(base, side.folder, FactorReader(side.folder)).of(side.change)
        for side in (one, other)
    ]
    start = _start(next(change for change in changes if change is not None), base)
    sums = np.zeros(3)
    step = max(1, _BLOCK_ELEMENTS // max(1, shape[1]))
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        before = start.rows(first, last).numpy()
        parts = [
            np.zeros_like(before) if weight is None else weight.rows(first, last).numpy() - before for weight in weights
        ]
        sums += [np.vdot(parts[i], parts[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
    ranks = [effective_rank(_factors(side)) if side.is_low_rank else None for side in (one, other)]
    return Angle((float(sums[0]), float(sums[1])), float(sums[2]), (ranks[0], ranks[1]))


def _start(change: Change, base: Location) -> Weight:
    from registry.merge.values import Values  # noqa: PLC0415

    plain = Change(target=change.target, source=change.source, columns=change.columns)
    return Values(base, base, FactorReader(base)).of(plain)
