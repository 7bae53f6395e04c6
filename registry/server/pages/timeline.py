"""What was live where over time, as places in a picture: a lane for each environment and adapter, a bar for each shipment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from registry.manifest import Shipment

WIDTH, LABELS, LANE, TOP = 1000, 190, 40, 26
MOST_LANES = 30
_COLOURS = 8
_LETTER = 7.2  # about how wide one is
_LEAST_WIDTH = 3.0
_STEPS = tuple(
    timedelta(minutes=minutes)
    for minutes in (1, 5, 15, 60, 180, 720, 1440, 2 * 1440, 7 * 1440, 14 * 1440, 30 * 1440, 91 * 1440, 365 * 1440)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A shipment from `x` on, `width` wide. `text` is what fits into it; `colour` belongs to the version."""

    x: float
    width: float
    text: str
    colour: int
    shipment: Shipment


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """An adapter in an environment, `y` from the top."""

    environment: str
    adapter: str
    y: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A time that is written below the lanes."""

    x: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The picture. `left_out` lanes had no room; `mark` is where a time that was asked for is."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    height: int
    start: datetime
    end: datetime
    left_out: int
    mark: float | None


def draw_timeline(
    shipments: Sequence[Shipment], start: datetime, end: datetime, at: datetime | None = None
) -> Timeline:
    """The shipments that were live between two times.

    Args:
        shipments: of any environments and adapters.
        start, end: the times at both edges; aware.
        at: a time to mark.
    """
    scale = _Scale(start, end)
    lines: dict[tuple[str, str], list[Shipment]] = {}
    for each in shipments:
        if (each.until or end) >= start and each.shipped_at <= end:
            lines.setdefault((each.environment, each.checkpoint.partition("@")[0]), []).append(each)
    kept = sorted(lines.items())[:MOST_LANES]
    lanes = tuple(
        Lane(environment=environment, adapter=adapter, y=TOP + number * LANE, bars=tuple(_bars(line, scale)))
        for number, ((environment, adapter), line) in enumerate(kept)
    )
    return Timeline(
        lanes=lanes,
        ticks=tuple(_ticks(scale)),
        height=TOP + len(lanes) * LANE + 8,
        start=start,
        end=end,
        left_out=len(lines) - len(kept),
        mark=scale.x(at) if at and start <= at <= end else None,
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    start: datetime
    end: datetime

    def x(self, at: datetime) -> float:
        whole = max((self.end - self.start).total_seconds(), 1e-6)
        share = (min(max(at, self.start), self.end) - self.start).total_seconds() / whole
        return LABELS + (WIDTH - LABELS) * share


def _bars(line: Sequence[Shipment], scale: _Scale) -> Iterator[Bar]:
    for each in line:
        x = scale.x(each.shipped_at)
        width = max(_LEAST_WIDTH, scale.x(each.until or scale.end) - x)
        version = each.checkpoint.partition("@")[2]
        text = version + (" merged" if each.merged else "")
        yield Bar(
            x=min(x, WIDTH - width),
            width=width,
            text=next((words for words in (text, version) if len(words) * _LETTER + 8 <= width), ""),
            colour=int(version[1:]) % _COLOURS,  # so that neighbours differ
            shipment=each,
        )


def _ticks(scale: _Scale) -> Iterator[Tick]:
    """At most seven, at round times."""
    whole = scale.end - scale.start
    step = next((step for step in _STEPS if whole / step <= 7), whole / 7)
    zero = datetime(2000, 1, 3, tzinfo=UTC)
    at = zero + step * (-((zero - scale.start) // step))
    while at <= scale.end:
        if scale.x(at) <= WIDTH - 30:  # so that its text has room
            yield Tick(x=scale.x(at), text=f"{at:%d %b}" if step >= timedelta(days=1) else f"{at:%H:%M}")
        at += step
