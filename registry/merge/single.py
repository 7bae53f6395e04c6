"""Low-rank sums with float32 results, as PEFT and litgpt make them, to the last bit: the product in float32, scaled, then added, on torch.

What the last bit of a float32 product is depends on the kernels of the processor's library, here as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from registry.merge.sums import Factors
from registry.merge.weight import Weight

# Products of fewer rows go through other kernels, whose sums differ in the last bit from those of the whole product.
_LEAST_ROWS = 16


@final
class SingleSum:
    """A weight with its deltas added, rounded to float32 after each step."""

    def __init__(self, before: Weight, factors: Sequence[Factors]) -> None:
        self._before = before
        self._factors = [
            (torch.from_numpy(item.left).float(), torch.from_numpy(item.right).float(), item) for item in factors
        ]

    @property
    def shape(self) -> tuple[int, int]:
        return self._before.shape

    def rows(self, first: int, last: int) -> Tensor:
        values = self._before.rows(first, last).float()
        for left, right, item in self._factors:
            start, stop = max(first, item.row), min(last, item.end)
            if start < stop:
                columns = slice(item.column, item.column + right.shape[1])
                product = _product(left, right, start - item.row, stop - item.row)
                values[start - first : stop - first, columns] += product.mul_(item.scale)
        return values.double()


def _product(left: Tensor, right: Tensor, first: int, last: int) -> Tensor:
    """Rows `first … last` of `left @ right`. A transposed pair is multiplied as it was trained, `(rightᵀ @ leftᵀ)ᵀ`."""
    start = max(0, min(first, last - _LEAST_ROWS))
    if left.stride(0) == 1 and right.stride(1) != 1:
        return (right.T @ left[start:last].T).T[first - start :]
    return (left[start:last] @ right)[first - start :]
