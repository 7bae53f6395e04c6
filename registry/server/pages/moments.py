"""Times as forms have them, and spans of time in words."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta

from registry.errors import InvalidInput

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def moment(text: str, field: str, *, is_end: bool = False) -> datetime | None:
    """A time in ISO 8601, in UTC unless it says otherwise; of a day its beginning, or its end. None for empty text.

    Raises:
        InvalidInput: it is none.
    """
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(field, text[:80], "expected a date (2026-05-03) or a time (2026-05-03T14:00)") from None
    if is_end and _DAY.fullmatch(text):
        found = datetime.combine(found.date(), time.max)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def in_form(at: datetime | None) -> str:
    """A time as a field for local times has it, in UTC; empty for none."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M") if at else ""


def span(taken: float | timedelta) -> str:
    """A time that something takes, in seconds or as it is, for people: `0.4 s`, `2 min 5 s`, `3 h 12 min`."""
    seconds = taken.total_seconds() if isinstance(taken, timedelta) else taken
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
