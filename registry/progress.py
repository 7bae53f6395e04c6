"""How whoever asks is told how far a long verb has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told what is being done, the bytes done since the last call, and the bytes there are in all."""


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """The progress of who does not want to know."""
    del what, done_bytes, total_bytes
