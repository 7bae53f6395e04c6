"""Read what users type: `name=value` pairs and points in time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING

from registry.errors import InvalidInput
from registry.manifest import Direction, Metric

if TYPE_CHECKING:
    from registry.filters import Filter
    from registry.mixing import Mixture

_DAY_FORMATS = ("%Y-%m-%d", "%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y", "%d.%m.%Y")
_DAY_WITHOUT_YEAR = ("%d %B", "%d %b", "%B %d", "%b %d")


def pairs(texts: Sequence[str], what: str) -> dict[str, str]:
    """`name=value` texts as a mapping.

    Raises:
        InvalidInput: no `=`, an empty name, or a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InvalidInput(what, text, "expected name=value")
        if name.strip() in found:
            raise InvalidInput(what, text, "given twice")
        found[name.strip()] = value.strip()
    return found


def metrics(texts: Sequence[str], *, step: int | None = None, direction: Direction | None = None) -> tuple[Metric, ...]:
    """`name=number` texts as metrics.

    Raises:
        InvalidInput: not a number.
    """
    found = []
    for name, text in pairs(texts, "metric").items():
        try:
            found.append(Metric(name=name, value=float(text), step=step, direction=direction))
        except ValueError:
            raise InvalidInput("metric", f"{name}={text}", "expected a number") from None
    return tuple(found)


def condition(text: str) -> Filter | None:
    """A filter expression; None for empty text.

    Raises:
        InvalidFilter: it does not parse.
    """
    if not text:
        return None
    from registry.filters import parse_filter  # noqa: PLC0415 - most listings have no filter

    return parse_filter(text)


def direction(*, lower: bool, higher: bool) -> Direction | None:
    """What `--min` and `--max` say is better; None when neither is given.

    Raises:
        InvalidInput: both are.
    """
    if lower and higher:
        raise InvalidInput("--min and --max", "", "only one of them")
    return "lower" if lower else "higher" if higher else None


def mixture(method: str, weights: str, **options: str) -> Mixture:
    """How checkpoints are weighed together. Options that are empty text were not given; `lambda_` is called `lambda`.

    Raises:
        InvalidInput: not numbers.
    """
    from registry.mixing import Mixture  # noqa: PLC0415 - the help need not wait for it

    said = {name.rstrip("_"): number(text, name.rstrip("_")) for name, text in options.items() if text}
    return Mixture(
        method=method or ("interpolate" if "t" in said else "linear"),
        weights=tuple(float(number(text, "weights")) for text in weights.split(",")) if weights else (),
        options=said,
    )


def inputs(refs: Sequence[str] | None, between: tuple[str, str] | None) -> list[str]:
    """The checkpoints that are named, one way or the other.

    Raises:
        InvalidInput: none, or both ways.
    """
    if bool(refs) == bool(between):
        raise InvalidInput("REF", "", "name the checkpoints, or two of them with --between")
    return list(refs or between or ())


def number(text: str, what: str) -> int | float:
    """A finite number; whole ones are kept whole.

    Raises:
        InvalidInput: something else.
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InvalidInput(what, text, "expected a number")
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]+\s*", text) else found


def point_in_time(text: str, now: datetime) -> datetime:
    """A moment: ISO 8601, or a day in words (`3 May`), which means its end. Without a zone it is local time.

    Raises:
        InvalidInput: neither.
    """
    cleaned = re.sub(r"[,\s]+", " ", text.strip())
    if cleaned in ("today", "yesterday"):
        day = now.astimezone() - timedelta(days=cleaned == "yesterday")
        return _end_of(day)
    for pattern in _DAY_FORMATS:
        if day_found := _parse(cleaned, pattern):
            return _end_of(day_found)
    for pattern in _DAY_WITHOUT_YEAR:
        # The latest such day that is not in the future.
        for year in (now.astimezone().year, now.astimezone().year - 1):
            day_found = _parse(f"{cleaned} {year}", f"{pattern} %Y")
            if day_found and day_found.astimezone() <= now:
                return _end_of(day_found)
    try:
        return datetime.fromisoformat(cleaned).astimezone(UTC)
    except ValueError:
        raise InvalidInput("time", text, "expected a date (2026-05-03, 3 May) or a time (2026-05-03T14:00)") from None


def _parse(text: str, pattern: str) -> datetime | None:
    try:
        return datetime.strptime(text, pattern)  # noqa: DTZ007 - a day on the user's own calendar
    except ValueError:
        return None


def _end_of(day: datetime) -> datetime:
    return datetime.combine(day.date(), time.max).astimezone(UTC)


def duration(text: str) -> timedelta:
    """`90min`, `24h`, `7d`.

    Raises:
        InvalidInput: something else.
    """
    match = re.fullmatch(r"(\d{1,6})\s*(min|h|d)", text.strip())
    if match is None:
        raise InvalidInput("duration", text, "expected for example 90min, 24h or 7d")
    unit = {"min": "minutes", "h": "hours", "d": "days"}[match[2]]
    return timedelta(**{unit: int(match[1])})
