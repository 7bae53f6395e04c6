"""Sums that many tuners end in, and the one product with a whole weight that some begin with. Memory stays flat in all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from registry.merge.weight import RowWise, Weight

# Rows that are read at a time; fixed, so that the sums come out the same however the rows are asked for.
_BLOCK_ROWS = 256


def add_product(before: Weight, left: Tensor, right: Tensor) -> Weight:
    """`W + left @ right`, left `[rows, k]`, right `[k, columns]`."""
    return RowWise(before, lambda rows, first: rows.addmm_(left[first : first + rows.shape[0]], right))


def add_entries(before: Weight, places: Tensor, values: Tensor) -> Weight:
    """`W` with values added at places of the flattened matrix, `places` int64 `[n]` (repeated ones add up), `values` `[n]`."""
    order = torch.argsort(places, stable=True)
    places, values = places[order], values[order]
    columns = before.shape[1]

    def add(rows: Tensor, first: int) -> Tensor:
        start, stop = torch.searchsorted(
            places, torch.tensor([first * columns, (first + rows.shape[0]) * columns])
        ).tolist()
        here = places[start:stop]
        return rows.index_put_((here // columns - first, here % columns), values[start:stop], accumulate=True)

    return RowWise(before, add)


def product(left: Tensor, weight: Weight) -> Tensor:
    """`left @ W`, left `[k, rows]`: float64 `[k, columns]`."""
    found = torch.zeros(left.shape[0], weight.shape[1], dtype=torch.float64)
    for first, rows in blocks(weight):
        found.addmm_(left[:, first : first + rows.shape[0]], rows)
    return found


def blocks(weight: Weight) -> Iterator[tuple[int, Tensor]]:
    """All rows in order, some at a time, with the number of the first: for what has to be summed over them."""
    for first in range(0, weight.shape[0], _BLOCK_ROWS):
        yield first, weight.rows(first, min(first + _BLOCK_ROWS, weight.shape[0]))
