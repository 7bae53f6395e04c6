"""Heat maps of weights, layers by modules: which cell lies where, and how dark it is. Pure: numbers in, places out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from registry.server.pages.drawing import metric

SHADES = 9
_MOST_ROWS = 60
_WIDE, _NARROW, _TALL = 26, 13, 20
_FEW_COLUMNS = 28
_LETTER, _LABEL_GAP, _FOOT = 6.7, 10, 22
_LABELS = 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number of one weight: `layer` is None for what is in no layer; `value` None where it was not measured, and `says` tells why."""

    layer: int | None
    module: str
    value: float | None
    says: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A weight on the map: where, the number of its shade (None: not measured), and what it says when pointed at."""

    x: float
    y: float
    shade: int | None
    says: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A heat map: modules from top to bottom, layers from left to right. `rows` and `columns` are labels with their places. `steps` are the
    shades with what each begins at, `highest` is where the last one ends. `has_rest`: the last column is what is in no layer. `left_out` counts
    modules that there was no room for.
    """

    width: float
    height: float
    label_width: float
    cell_width: float
    cell_height: float
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    cells: tuple[Cell, ...]
    steps: tuple[tuple[int, str], ...]
    highest: str
    has_rest: bool
    left_out: int


def heat_map(values: Sequence[Measured], bounds: tuple[float, float] | None = None) -> Map:
    """Lay values out.

    Args:
        values: of weights, in the order of the base.
        bounds: what the lightest and the darkest shade mean; None: the least and the largest value.
    """
    every = list(dict.fromkeys(each.module for each in values))
    modules = {name: row for row, name in enumerate(every[:_MOST_ROWS])}
    numbers = sorted({each.layer for each in values if each.layer is not None})
    layers = [*numbers, *([None] if any(each.layer is None for each in values) else [])]
    width = _WIDE if len(layers) <= _FEW_COLUMNS else _NARROW
    left = max((len(name) for name in modules), default=0) * _LETTER + _LABEL_GAP
    places = {layer: left + column * width for column, layer in enumerate(layers)}
    low, high = bounds or _bounds(values)
    stride = max(1, math.ceil(len(layers) / (_FEW_COLUMNS if width == _WIDE else 3 * _LABELS)))
    return Map(
        width=left + len(layers) * width + _LABEL_GAP,
        height=len(modules) * _TALL + _FOOT,
        label_width=left,
        cell_width=width,
        cell_height=_TALL,
        rows=tuple((row * _TALL, name) for name, row in modules.items()),
        columns=tuple((places[layer], "–" if layer is None else str(layer)) for layer in layers[::stride]),
        cells=tuple(
            Cell(
                x=places[each.layer], y=modules[each.module] * _TALL, shade=shade(each.value, low, high), says=each.says
            )
            for each in values
            if each.module in modules
        ),
        steps=tuple((number, metric(low + (high - low) * number / SHADES)) for number in range(SHADES)),
        highest=metric(high),
        has_rest=None in places,
        left_out=len(every) - len(modules),
    )


def _bounds(values: Sequence[Measured]) -> tuple[float, float]:
    found = [each.value for each in values if each.value is not None]
    return (min(found), max(found)) if found else (0.0, 0.0)


def shade(value: float | None, low: float, high: float) -> int | None:
    """Which of the shades a value has, from 0; None where there is none."""
    if value is None:
        return None
    share = (value - low) / (high - low) if high > low else 0.5
    return min(SHADES - 1, max(0, int(share * SHADES)))
