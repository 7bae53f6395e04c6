"""The arithmetic of a merge, on blocks of rows. Functions of tensors alone; one of the two modules that import torch.

Shape letters: `n` rows of a block, `d_in` its columns, `r` the rank. All sums are in float32 (float64 for float64 weights); a result is
rounded to its own dtype once, to nearest even, after everything has been added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.tensors import DType

TORCH_DTYPES = {
    DType.F64: torch.float64, DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank delta with its values; see `registry.changes.LowRank`. `a` is `[r, d_in]`, `b` is `[d_out, r]`, in the dtype of the sums."""

    a: Tensor
    b: Tensor
    scale: float
    row: int
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """Sums over a block: squares of base and delta, elements changed, non-zero deltas, and those of them that rounding swallowed."""

    elements: int = 0
    base_square: float = 0.0
    delta_square: float = 0.0
    changed: int = 0
    nonzero: int = 0
    lost: int = 0
    largest_delta: float = 0.0
    finite: bool = True


def sum_dtype(dtype: DType) -> torch.dtype:
    """The dtype that deltas for such a weight are summed in."""
    return torch.float64 if dtype is DType.F64 else torch.float32


def add_low_rank(weight: Tensor, factors: Sequence[Factors], first_row: int, *, total: Tensor, product: Tensor) -> None:
    """Add every delta to a block, in place: `W[i] += scale * (B @ A)[i]` for the rows that a delta covers.

    The product is scaled, then added, as PEFT and litgpt do, so that float32 results are theirs bit for bit.

    Args:
        weight: rows `first_row …` of the weight, `[n, d_in]`, in the dtype of the sums.
        factors: what to add, in order.
        first_row: of the block in the whole weight.
        total: receives the sum of the deltas, `[n, d_in]`; zero where none covers a row.
        product: space for one product, `[n, d_in]`.
    """
    total.zero_()
    last_row = first_row + weight.shape[0]
    for item in factors:
        begin, end = first_row, last_row
        if not item.transposed:
            begin, end = max(first_row, item.row), min(last_row, item.row + item.b.shape[0])
        if begin >= end:
            continue
        space = product[: end - begin]
        if item.transposed:
            torch.mm(item.a[:, begin:end].T, item.b.T, out=space)
        else:
            torch.mm(item.b[begin - item.row : end - item.row], item.a, out=space)
        total[begin - first_row : end - first_row].add_(space.mul_(item.scale))
    weight.add_(total)


def record_block(base: Tensor | None, wide: Tensor, result: Tensor, delta: Tensor | None) -> BlockRecord:
    """Measure what happened to a block.

    Args:
        base: the base's values in their own dtype; None where the base has no such values.
        wide: space in the dtype of the sums; overwritten.
        result: the block as it is written, in its own dtype.
        delta: what was added, in the dtype of the sums; None to take the difference of result and base.
    """
    finite = bool(torch.isfinite(result).all())
    if base is None:
        return BlockRecord(elements=result.numel(), changed=result.numel(), finite=finite)
    # Of a converted tensor only what the adapter did counts as a change.
    same = result == (base if base.dtype == result.dtype else base.to(result.dtype))
    base_square = _square(wide.copy_(base))
    if delta is None:
        delta = torch.where(same, 0.0, result.to(wide.dtype) - wide)
    moved = delta != 0
    return BlockRecord(
        elements=result.numel(),
        base_square=base_square,
        delta_square=_square(delta),
        changed=result.numel() - int(torch.count_nonzero(same)),
        nonzero=int(torch.count_nonzero(moved)),
        lost=int(torch.count_nonzero(moved.logical_and_(same))),
        largest_delta=float(torch.linalg.vector_norm(delta, float("inf"))) if delta.numel() else 0.0,
        finite=finite,
    )


def _square(values: Tensor) -> float:
    """The sum of squares, in float64 so that what is printed of it does not depend on the order of summation."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
