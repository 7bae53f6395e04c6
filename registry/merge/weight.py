"""A weight whose values are made when they are asked for, a few rows at a time: what tuners and combinations are functions of.

All values are float64 `[rows, columns]`, so that after everything has been added up one rounding to the weight's own dtype is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, final

import torch
from torch import Tensor


class Weight(Protocol):
    """The values of a matrix, to be read in any order and as often as needed, from several threads at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first … last`, float64 `[last - first, columns]`; the tensor is the caller's to change."""


@final
class RowWise:
    """Each row follows from the same row of another weight: `change` gets rows, which it may change in place, and the number of the first."""

    def __init__(self, before: Weight, change: Callable[[Tensor, int], Tensor]) -> None:
        self._before, self._change = before, change

    @property
    def shape(self) -> tuple[int, int]:
        return self._before.shape

    def rows(self, first: int, last: int) -> Tensor:
        return self._change(self._before.rows(first, last), first)


@final
class Dense:
    """A weight whose values are all there: `[rows, columns]` in any float dtype."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, int]:
        return self._values.shape[0], self._values.shape[1]

    def rows(self, first: int, last: int) -> Tensor:
        return self._values[first:last].to(torch.float64, copy=True)


_ALONE = threading.Lock()
# What torch was set to when each of those that are in it came; all but the first found 1, or what their own thread had.
_USERS: list[int] = []


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread for each operation. Matrices and blocks are the parallelism: more would fight for the same cores, and what an
    operation's last bit is would depend on how many share it. Several merges may want that at once: the last to end sets it back."""
    with _ALONE:
        _USERS.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _ALONE:
            most = max(_USERS)
            _USERS.remove(min(_USERS))
            if not _USERS:
                torch.set_num_threads(most)


def whole(weight: Weight) -> Tensor:
    """All values, float64 `[rows, columns]`: for the few tuners whose arithmetic needs the matrix at once."""
    return weight.rows(0, weight.shape[0])


def transposed(weight: Weight) -> Weight:
    """The transpose, with all values in memory."""
    return Dense(whole(weight).T)
