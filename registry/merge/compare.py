"""How far two task vectors are from each other, `D = W' - W` each: norms, angle, effective rank.

Of low-rank sums all follows from small matrices that thin QR decompositions of the factors leave; of anything else, from one pass over the
weight. Unlike Gram matrices of the factors, those keep all digits of a difference that is small beside both.

Shape letters: `n` rows and `m` columns of a band, `R` the ranks of all that is in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from registry.changes import Change
from registry.locations import Location
from registry.merge.rounding import Array
from registry.merge.sums import FactorReader, Factors
from registry.tensors import DType

if TYPE_CHECKING:
    from registry.merge.weight import Weight

_BLOCK_ELEMENTS = 1 << 20
# What is below this share of the norms is rounding of float64, and no difference.
_ROUNDING = 1e-14


@dataclass(frozen=True, slots=True)
class Angle:
    """Two task vectors' norms and distance `‖D_1 - D_2‖` (Frobenius), and their inner product; not finite where a value of theirs is not.

    `ranks`: each one's effective rank, None where it is not low-rank.
    """

    norms: tuple[float, float]
    distance: float
    product: float
    ranks: tuple[float | None, float | None]

    @property
    def cosine(self) -> float | None:
        """Of the angle between them; None where one is zero."""
        size = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.product / size)) if size else None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what it does to a weight (None: nothing), the folder of its tensors, and what reads factors from there."""

    change: Change | None
    folder: Location
    factors: FactorReader

    @property
    def deltas(self) -> list[Factors]:
        """The low-rank deltas that it adds."""
        return [self.factors.read(step) for step in self.change.deltas] if self.change else []


def is_low_rank(change: Change | None) -> bool:
    """Whether all that a change does, if there is one, is to add low-rank deltas."""
    return change is None or change.is_low_rank


def angle(one: Side, other: Side, base: Location | None) -> Angle:
    """Compare what two adapters do to one weight of a base model, whose folder is needed unless both are low-rank."""
    if is_low_rank(one.change) and is_low_rank(other.change):
        return angle_of(one.deltas, other.deltas)
    assert base is not None  # noqa: S101 - the caller sees to it
    return _streamed(one, other, base)


def angle_of(one: Sequence[Factors], other: Sequence[Factors]) -> Angle:
    """Compare two sums of low-rank deltas."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
        sums = sum((_sums(*cores) for cores in _cores(one, other)), np.zeros(4))
        return _angle(sums, (effective_rank(one), effective_rank(other)))


def _sums(mine: Array, theirs: Array) -> Array:
    """Squares of both norms and of their distance, and the inner product."""
    gap = mine - theirs
    return np.array([np.vdot(mine, mine), np.vdot(theirs, theirs), np.vdot(gap, gap), np.vdot(mine, theirs)])


def _angle(sums: Array, ranks: tuple[float | None, float | None]) -> Angle:
    one, other, distance = (math.sqrt(square) for square in sums[:3])
    return Angle((one, other), 0.0 if distance <= _ROUNDING * (one + other) else distance, float(sums[3]), ranks)


def effective_rank(deltas: Sequence[Factors]) -> float:
    """The exponential of the entropy of the singular values' shares, 0 for zero (Roy and Vetterli, "The effective rank", 2007).

    k equal singular values give k; one that outweighs the others gives little more than 1. Bands of rows that are changed each by itself (query
    and value in one weight, experts) are matrices of their own: of several, the mean, weighed by the squares of their norms.
    NaN where a value is not finite.
    """
    total, energy = 0.0, 0.0
    for (core,) in _cores(deltas):
        if not np.isfinite(core).all():
            return math.nan
        values = np.linalg.svd(core, compute_uv=False)
        shares = values[values > values.max(initial=0.0) * 1e-12] / (values.sum() or 1.0)
        square = float(np.square(values).sum())
        total += square * float(np.exp(-(shares * np.log(shares)).sum()))
        energy += square
    return total / energy if energy else 0.0


def _cores(*sides: Sequence[Factors]) -> Iterator[tuple[Array, ...]]:
    """Of each band of rows a small matrix for each side: up to one rotation of rows and one of columns, its rows of the sum of deltas.

    With `left = Q_l R_l`, `[n, R]`, and `rightᵀ = Q_r R_r`, `[m, R]`, of the stacked factors of all sides, a side's sum is
    `Q_l (R_l R_rᵀ) Q_rᵀ` with the columns of R_l and R_r that are its own.
    """
    for band in _bands(sides):
        first = min(item.row for _, item in band)
        ranks = [item.left.shape[1] for _, item in band]
        left = np.zeros((max(item.end for _, item in band) - first, sum(ranks)))
        right = np.zeros((max(item.column + item.right.shape[1] for _, item in band), sum(ranks)))
        at = 0
        for (_, item), rank in zip(band, ranks, strict=True):
            left[item.row - first : item.end - first, at : at + rank] = item.left * item.scale
            right[item.column : item.column + item.right.shape[1], at : at + rank] = item.right.T
            at += rank
        owner = np.repeat([number for number, _ in band], ranks)
        triangles = [cast("Array", np.linalg.qr(each, mode="r")) for each in (left, right)]
        yield tuple(triangles[0][:, owner == side] @ triangles[1][:, owner == side].T for side in range(len(sides)))


def _bands(sides: Sequence[Sequence[Factors]]) -> list[list[tuple[int, Factors]]]:
    """The deltas with the numbers of their sides; those whose rows overlap are together. The rest of the weight is zero on every side."""
    found: list[list[tuple[int, Factors]]] = []
    end = 0
    items = [(number, item) for number, side in enumerate(sides) for item in side if item.left.size and item.right.size]
    for number, item in sorted(items, key=lambda entry: entry[1].row):
        if not found or item.row >= end:
            found.append([])
        found[-1].append((number, item))
        end = max(end, item.end)
    return found


def _streamed(one: Side, other: Side, base: Location) -> Angle:
    from registry.merge.values import Values  # noqa: PLC0415 - torch takes a second to import

    present = [side.change for side in (one, other) if side.change is not None]
    columns = next((change.columns for change in present if change.steps), present[0].columns)
    values = [Values(base, side.folder, side.factors) for side in (one, other)]
    start = values[0].of(replace(present[0], replacement=None, steps=(), columns=columns))
    weights: list[Weight | None] = [
        None if side.change is None else each.of(_in_float64(side.change, columns))
        for side, each in zip((one, other), values, strict=True)
    ]
    rows, width = start.shape
    sums, step = np.zeros(4), max(1, _BLOCK_ELEMENTS // max(1, width))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        before = start.rows(first, last).numpy()
        mine, theirs = (
            np.zeros_like(before) if each is None else each.rows(first, last).numpy() - before for each in weights
        )
        with np.errstate(invalid="ignore", over="ignore"):
            sums += _sums(mine, theirs)
    ranks = [effective_rank(side.deltas) if is_low_rank(side.change) else None for side in (one, other)]
    return _angle(sums, (ranks[0], ranks[1]))


def _in_float64(change: Change, columns: int | None) -> Change:
    """The same change with a result that nothing is rounded to: in float32, a sum would lose deltas that are small beside the weight."""
    return replace(change, target=replace(change.target, dtype=DType.F64), columns=columns)
