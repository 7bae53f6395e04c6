"""Regular expressions from adapter configurations. They come from strangers, and ten characters can keep a matcher busy for years."""

from __future__ import annotations

import re
from typing import Any, final

from registry.errors import CorruptFile

_MAX_PATTERN = 20_000
# An honest pattern takes microseconds.
_MAX_SECONDS = 0.5


@final
class Pattern:
    """A compiled pattern. What it matches is what `re.fullmatch` would match."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    @classmethod
    def compile(cls, source: str) -> Pattern | None:
        """Compile a pattern; None when it is malformed or absurdly long."""
        import regex  # noqa: PLC0415 - most configurations hold no pattern

        if len(source) > _MAX_PATTERN:
            return None
        try:
            re.compile(source)  # what PEFT runs
            return cls(regex.compile(source))
        except (re.error, regex.error, OverflowError, RecursionError):
            return None

    def matches(self, text: str) -> bool:
        """Whether the pattern matches the whole text.

        Raises:
            CorruptFile: it takes longer than any honest pattern would.
        """
        try:
            return self._compiled.fullmatch(text, timeout=_MAX_SECONDS) is not None
        except TimeoutError as error:
            shown = f"a pattern that takes too long: {self._compiled.pattern[:80]!r}"
            raise CorruptFile("adapter_config.json", shown) from error
