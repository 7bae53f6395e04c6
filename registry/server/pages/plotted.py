"""Curves as the browser draws them: values over steps, what is best, and where something was shipped. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from registry.curves import Point

_MOST_POINTS, _SKETCH_POINTS = 20_000, 240


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Values over steps under one name; there is at least one, and `points` are in the order of their steps."""

    name: str
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        """The point of the latest step."""
        return self.points[-1]

    @property
    def sketch(self) -> tuple[float, ...]:
        """Its values, as many as a small picture can show; what stands out still does."""
        return tuple(point.value for point in _thinned(self.points, _SKETCH_POINTS))

    def best(self, direction: str) -> Point | None:
        """The best point, the earliest of several; None where nobody says which way is better."""
        if not direction:
            return None
        return (min if direction == "lower" else max)(self.points, key=lambda point: point.value)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A place on the axis that has a name; `kind` is `live`, `past` or `chosen`."""

    x: int
    label: str
    kind: str


def curves_of(points: Sequence[Point]) -> list[Curve]:
    """A curve for each run, in the order of the points."""
    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return [Curve(name=run, points=tuple(found)) for run, found in runs.items()]


def axis_of(curves: Sequence[Curve]) -> str:
    """What the points are over: `step`, or `version` where they have no steps."""
    every = (point for curve in curves for point in curve.points)
    return "version" if all(f"v{point.x}" == point.ref.rpartition("@")[2] for point in every) else "step"


def plotted(
    curves: Sequence[Curve], metric: str, *, best: Point | None = None, marks: Sequence[Mark] = ()
) -> Mapping[str, Any]:
    """Everything that `curves.js` needs."""
    return {
        "axis": axis_of(curves),
        "metric": metric,
        "curves": [_written(curve) for curve in curves],
        "best": None if best is None else {"x": best.x, "y": best.value, "ref": best.ref},
        "marks": [{"x": mark.x, "label": mark.label, "kind": mark.kind} for mark in marks],
    }


def _written(curve: Curve) -> Mapping[str, Any]:
    points = list(_thinned(curve.points, _MOST_POINTS))
    return {
        "name": curve.name,
        "adapter": curve.last.ref.rpartition("@")[0],
        "x": [point.x for point in points],
        "y": [point.value for point in points],
        "refs": [point.ref.rpartition("@")[2] for point in points],
    }


def _thinned(points: Sequence[Point], most: int) -> Iterator[Point]:
    """All of the points, or the lowest and the highest of every few: what stands out still does."""
    if len(points) <= most:
        yield from points
        return
    every = -(-2 * len(points) // most)
    for start in range(0, len(points), every):
        part = points[start : start + every]
        ends = {min(part, key=lambda point: point.value), max(part, key=lambda point: point.value)}
        yield from sorted(ends, key=lambda point: point.x)
