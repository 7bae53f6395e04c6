"""Values that several threads ask for: made once, by whoever asks first, and kept within a limit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Remembered(Generic[T]):
    """Keeps the values that were asked for last.

    Args:
        limit: what the sizes of all values together may be; sizes are one for each unless told otherwise.
        at_least: so many are kept however large they are.
        forget: told of each value that is kept no longer.
    """

    def __init__(self, limit: int, *, at_least: int = 0, forget: Callable[[T], None] = lambda value: None) -> None:
        self._limit, self._at_least, self._forget = limit, at_least, forget
        self._futures: OrderedDict[Hashable, Future[T]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], size: int = 1) -> T:
        """The value of a key. While one thread makes it, others wait, and get what that raises if it fails; nothing is kept then."""
        with self._lock:
            known = self._futures.get(key)
            if known is None:
                future = self._futures[key] = Future[T]()
            else:
                self._futures.move_to_end(key)
        if known is not None:
            return known.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._futures[key]
            future.set_exception(error)
            raise
        future.set_result(value)
        self._keep(key, size)
        return value

    def _keep(self, key: Hashable, size: int) -> None:
        with self._lock:
            self._sizes[key] = size
            self._total += size
            gone = [self._futures.pop(each).result() for each in self._surplus()]
        for value in gone:
            self._forget(value)

    def _surplus(self) -> list[Hashable]:
        """What has to go, the least recently used first; what is being made is no value yet. The lock is held."""
        found: list[Hashable] = []
        for key in self._futures:
            if self._total <= self._limit or len(self._sizes) <= self._at_least:
                break
            if key in self._sizes:
                self._total -= self._sizes.pop(key)
                found.append(key)
        return found

    def drop(self, key: Hashable) -> None:
        """Forget the value of a key, if there is one."""
        with self._lock:
            if key not in self._sizes:
                return
            self._total -= self._sizes.pop(key)
            value = self._futures.pop(key).result()
        self._forget(value)

    def clear(self) -> None:
        """Forget all values."""
        for key in list(self._sizes):
            self.drop(key)
