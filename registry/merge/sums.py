"""Low-rank sums with results of 16 bits, which nearly every merge is: `W + Σ scale * (left @ right)`, each element nearest to the exact sum.

An element is first summed in floating point, together with a bound on what that may be off by. Where both ends of the bound round to the same
number, that number is right; the few other elements are settled by sums without error. So the bytes depend neither on the order of the sums
nor on blocks, threads or processors.

Shape letters: `n` rows of a block, `r` the ranks of all deltas that cover them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import cast, final

import numpy as np

from registry.changes import LowRank, Matrix
from registry.locations import Location
from registry.merge import kernel
from registry.merge.exact import round_sums
from registry.merge.reading import Scratch, read_bytes, read_matrix, view
from registry.merge.records import BlockRecord
from registry.merge.rounding import WORDS, Array, round_once, values_of
from registry.tensors import DType, StoredTensor

# Bits of an infinity by dtype: all exponent bits, and nothing else.
_INFINITY = {DType.BF16: 0x7F80, DType.F16: 0x7C00}
# Sums of squares below these have no element that the dtype cannot hold.
_LARGEST_SQUARE = {DType.BF16: 1e38, DType.F16: 65504.0**2}
# With factors beyond the one, float32 sums might overflow; the other is more than they can lose to underflow.
_LARGEST_FACTOR, _SMALL = 2.0**20, 1e-30
_CAPACITY = 1 << 16
_PART_ELEMENTS = 1 << 16
_KEPT = 4


@final
@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank delta with its values, float64 left `[n, r]` and right `[r, m]`; see `registry.changes.LowRank`."""

    left: Array
    right: Array
    scale: float
    row: int = 0
    column: int = 0

    @property
    def end(self) -> int:
        """One past the last row of the weight that it covers; `row` is the first."""
        return self.row + int(self.left.shape[0])


def read_factors(location: Location, step: LowRank) -> Factors:
    """The values of a delta."""
    return FactorReader(location).read(step)


@final
class FactorReader:
    """Reads deltas. Of tensors that deltas share, each taking a few elements from all over it (experts), the last few are kept."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._read = lru_cache(_KEPT)(self._whole)

    def read(self, step: LowRank) -> Factors:
        """The values of a delta."""
        return Factors(self._matrix(step.left), self._matrix(step.right), step.scale, step.row, step.column)

    def _matrix(self, matrix: Matrix) -> Array:
        is_sparse = 2 * matrix.rows * matrix.columns < matrix.span
        return view(self._read(matrix.tensor), matrix) if is_sparse else read_matrix(self._location, matrix)

    def _whole(self, tensor: StoredTensor) -> bytearray:
        return read_bytes(self._location, tensor, 0, tensor.spec.elements)


@final
class RoundedSum:
    """A weight's deltas, ready to be added to its blocks from several threads at once. `columns` are the weight's."""

    def __init__(self, factors: Sequence[Factors], shape: tuple[int, int]) -> None:
        self._factors, self._rows, self._columns = factors, shape[0], shape[1]
        edges = {0, shape[0], *(edge for item in factors for edge in (item.row, item.end))}
        self._bands = [_Band(factors, first, last, shape[1]) for first, last in pairwise(sorted(edges))]

    def add(
        self, first: int, old: memoryview, dtypes: tuple[DType, DType], out: memoryview, scratch: Scratch
    ) -> BlockRecord:
        """Add the deltas to rows `first …`.

        Args:
            first: the first row.
            old: the bytes of the rows, one at least.
            dtypes: of the rows and of the result.
            out: receives the result's bytes.
            scratch: buffers that nobody else uses meanwhile.
        """
        before = np.frombuffer(old, WORDS[dtypes[0]]).reshape(-1, self._columns)
        after = np.frombuffer(cast("bytes", out), WORDS[dtypes[1]]).reshape(-1, self._columns)
        total = BlockRecord()
        for band, start, stop in self._covering(first, first + len(before)):
            rows = slice(start - first, stop - first)
            total += band.add(start, before[rows], dtypes, after[rows], scratch)
        return total

    def _covering(self, first: int, last: int) -> Iterator[tuple[_Band, int, int]]:
        for band in self._bands:
            start, stop = max(first, band.first), min(last, band.last)
            if start < stop:
                yield band, start, stop

    def record(self) -> BlockRecord:
        """What the deltas are, all blocks together: their square, and the elements they reach."""
        return BlockRecord(
            delta_square=max(0.0, inner(self._factors, self._factors)),
            reached=sum(band.reached for band in self._bands),
        )


@final
class _Band:
    """Rows of a weight that the same deltas cover: their factors stacked, as one product `left * scales @ right`."""

    def __init__(self, factors: Sequence[Factors], first: int, last: int, columns: int) -> None:
        covering = [item for item in factors if item.row <= first and last <= item.end and item.left.shape[1]]
        self.first, self.last = first, last
        ranks = [item.left.shape[1] for item in covering]
        padded = -(-sum(ranks) // kernel.STEP) * kernel.STEP
        self.left, self.right = np.zeros((last - first, padded)), np.zeros((padded, columns), np.float32)
        self.scales = np.zeros(padded)
        at = 0
        for item, count in zip(covering, ranks, strict=True):
            self.left[:, at : at + count] = item.left[first - item.row : last - item.row]
            self.right[at : at + count, item.column : item.column + item.right.shape[1]] = item.right
            self.scales[at : at + count] = item.scale
            at += count
        self._scaled = self.left * self.scales
        # |Σ_k left_k right_k| and every partial sum is at most the product of these norms (Cauchy and Schwarz).
        wide = self.right.astype(np.float64)
        squares = np.einsum("ij,ij->i", self._scaled, self._scaled), np.einsum("ij,ij->j", wide, wide)
        self._norms = np.sqrt(squares[0]), np.sqrt(squares[1])
        self.reached = int(np.count_nonzero(squares[0])) * int(np.count_nonzero(squares[1]))
        self._is_moderate = max(each.max(initial=0.0) for each in self._norms) < _LARGEST_FACTOR

    def add(
        self, first: int, before: Array, dtypes: tuple[DType, DType], after: Array, scratch: Scratch
    ) -> BlockRecord:
        """As `RoundedSum.add`, with matrices of bits."""
        if kernel.is_there() and self._is_moderate:
            return self._compiled(first, before, dtypes, after, scratch)
        return self._plain(first, before, dtypes, after)

    # -- compiled

    def _compiled(
        self, first: int, before: Array, dtypes: tuple[DType, DType], after: Array, scratch: Scratch
    ) -> BlockRecord:
        rows = slice(first - self.first, first - self.first + len(before))
        arrays = self._arrays
        cut = {name: arrays[name][rows] for name in ("left", "row_reach", "exact_left")}
        doubtful = np.frombuffer(cast("bytes", scratch.take("doubtful", 4 * _CAPACITY)), np.int32)
        shape = (*before.shape, self.scales.size)
        sums = kernel.sum_block({**arrays, **cut, "base": before}, small=_SMALL, kinds=dtypes, out=after,
                                doubtful=doubtful, shape=shape)  # fmt: skip
        if sums.doubtful > _CAPACITY or not sums.base_square < 1e38:
            # Ties by design, or numbers that float32 cannot square.
            return self._plain(first, before, dtypes, after)
        changed = sums.changed + self._settle(first, before, dtypes, after, doubtful[: sums.doubtful])
        finite = sums.result_square < _LARGEST_SQUARE[dtypes[1]] or _is_finite(after, dtypes[1])
        return self._recorded(first, before, changed=changed, base_square=sums.base_square, finite=finite)

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        """What the kernel wants. Made twice when two threads come first together, which does no harm."""
        columns, count = self.right.shape[1], -(-self.right.shape[1] // kernel.TILE)
        tiles = np.zeros((self.scales.size, count * kernel.TILE), np.float32)
        tiles[:, :columns] = self.right
        # So often is every product rounded, its factors included; one part in a hundred covers the bound's own rounding.
        roundings = kernel.STEP + self.scales.size / kernel.STEP + 2
        unit = float(np.finfo(np.float32).eps) / 2
        return {
            "left": self._scaled.astype(np.float32),
            "tiles": np.ascontiguousarray(tiles.reshape(self.scales.size, count, kernel.TILE).swapaxes(0, 1)),
            "row_reach": (1.01 * roundings * unit * self._norms[0]).astype(np.float32),
            "reach": (1.01 * self._norms[1]).astype(np.float32),
            "exact_right": np.ascontiguousarray(self.right.T),
            "exact_left": self._scaled,
        }

    def _settle(self, first: int, before: Array, dtypes: tuple[DType, DType], after: Array, doubtful: Array) -> int:
        """Give doubtful elements their exact values; tells by how many more (or less) the result differs from the base."""
        if not doubtful.size:
            return 0
        rows, columns = np.divmod(doubtful, before.shape[1])
        flat, start = after.reshape(-1), values_of(before.reshape(-1)[doubtful].tobytes(), dtypes[0])
        old = round_once(start, dtypes[1])
        provisional = _differ(flat[doubtful], old, dtypes[1])
        flat[doubtful] = self._exactly(rows + first - self.first, columns, start, dtypes[1])
        return _differ(flat[doubtful], old, dtypes[1]) - provisional

    def _exactly(self, rows: Array, columns: Array, start: Array, dtype: DType) -> Array:
        right = self.right[:, columns].T.astype(np.float64)
        return round_sums(start, self.left[rows], self.scales, right, dtype)

    # -- plain

    def _plain(self, first: int, before: Array, dtypes: tuple[DType, DType], after: Array) -> BlockRecord:
        """The same in numpy, in parts that stay in the cache; in float64 where float32 might not hold the numbers."""
        real = np.float32 if self._is_moderate else np.float64
        left: Array = self._scaled.astype(real)
        right: Array = self.right.astype(real)
        reach = 1.01 * (self.scales.size + 4) * float(np.finfo(real).eps) / 2 * self._norms[0], self._norms[1]
        changed, square = 0, 0.0
        step = max(1, _PART_ELEMENTS // max(1, before.shape[1]))
        for start in range(0, len(before), step):
            part, at = slice(start, start + step), slice(first - self.first + start, first - self.first + start + step)
            exact = values_of(before[part].tobytes(), dtypes[0]).reshape(before[part].shape)
            with np.errstate(over="ignore", invalid="ignore"):
                value = exact.astype(real) + left[at][: len(exact)] @ right
                error = 1.07 * float(np.finfo(real).eps) * np.abs(value) + _SMALL
                error += np.outer(reach[0][at][: len(exact)], reach[1])
                low, after[part] = (_narrow((value + each).astype(real), dtypes[1]) for each in (-error, error))
            i, j = np.nonzero(low != after[part])
            after[part][i, j] = self._exactly(i + at.start, j, exact[i, j], dtypes[1])
            old = before[part] if dtypes[0] is dtypes[1] else round_once(exact, dtypes[1])
            changed += _differ(after[part], old, dtypes[1])
            square += float(np.square(exact).sum())
        return self._recorded(first, before, changed=changed, base_square=square, finite=_is_finite(after, dtypes[1]))

    def _recorded(self, first: int, before: Array, *, changed: int, base_square: float, finite: bool) -> BlockRecord:
        largest = 0.0
        if not changed and self.reached:
            rows = slice(first - self.first, first - self.first + len(before))
            largest = float(np.abs(self._scaled[rows] @ self.right).max())
        return BlockRecord(
            elements=before.size, base_square=base_square, changed=changed, largest_delta=largest, finite=finite
        )


def _narrow(values: Array, dtype: DType) -> Array:
    """The nearest numbers of 16 bits, as bits."""
    if values.dtype == np.float64:
        return round_once(values, dtype)
    if dtype is DType.F16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def _differ(one: Array, other: Array, dtype: DType) -> int:
    """How many elements differ, given their bits; zeros of either sign are equal."""
    magnitude = (1 << 8 * dtype.itemsize_bytes - 1) - 1
    return int(np.count_nonzero((one != other) & (((one | other) & one.dtype.type(magnitude)) != 0)))


def _is_finite(bits: Array, dtype: DType) -> bool:
    infinity = bits.dtype.type(_INFINITY[dtype])
    return not bool(((bits & infinity) == infinity).any())


def inner(ones: Sequence[Factors], others: Sequence[Factors]) -> float:
    """The Frobenius inner product of two sums of deltas, from `r x r` products: `<B A, B' A'> = Σ (Bᵀ B') ∘ (A A'ᵀ)`."""
    total = 0.0
    for one, other in product(ones, others):
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
            rows = _overlap((one.row, other.row), (one.left.shape[0], other.left.shape[0]))
            columns = _overlap((one.column, other.column), (one.right.shape[1], other.right.shape[1]))
            if rows and columns:
                lefts = [each.left[slice(*(edge - each.row for edge in rows))] for each in (one, other)]
                rights = [each.right[:, slice(*(edge - each.column for edge in columns))] for each in (one, other)]
                small = (lefts[0].T @ lefts[1]) * (rights[0] @ rights[1].T)
                total += one.scale * other.scale * float(small.sum())
    return total


def _overlap(starts: tuple[int, int], sizes: tuple[int, int]) -> tuple[int, int] | None:
    begin, end = max(starts), min(start + size for start, size in zip(starts, sizes, strict=True))
    return (begin, end) if begin < end else None
