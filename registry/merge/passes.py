"""Sums over all elements of a matrix, worked out by whichever threads need them, with the same bits however many those are."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Generic, TypeVar, final

from torch import Tensor

T = TypeVar("T")
# A pass over a matrix: what rows `first … last` contribute to a sum.
Pass = Callable[[int, int], Tensor]
# An algorithm that yields passes, is sent the sum of each, and returns what it was about.
Algorithm = Generator[Pass, Tensor, T]

# What is worked on at once: with the temporaries that there are of it, it stays in a core's cache. Passes take more, since what they bring
# home may be as large as a tile.
_TILE_ELEMENTS = 1 << 16
_PASS_ELEMENTS = 1 << 17


def tiles(
    shape: tuple[int, int], first: int = 0, last: int | None = None, elements: int = _TILE_ELEMENTS
) -> list[tuple[int, int]]:
    """The tiles of a fixed grid over a matrix, as first and last row, that rows `first … last` lie in; each of so many elements or one row."""
    rows, columns = shape
    step = max(1, elements // max(1, columns))
    return [
        (start, min(start + step, rows)) for start in range(first // step * step, rows if last is None else last, step)
    ]


@final
class Passes(Generic[T]):
    """The result of an algorithm, made when it is first asked for.

    Threads that ask for it take tiles of the pass under way until none are left. Their contributions are added up in the order of the tiles.
    """

    def __init__(self, shape: tuple[int, int], algorithm: Algorithm[T]) -> None:
        self._tiles, self._algorithm = tiles(shape, elements=_PASS_ELEMENTS) or [(0, 0)], algorithm
        self._changed = threading.Condition()
        self._sum: _Sum | None = None
        self._outcome: Future[T] = Future()

    def result(self) -> T:
        """What the algorithm returns, or raises."""
        with self._changed:
            if self._sum is None and not self._outcome.done():
                self._go_on(None)
        while (task := self._take()) is not None:
            total, index, rows = task
            try:
                part = total.contribution(*rows)
            except BaseException as error:
                self._fail(error)
                raise
            with self._changed:
                if total.add(index, part):
                    self._go_on(total.value)
        return self._outcome.result()

    def _take(self) -> tuple[_Sum, int, tuple[int, int]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._outcome.done() or (self._sum and self._sum.todo))
            if self._sum is None or self._outcome.done():
                return None
            return self._sum, *self._sum.todo.popleft()

    def _go_on(self, value: Tensor | None) -> None:
        """Send a sum to the algorithm and begin with the next. The lock is held."""
        try:
            contribution = next(self._algorithm) if value is None else self._algorithm.send(value)
            self._sum = _Sum(contribution, self._tiles)
        except StopIteration as stop:
            self._outcome.set_result(stop.value)
        except BaseException as error:  # noqa: BLE001 - for all who wait
            self._outcome.set_exception(error)
        self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if not self._outcome.done():
                self._outcome.set_exception(error)
            self._changed.notify_all()


@final
class _Sum:
    """A pass under way: the tiles that nobody has taken yet, and the sum of those that are done and have no gap before them."""

    def __init__(self, contribution: Pass, grid: list[tuple[int, int]]) -> None:
        self.contribution, self.todo = contribution, deque(enumerate(grid))
        self.value: Tensor | None = None
        self._early: dict[int, Tensor] = {}
        self._next, self._count = 0, len(grid)

    def add(self, index: int, part: Tensor) -> bool:
        """Add a tile's contribution; whether it was the last."""
        self._early[index] = part
        while (ready := self._early.pop(self._next, None)) is not None:
            self.value = ready if self.value is None else self.value.add_(ready)
            self._next += 1
        return self._next == self._count
