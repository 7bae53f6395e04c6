"""Regular expressions from adapter configurations, matched without backtracking.

Configurations come from strangers, and a pattern of ten characters can keep `re` busy for years. Here each part of a pattern turns the set
of positions reached in a text into the set reached after it, so that the work grows with pattern times text; and it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import final

from registry.errors import CorruptFile

_MAX_PATTERN = 20_000
_MAX_STEPS = 50_000_000
_TOKEN = re.compile(r"\\[^0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^()|*+?{]|\{", re.DOTALL)
_ASSERTION = re.compile(r"\\[AbBZ]|[\^$]")
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(?=[\d,])(\d*)(?:(,)(\d*))?\})([?+]?)")

Positions = set[int]
_Node = Callable[[str, Positions], Positions]


class _NotSupported(Exception):
    """The pattern looks back, refers back or sets flags."""


@final
class Pattern:
    """A compiled pattern. What it matches is what `re.fullmatch` would match."""

    def __init__(self, source: str) -> None:
        self._source, self._at, self._steps = source, 0, _MAX_STEPS
        self._root = self._alternatives()
        if self._at < len(source):
            raise _NotSupported

    @classmethod
    def compile(cls, source: str) -> Pattern | None:
        """Compile a pattern; None when it is malformed, or uses back references, looking behind, flags or possessive parts."""
        if len(source) > _MAX_PATTERN:
            return None
        try:
            re.compile(source)
            return cls(source)
        except (re.error, OverflowError, RecursionError, _NotSupported):
            return None

    def matches(self, text: str) -> bool:
        """Whether the pattern matches the whole text.

        Raises:
            CorruptFile: all texts together took more steps than any honest pattern needs.
        """
        return len(text) in self._root(text, {0})

    def _alternatives(self) -> _Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        if len(options) == 1:
            return options[0]
        return lambda text, starts: set().union(*(option(text, starts) for option in options))

    def _sequence(self) -> _Node:
        parts = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            parts.append(self._repeated())

        def run(text: str, starts: Positions) -> Positions:
            for part in parts:
                starts = part(text, starts)
            return starts

        return run

    def _repeated(self) -> _Node:
        if self._take("("):
            token, node = "", self._group()
        else:
            token, node = self._token()
        quantifier = _QUANTIFIER.match(self._source, self._at)
        if quantifier is None:
            return node
        self._at = quantifier.end()
        least, most = _bounds(quantifier)
        if token and not _ASSERTION.fullmatch(token):
            return self._run_of(re.compile(f"(?:{token})*"), least, most)
        return self._loop(node, least, most)

    def _group(self) -> _Node:
        ahead = next((mark for mark in ("?=", "?!") if self._take(mark)), "")
        if not ahead and not self._take("?:") and self._source.startswith("?", self._at):
            name = re.compile(r"\?P<\w+>").match(self._source, self._at)
            if name is None:
                raise _NotSupported
            self._at = name.end()
        inner = self._alternatives()
        if not self._take(")"):
            raise _NotSupported
        if not ahead:
            return inner
        return lambda text, starts: {start for start in starts if bool(inner(text, {start})) == (ahead == "?=")}

    def _token(self) -> tuple[str, _Node]:
        """One character, one class of characters, or a condition on a position. `re` cannot backtrack in these."""
        found = _TOKEN.match(self._source, self._at)
        if found is None:
            raise _NotSupported
        self._at = found.end()
        token = re.escape(found[0]) if found[0] == "{" else found[0]
        compiled = re.compile(token)

        def run(text: str, starts: Positions) -> Positions:
            self._spend(len(starts))
            return {match.end() for start in starts if (match := compiled.match(text, start))}

        return token, run

    def _run_of(self, character: re.Pattern[str], least: int, most: float) -> _Node:
        """A repeated character: from each start everything up to the end of the run can be reached."""

        def run(text: str, starts: Positions) -> Positions:
            reached: Positions = set()
            for start in sorted(starts):
                if start in reached and most == float("inf"):
                    continue  # this run was counted from an earlier start
                found = character.match(text, start)
                end = found.end() if found else start
                reached.update(range(start + least, int(min(end, start + most)) + 1))
                self._spend(1 + end - start)
            return reached

        return run

    def _loop(self, node: _Node, least: int, most: float) -> _Node:
        def run(text: str, starts: Positions) -> Positions:
            for _ in range(min(least, len(text) + 1)):  # more rounds reach nothing new
                starts = node(text, starts)
            reached, newest, rounds = set(starts), starts, most - least
            while newest and rounds > 0:
                newest = node(text, newest) - reached
                reached |= newest
                rounds -= 1
            return reached

        return run

    def _take(self, text: str) -> bool:
        found = self._source.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise CorruptFile("adapter_config.json", f"a pattern that takes too long: {self._source[:80]!r}")


def _bounds(quantifier: re.Match[str]) -> tuple[int, float]:
    mark, least, comma, most, suffix = quantifier.groups()
    if suffix == "+":
        raise _NotSupported  # possessive
    if mark:
        return {"*": (0, float("inf")), "+": (1, float("inf")), "?": (0, 1)}[mark]
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else float("inf")
