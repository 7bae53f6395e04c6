"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(is_so: Callable[[], object]) -> None:
    """Return once something is so; fail after so long that it never will be, on however slow a machine."""
    end = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.02)
