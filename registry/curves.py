"""Metrics over steps: the points of each run, and the best one. Pure: checkpoints in, points out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from registry.errors import DirectionUnknown, UnknownMetric
from registry.manifest import Checkpoint
from registry.selection import best


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A checkpoint's value of a metric, finite. `x` is its step, or its version where no step is known."""

    x: int
    value: float
    ref: str
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One metric: `points` by run and then by `x`. `axis` is `step`, or `version` when a checkpoint has no step. `best` is None where nobody
    says which way is better. `left_out` counts checkpoints without a finite value.
    """

    metric: str
    axis: str
    points: tuple[Point, ...]
    best: Point | None
    left_out: int

    @property
    def runs(self) -> dict[str, tuple[Point, ...]]:
        """The points of each run, in the order of the points."""
        names = dict.fromkeys(point.run for point in self.points)
        return {name: tuple(point for point in self.points if point.run == name) for name in names}


def chart(checkpoints: Sequence[Checkpoint], metric: str | None = None) -> Chart:
    """The values of a metric over steps.

    Args:
        checkpoints: of one adapter, or of several.
        metric: its name; None takes the one that all share, as ranking does.

    Raises:
        UnknownMetric: no checkpoint has a finite value of it, or none is shared by all.
    """
    name, top = metric, None
    try:
        ranking = best(checkpoints, metric=metric)
        name, top = ranking.metric, ranking.groups[0].checkpoints[0].ref
    except DirectionUnknown:
        pass  # drawn all the same, without a best one
    found: list[tuple[Checkpoint, float]] = []
    for checkpoint in checkpoints:
        value = checkpoint.metric(name or "")
        if value is not None and math.isfinite(value):
            found.append((checkpoint, value))
    if not found:
        raise UnknownMetric(name or "", [])
    has_steps = all(checkpoint.step is not None for checkpoint, _ in found)
    several = len({str(checkpoint.adapter) for checkpoint, _ in found}) > 1
    points = [
        Point(
            x=int((checkpoint.step if has_steps else checkpoint.version) or 0),
            value=value,
            ref=checkpoint.ref,
            run=f"{checkpoint.adapter} {checkpoint.run}".strip()
            if several
            else checkpoint.run or str(checkpoint.adapter),
        )
        for checkpoint, value in found
    ]
    first = {point.run: number for number, point in reversed(list(enumerate(points)))}
    points.sort(key=lambda point: (first[point.run], point.x))
    return Chart(
        metric=name or "",
        axis="step" if has_steps else "version",
        points=tuple(points),
        best=next((point for point in points if point.ref == top), None),
        left_out=len(checkpoints) - len(found),
    )


def chart_json(found: Chart) -> dict[str, Any]:
    """A chart for programs."""
    points = [{found.axis: point.x, "value": point.value, "ref": point.ref, "run": point.run} for point in found.points]
    return {"metric": found.metric, "best": found.best.ref if found.best else None, "points": points}
