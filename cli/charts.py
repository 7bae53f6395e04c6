"""A line chart in characters: dots of braille for the lines, a sign of its own for each run's points, a star on the best one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from string import ascii_letters

from registry.curves import Chart, Point

HEIGHT = 12
_LEAST_WIDTH = 24
_SIGNS = "●■▲◆○□△◇" + ascii_letters
_BEST = "★"
_BRAILLE = 0x2800
# The bit of each dot of a character, by column and row.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw(chart: Chart, width: int, height: int = HEIGHT) -> list[str]:
    """The lines of a chart that is `width` characters wide at most, its axes and legend included."""
    values, xs = [point.value for point in chart.points], [point.x for point in chart.points]
    marks = {0: _short(max(values)), height - 1: _short(min(values))}
    margin = max(len(text) for text in marks.values()) + 1
    inner = max(_LEAST_WIDTH, width - margin - 1)
    canvas = _Canvas(inner, height, (min(xs), max(xs)), (min(values), max(values)))
    for number, points in enumerate(chart.runs.values()):
        for one, other in pairwise(points):
            canvas.line(one, other)
        for point in points:
            canvas.sign(point, _SIGNS[number % len(_SIGNS)])
    if chart.best is not None:
        canvas.sign(chart.best, _BEST)
    rows = [f"{marks.get(row, ''):>{margin}}┤{text}".rstrip() for row, text in enumerate(canvas.rows())]
    first, last = str(min(xs)), str(max(xs))
    middle = (
        chart.axis.center(inner - len(first) - len(last)) if inner > len(first) + len(last) + len(chart.axis) else ""
    )
    return [
        chart.metric,
        *rows,
        f"{'':>{margin}}└{'─' * inner}",
        f"{'':>{margin + 1}}{first}{middle}{last}",
        *_legend(chart, width),
    ]


def _short(value: float) -> str:
    return f"{value:.5g}"


def _legend(chart: Chart, width: int) -> Iterator[str]:
    """The runs, as many as fit on each line, and the best point."""
    runs = [f"{_SIGNS[number % len(_SIGNS)]} {run}" for number, run in enumerate(chart.runs)]
    line = ""
    for run in runs if len(runs) > 1 else ():
        if line and len(line) + 2 + len(run) > width:
            yield line
            line = ""
        line = f"{line}  {run}" if line else run
    if line:
        yield line
    if chart.best is not None:
        yield f"{_BEST} {chart.best.ref}  {chart.axis} {chart.best.x}  {_short(chart.best.value)}"


class _Canvas:
    """Characters, each of two by four dots; x grows to the right and values grow upwards."""

    def __init__(self, width: int, height: int, xs: tuple[int, int], values: tuple[float, float]) -> None:
        self._width, self._height = width, height
        self._xs, self._values = xs, values
        self._dots = [[0] * width for _ in range(height)]
        self._signs: dict[tuple[int, int], str] = {}

    def _place(self, point: Point) -> tuple[float, float]:
        """Column and row of its dot."""
        across = (point.x - self._xs[0]) / ((self._xs[1] - self._xs[0]) or 1)
        up = (point.value - self._values[0]) / ((self._values[1] - self._values[0]) or 1)
        return across * (2 * self._width - 1), (1 - up) * (4 * self._height - 1)

    def line(self, one: Point, other: Point) -> None:
        """Dots from one point to another."""
        (x0, y0), (x1, y1) = self._place(one), self._place(other)
        steps = max(1, round(abs(x1 - x0)), round(abs(y1 - y0)))
        for step in range(steps + 1):
            column, row = round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
            self._dots[row // 4][column // 2] |= _BITS[column % 2][row % 4]

    def sign(self, point: Point, sign: str) -> None:
        """A character in the place of a point."""
        column, row = self._place(point)
        self._signs[round(row) // 4, round(column) // 2] = sign

    def rows(self) -> Iterator[str]:
        """The characters, from the top."""
        for row, dots in enumerate(self._dots):
            yield "".join(
                self._signs.get((row, column)) or (chr(_BRAILLE + bits) if bits else " ")
                for column, bits in enumerate(dots)
            )
