"""The arithmetic of a merge, on blocks of rows. Functions of tensors alone; one of the two modules that import torch.

Shape letters: `n` rows of a block, `d_in` its columns, `r` the rank. All sums are in float32 (float64 for float64 weights); a result is
rounded to its own dtype once, to nearest even, after everything has been added.

Two things make it fast. A block is worked through in tiles that stay in the cache from widening to rounding. And what is recorded of a delta
follows from its factors and the bytes of the result, so that the delta itself is never written out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from registry.tensors import DType

TORCH_DTYPES = {
    DType.F64: torch.float64, DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16,
}  # fmt: skip
# Half a block. Smaller tiles stay deeper in the cache, but threads then meet more often at the interpreter's lock: measured, 15 % slower.
TILE_ELEMENTS = 1 << 19
# Products of fewer rows go through other kernels, whose sums differ in the last bit from those of the whole product.
_LEAST_ROWS = 16
# Squares are summed in float32 over so many elements at most, which keeps the error of a norm below the digits that are recorded.
_PIECE_ELEMENTS = 256
_BITS = {
    torch.float64: (torch.int64, np.uint64, 0x7FF0_0000_0000_0000), torch.float32: (torch.int32, np.uint32, 0x7F80_0000),
    torch.float16: (torch.int16, np.uint16, 0x7C00), torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank delta with its values; see `registry.changes.LowRank`. `a` is `[r, d_in]`, `b` is `[d_out, r]`, in the dtype of the sums."""

    a: Tensor
    b: Tensor
    scale: float
    row: int = 0
    transposed: bool = False

    @property
    def left(self) -> Tensor:
        """`[n, r]`: its rows are those of the weight from `row` on."""
        return self.a.T if self.transposed else self.b

    @property
    def right(self) -> Tensor:
        """`[r, d]`: its columns are those of the weight."""
        return self.b.T if self.transposed else self.a

    @property
    def end(self) -> int:
        """One past the last row of the weight that it covers; `row` is the first."""
        return self.row + self.left.shape[0]

    def product(self, first: int, last: int) -> Tensor:
        """Rows `first … last` of `scale * (B @ A)`, all of them covered: the product first, then scaled, as PEFT and litgpt do."""
        start = max(self.row, min(first, last - _LEAST_ROWS))
        part = slice(start - self.row, last - self.row)
        rows = (self.b @ self.a[:, part]).T if self.transposed else self.b[part] @ self.a
        return rows[first - start :].mul_(self.scale)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """What happened to some rows; the records of a tensor's blocks are added up with `+`.

    `base_square`, `delta_square`: sums of squares of the base and of what came to it. `reached`: elements that a delta touches; `changed`:
    those of the result that differ from the base's. `largest_delta` is of blocks in which no element changed: what was too small.
    `finite`: no value of the result is NaN or infinite.
    """

    elements: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    reached: int = 0
    changed: int = 0
    largest_delta: float = 0.0
    finite: bool = True

    def __add__(self, other: BlockRecord) -> BlockRecord:
        return BlockRecord(
            elements=self.elements + other.elements,
            base_square=self.base_square + other.base_square,
            delta_square=self.delta_square + other.delta_square,
            reached=self.reached + other.reached,
            changed=self.changed + other.changed,
            largest_delta=max(self.largest_delta, other.largest_delta),
            finite=self.finite and other.finite,
        )


@final
class Scratch:
    """Reused buffers by the role they play: fresh memory for each block costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, role: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """A tensor `[rows, columns]` on a reused buffer; its values are arbitrary."""
        size_bytes = rows * columns * dtype.itemsize
        buffer = self._buffers.get(role)
        if buffer is None or buffer.numel() < size_bytes:
            buffer = self._buffers[role] = torch.empty(size_bytes, dtype=torch.uint8)
        return buffer[:size_bytes].view(dtype).view(rows, columns)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows `first …` of a weight: matrices `[n, d_in]`, each in the dtype it is stored in.

    `base`: the base's values, None where it has none. `replacement`: what they are replaced with, None to start from the base's.
    `result`: receives the rows.
    """

    first: int
    base: Tensor | None
    replacement: Tensor | None
    result: Tensor

    @property
    def origin(self) -> Tensor:
        """What deltas are added to."""
        origin = self.base if self.replacement is None else self.replacement
        assert origin is not None  # noqa: S101 - every change starts from something
        return origin


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that deltas for such a weight are summed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def merge_block(block: Block, factors: Sequence[Factors], scratch: Scratch) -> BlockRecord:
    """Compute a block, `W[i] + Σ scale * (B @ A)[i]` over the deltas that cover row i, and measure what happened to it.

    What the deltas themselves are, `factor_record` tells once for the whole tensor.

    Args:
        block: the rows; `result` is filled.
        factors: what to add, in order.
        scratch: buffers that nobody else uses meanwhile.
    """
    dtype, steps = sum_dtype(block.result.dtype), _tiles(block.result)
    wide = scratch.take("wide", dtype, steps[0].stop if steps else 0, block.result.shape[1])
    comparison, pieces = _Comparison(block, scratch), []
    for rows in steps:
        values = wide[: rows.stop - rows.start].copy_(block.origin[rows])
        pieces += _norms(values)
        _add_low_rank(values, factors, block.first + rows.start, as_peft=block.result.dtype.itemsize > 2)
        block.result[rows].copy_(values)
        comparison.look_at(rows)
    changed = comparison.changed()
    record = BlockRecord(elements=block.result.numel(), changed=changed, finite=comparison.finite)
    if block.base is None:
        return record
    if block.replacement is not None:
        delta = block.result.to(dtype) - block.base.to(dtype)
        return replace(record, base_square=_square(block.base), delta_square=_square(delta), reached=changed)
    base_square = _sum_squares(pieces)
    if not math.isfinite(base_square):  # squares that float32 cannot hold
        base_square = _square(block.base)
    return replace(record, base_square=base_square, largest_delta=0.0 if changed else _largest(block, factors))


def _tiles(matrix: Tensor) -> list[slice]:
    rows, columns = matrix.shape
    step = max(_LEAST_ROWS, TILE_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows if columns else 0, step)]


@final
class _Comparison:
    """A block's result and the base's values, compared by their bits, tile by tile while they are in the cache.

    In numpy, which compares ten times as fast as torch. Of a converted tensor only what the adapter did counts as a change.
    """

    def __init__(self, block: Block, scratch: Scratch) -> None:
        bits, unsigned, infinity = _BITS[block.result.dtype]
        self._new: Any = block.result.view(bits).numpy()
        self._magnitude: Any = self._new.view(unsigned)
        self._infinity, self._least = infinity, int(np.iinfo(self._new.dtype).min)
        self._old: Any = None if block.base is None else block.base.to(block.result.dtype).view(bits).numpy()
        self._mask: Any = scratch.take("mask", torch.bool, *block.result.shape).numpy()
        self._negative_zeros = False
        self.finite = True

    def look_at(self, rows: slice) -> None:
        """Take in a tile. Infinities and NaN have all exponent bits set; positive or negative, the largest integer shows them."""
        new = self._new[rows]
        if (
            np.maximum.reduce(new, axis=None) >= self._infinity
            or np.maximum.reduce(self._magnitude[rows], axis=None) >= self._infinity - self._least
        ):
            self.finite = False
        if self._old is not None:
            old = self._old[rows]
            np.not_equal(new, old, out=self._mask[rows])
            self._negative_zeros |= bool(np.minimum.reduce(old, axis=None) == self._least)

    def changed(self) -> int:
        """How many elements differ; zeros of either sign are equal."""
        if self._old is None:
            return int(self._new.size)
        count = int(np.count_nonzero(self._mask))
        if self._negative_zeros:
            count -= int(np.count_nonzero((self._old == self._least) & (self._new == 0)))
        return count


def _add_low_rank(weight: Tensor, factors: Sequence[Factors], first: int, *, as_peft: bool) -> None:
    """Add every delta to rows `first …` of a weight, in place.

    Args:
        weight: `[n, d_in]`, in the dtype of the sums.
        factors: what to add, in order.
        first: row of the weight.
        as_peft: add the rounded product, so that the sums are those of PEFT to the last bit, not only once they are rounded to 16 bits.
    """
    last = first + weight.shape[0]
    for item in factors:
        begin, end = max(first, item.row), min(last, item.end)
        if begin >= end:
            continue
        rows = weight[begin - first : end - first]
        if as_peft:
            rows.add_(item.product(begin, end))
        else:
            rows.addmm_(item.left[begin - item.row : end - item.row], item.right, alpha=item.scale)


def _largest(block: Block, factors: Sequence[Factors]) -> float:
    delta = torch.zeros(block.result.shape, dtype=sum_dtype(block.result.dtype))
    _add_low_rank(delta, factors, block.first, as_peft=True)
    return float(delta.abs().max()) if delta.numel() else 0.0


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _norms(values: Tensor) -> list[Tensor]:
    """Norms of the values' pieces; `_sum_squares` adds up many of them at once."""
    flat = values.view(-1)
    end = flat.numel() // _PIECE_ELEMENTS * _PIECE_ELEMENTS
    norms = [torch.linalg.vector_norm(flat[:end].view(-1, _PIECE_ELEMENTS), dim=1)]
    return norms if end == flat.numel() else [*norms, torch.linalg.vector_norm(flat[end:]).view(1)]


def _sum_squares(norms: Sequence[Tensor]) -> float:
    return float(torch.cat(list(norms)).double().square_().sum()) if norms else 0.0


def factor_record(factors: Sequence[Factors]) -> BlockRecord:
    """What the deltas of a tensor are, all blocks together: their square, and the elements they reach."""
    return BlockRecord(delta_square=_delta_square(factors), reached=_reached(factors))


def _delta_square(factors: Sequence[Factors]) -> float:
    """The squared Frobenius norm of the sum of deltas, from `r x r` products in float64: `‖BA‖² = Σ (BᵀB) ∘ (AAᵀ)`."""
    total = 0.0
    for one in factors:
        for other in factors:
            begin, end = max(one.row, other.row), min(one.end, other.end)
            if begin < end:
                ours, theirs = (each.left[begin - each.row : end - each.row].double() for each in (one, other))
                inner = (ours.T @ theirs) * (one.right.double() @ other.right.double().T)
                total += one.scale * other.scale * float(inner.sum())
    return max(0.0, total)


def _reached(factors: Sequence[Factors]) -> int:
    """How many elements of a weight its deltas touch: where neither the row of the left factor nor the column of the right one is zero.

    Deltas that cover the same rows count as one that touches the rows and the columns of all of them.
    """
    factors = [item for item in factors if item.scale]
    total = 0
    for begin, end in pairwise(sorted({edge for item in factors for edge in (item.row, item.end)})):
        covering = [item for item in factors if item.row <= begin and end <= item.end]
        if covering:
            rows = [item.left[begin - item.row : end - item.row].any(dim=1) for item in covering]
            columns = [item.right.any(dim=0) for item in covering]
            total += int(torch.stack(rows).any(dim=0).sum()) * int(torch.stack(columns).any(dim=0).sum())
    return total
