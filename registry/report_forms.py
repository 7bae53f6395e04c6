"""A report as one page that needs nothing else, or as Markdown. All text is escaped here: nothing that somebody wrote is taken for markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import final

from registry.curves import Chart, Point
from registry.reporting import Curves, Document, Facts, Part, Quote, Sentence, Table

_WIDTH, _HEIGHT = 720, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 34
_COLOURS = 8
_MOST_POINTS = 300  # of a line; more cannot be told apart
_MOST_RUNS = 24
_TICKS, _MARK_LEVELS = 4, 5
_SHORT = 26  # characters of a cell that is not broken
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_POINTS = 40
_MARKUP = re.compile(r"([\\`*_\[\]|~])")

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1f26; --muted: #56606d; --line: #d9dee5; --soft: #f3f5f8; --good: #17692f;
  --good-soft: #e1f4e6; --warning: #7d5200; --warning-soft: #fcf1d6; --bad: #b4232c; --bad-soft: #fdeaea;
  --s0: #0a5dc2; --s1: #b8470a; --s2: #1f7a4d; --s3: #8b3fa8; --s4: #9a6a00; --s5: #00758a; --s6: #c0306f; --s7: #56606d; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #0e1217; --ink: #e7ebf0; --muted: #a2adba; --line: #2b3440; --soft: #161c24;
  --good: #6fd08c; --good-soft: #12301d; --warning: #e8b95a; --warning-soft: #33270d; --bad: #ff8f8f; --bad-soft: #3c1619;
  --s0: #75b5ff; --s1: #ff9f66; --s2: #6fd08c; --s3: #d59bf0; --s4: #e8c15a; --s5: #5fd0e0; --s6: #ff8fbb; --s7: #a2adba; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: var(--ink); background: var(--ground);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; overflow-wrap: anywhere; } .about, .by { color: var(--muted); } .by { font-size: .87em; margin: .8rem 0 .2rem; }
.good, .warning, .bad { padding: .5rem .8rem; border-radius: 6px; }
.good { color: var(--good); background: var(--good-soft); } .warning { color: var(--warning); background: var(--warning-soft); }
.bad { color: var(--bad); background: var(--bad-soft); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: .8rem 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; min-width: 50%; font-size: .92em; }
th, td { text-align: left; padding: .28rem 1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; } th, td.short { white-space: nowrap; } td.long { min-width: 13rem; overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.strong td { font-weight: 600; background: var(--good-soft); }
pre { background: var(--soft); border-radius: 6px; padding: .6rem .8rem; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .87em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--muted); font-size: 11px; font-family: inherit; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
svg .marked { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--ground); stroke-width: 3; }
svg .best { fill: var(--ground); stroke-width: 2.4; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; margin: .2rem 0; font-size: .87em; }
.legend i { display: inline-block; width: .8rem; height: .2rem; margin-right: .4rem; vertical-align: middle; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } h2 { break-after: avoid; } .wide { overflow: visible; }
  figure, tr, .good, .warning, .bad { break-inside: avoid; } }
"""


@final
class _Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def _tag(name: str, *inside: str, **attributes: object) -> _Markup:
    """An element. Text inside is escaped unless it is markup; so are attributes, whose `_` become `-`."""
    said = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return _Markup(f"<{name}{said}>{_joined(inside)}</{name}>")


def _joined(parts: Iterable[str]) -> _Markup:
    return _Markup("".join(each if isinstance(each, _Markup) else html.escape(each) for each in parts))


# -- a page


def to_html(document: Document) -> str:
    """One page with its style and pictures in it; light or dark as the reader's system is, light on paper."""
    head = (
        _Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        _Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        ),
        _tag("title", document.title),
        _Markup(f"<style>{_STYLE}</style>"),
    )
    body = (
        _tag("h1", document.title),
        _tag("p", document.about, class_="about"),
        *(_tag("section", _tag("h2", each.title), *map(_html_part, each.parts)) for each in document.sections),
    )
    return f'<!doctype html>\n<html lang="en">{_tag("head", *head)}{_tag("body", _tag("main", *body))}</html>\n'


def _html_part(part: Part) -> _Markup:
    if isinstance(part, Sentence):
        return _tag("p", part.text, **({} if part.tone == "plain" else {"class_": part.tone}))
    if isinstance(part, Facts):
        return _tag("dl", *(_tag(*each) for name, value in part.pairs for each in (("dt", name), ("dd", value))))
    if isinstance(part, Quote):
        return _joined((_tag("p", part.by, class_="by"), _tag("pre", part.text)))
    return _html_table(part) if isinstance(part, Table) else _figure(part)


def _html_table(table: Table) -> _Markup:
    numbers = [name in table.numbers for name in table.head]

    def row(cells: Sequence[str], kind: str = "td", **attributes: object) -> _Markup:
        made = (
            _tag(kind, cell, class_="number" if is_number else "short" if len(cell) <= _SHORT else "long")
            for cell, is_number in zip(cells, numbers, strict=True)
        )
        return _tag("tr", *made, **attributes)

    body = (
        row(each, **({"class_": "strong"} if place in table.strong else {})) for place, each in enumerate(table.rows)
    )
    return _tag("div", _tag("table", _tag("thead", row(table.head, "th")), _tag("tbody", *body)), class_="wide")


def _figure(curves: Curves) -> _Markup:
    chart = curves.chart
    drawn = list(chart.runs.items())[:_MOST_RUNS]
    legend = [
        _tag("li", _tag("i", style=f"background: {_colour(number)}"), run or "run")
        for number, (run, _) in enumerate(drawn)
    ]
    more = len(chart.runs) - len(drawn)
    told = [f"{more} more runs are left out"] if more else []
    told += [f"○ best: {chart.best.ref}, {chart.best.value:.5g}"] if chart.best else []
    told += [f"┆ {point.ref}: {words}" for point, words in _marked(curves)]
    below = _tag("ul", *legend, *(_tag("li", each) for each in told), class_="legend")
    return _tag("figure", _tag("figcaption", chart.metric), _Drawing(curves).svg(), below)


def _colour(number: int) -> str:
    return f"var(--s{number % _COLOURS})"


@final
class _Drawing:
    """A chart as SVG: a line for each run, a ring around the best point, and a dashed line where something marked lies."""

    def __init__(self, curves: Curves) -> None:
        points = curves.chart.points
        self._curves = curves
        self._xs = min(point.x for point in points), max(point.x for point in points)
        self._values = min(point.value for point in points), max(point.value for point in points)

    def svg(self) -> _Markup:
        chart = self._curves.chart
        runs = list(chart.runs.values())[:_MOST_RUNS]
        lines = [self._line(number, points) for number, points in enumerate(runs)]
        ring = []
        if chart.best is not None:
            number = list(chart.runs).index(chart.best.run)
            x, y = self._place(chart.best)
            ring = [_tag("circle", cx=x, cy=y, r=5, class_="best", stroke=_colour(number))]
        told = f"{chart.metric} over {chart.axis}, {len(runs)} runs"
        return _tag(
            "svg", *self._grid(), *lines, *self._marks(), *ring,
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=told,
        )  # fmt: skip

    def _place(self, point: Point) -> tuple[float, float]:
        return self._across(point.x), self._down(point.value)

    def _across(self, x: float) -> float:
        first, last = self._xs
        share = (x - first) / (last - first) if last > first else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def _down(self, value: float) -> float:
        low, high = self._values
        share = (value - low) / (high - low) if high > low else 0.5
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def _line(self, number: int, points: Sequence[Point]) -> _Markup:
        places = [self._place(point) for point in _thinned(points, _MOST_POINTS)]
        text = " ".join(f"{x},{y}" for x, y in places)
        line = _tag("polyline", points=text, class_="line", stroke=_colour(number))
        dots = (
            _tag("circle", cx=x, cy=y, r=2.4, fill=_colour(number)) for x, y in places if len(places) <= _SPARK_POINTS
        )
        return _joined((line, *dots))

    def _grid(self) -> list[_Markup]:
        low, high = self._values
        found = []
        for number in range(_TICKS + 1):
            value = low + (high - low) * number / _TICKS
            y = self._down(value)
            found.append(_tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
            found.append(_tag("text", f"{value:.4g}", x=_LEFT - 8, y=y + 4, text_anchor="end"))
            if low == high:
                break
        first, last = self._xs
        found += [
            _tag("text", str(x), x=self._across(x), y=_HEIGHT - _BOTTOM + 16, text_anchor="middle")
            for x in sorted({first, (first + last) // 2, last})
        ]
        axis = self._curves.chart.axis
        found.append(_tag("text", axis, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 3, text_anchor="middle"))
        return found

    def _marks(self) -> list[_Markup]:
        found = []
        for level, (point, _) in enumerate(_marked(self._curves)):
            x, y = self._across(point.x), _TOP + 8 + 13 * (level % _MARK_LEVELS)
            is_left = x > _WIDTH / 2
            found.append(_tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark"))
            said = {"text_anchor": "end" if is_left else "start", "class_": "marked"}
            found.append(_tag("text", point.ref.rpartition("@")[2], x=x + (-5 if is_left else 5), y=y, **said))
        return found


def _marked(curves: Curves) -> list[tuple[Point, str]]:
    """The points that something is to be said of, each once, and what."""
    said: dict[str, list[str]] = {}
    for ref, words in curves.marked:
        said.setdefault(ref, []).append(words)
    points = {point.ref: point for point in curves.chart.points}
    return [(points[ref], ", ".join(words)) for ref, words in said.items() if ref in points]


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """So many points at most, the lowest and the highest among them; the first and the last stay."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // (most - 2))
    kept = [points[0]]
    for start in range(0, len(points), size):
        part = sorted(points[start : start + size], key=lambda each: each.value)
        kept += sorted({part[0].x: part[0], part[-1].x: part[-1]}.values(), key=lambda each: each.x)
    return [*kept, points[-1]]


# -- Markdown


def to_markdown(document: Document) -> str:
    """Tables and lists, as GitHub reads them; curves in a line of characters each."""
    lines = [f"# {_plain(document.title)}", "", _plain(document.about)]
    for section in document.sections:
        lines += ["", f"## {_plain(section.title)}"]
        for part in section.parts:
            lines += ["", *_markdown_part(part)]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text of one line that Markdown takes for nothing else."""
    line = " ".join(text.split())
    return _MARKUP.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown_part(part: Part) -> list[str]:
    if isinstance(part, Sentence):
        return [_plain(part.text) if part.tone == "plain" else f"**{_plain(part.text)}**"]
    if isinstance(part, Facts):
        return [f"- {_plain(name)}: {_plain(value)}" for name, value in part.pairs]
    if isinstance(part, Quote):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", part.text)), default=0))
        return [f"{_plain(part.by)}:", "", fence + "text", *part.text.splitlines(), fence]
    if isinstance(part, Table):
        return _markdown_table(part)
    return _markdown_table(_sparks(part.chart))


def _markdown_table(table: Table) -> list[str]:
    rule = ("---:" if name in table.numbers else "---" for name in table.head)
    rows = (
        (f"**{_plain(cell)}**" if place in table.strong and cell else _plain(cell) for cell in row)
        for place, row in enumerate(table.rows)
    )
    return [f"| {' | '.join(cells)} |" for cells in (map(_plain, table.head), rule, *rows)]


def _sparks(chart: Chart) -> Table:
    """A line of characters for each run, all on one scale."""
    values = [point.value for point in chart.points]
    low, high = min(values), max(values)
    rows = []
    for run, points in list(chart.runs.items())[:_MOST_RUNS]:
        last, best = points[-1], chart.best
        star = f"{best.value:.5g} at {best.x}" if best is not None and best.run == run else ""
        rows.append((run, _spark(points, low, high), f"{points[0].value:.5g}", f"{last.value:.5g}", star))
    return Table((chart.metric, f"over {chart.axis}", "first", "last", "best"), tuple(rows), numbers=("first", "last"))


def _spark(points: Sequence[Point], low: float, high: float) -> str:
    shown = [points[round(place)] for place in _spread(len(points), min(len(points), _SPARK_POINTS))]
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round((each.value - low) / (high - low) * top) if high > low else 0] for each in shown)


def _spread(count: int, wanted: int) -> list[float]:
    """`wanted` places from 0 to `count` - 1, evenly."""
    return [number * (count - 1) / (wanted - 1) for number in range(wanted)] if wanted > 1 else [0.0]
