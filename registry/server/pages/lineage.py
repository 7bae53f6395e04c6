"""Where a checkpoint comes from and what came of it, as a picture: base, parents, itself, what was made of it, where that is live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, final

from registry.manifest import Checkpoint, Merged, Shipment
from registry.results import Details
from registry.server.pages.drawing import url_of
from registry.server.scope import Scope

Kind = Literal["base", "checkpoint", "self", "merged", "live", "past", "more"]

WIDTH, HEIGHT = 164, 46
_GAP_X, _GAP_Y, _EDGE, _LANE = 46, 14, 6, 4
_MOST_IN_COLUMN, _MOST_FOLLOWED, _LETTERS = 8, 8, 21


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A box: what it is called, what it is, its page, and the corner where it lies. `whole` is the name before it was shortened."""

    key: str
    kind: Kind
    title: str
    note: str
    url: str
    column: int
    x: float = 0
    y: float = 0

    @property
    def shown(self) -> str:
        """The title as it fits into the box."""
        return self.title if len(self.title) <= _LETTERS else f"{self.title[:8]}…{self.title[8 - _LETTERS + 1 :]}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The boxes, and the lines between them as paths of SVG; `edges` are the same as keys."""

    width: float
    height: float
    nodes: tuple[Node, ...]
    lines: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]


_BASE, _PARENT, _SELF, _CHILD, _MERGED, _SHIPPED = range(6)


@final
class _Graph:
    """Boxes and lines while they are gathered; of what is named twice, the first counts."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str], None] = {}

    def add(self, node: Node, *sources: str) -> None:
        self.nodes.setdefault(node.key, node)
        self.edges |= dict.fromkeys((source, node.key) for source in sources if source != node.key)


def lineage(scope: Scope, details: Details) -> Lineage:
    """What a visitor may see of a checkpoint's lineage: one step back, and forward until where it was shipped."""
    checkpoint, graph = details.checkpoint, _Graph()
    own = checkpoint.ref
    graph.add(_base(details))
    parents = [ref for ref in (checkpoint.origin.parents if checkpoint.origin else ()) if scope.sees_ref(ref)]
    for parent in parents:
        graph.add(_checkpoint(parent, _PARENT), details.base.digest.hex)
    graph.add(_itself(checkpoint), *(parents or [details.base.digest.hex]))
    _follow(graph, own, filter(scope.sees, details.merged), details.shipments)
    children = [child for child in details.children if scope.sees_ref(child)]
    for child in children:
        graph.add(_checkpoint(child, _CHILD), own)
    for child in children[:_MOST_FOLLOWED]:
        _follow(graph, child, *_of(scope, child))
    return _laid_out(graph)


def _of(scope: Scope, ref: str) -> tuple[Iterable[Merged], Sequence[Shipment]]:
    found = scope.checkpoint(ref)
    with scope.registry.workspace.reading() as catalog:
        return filter(scope.sees, catalog.merged.of(found)), catalog.shipments.of(found)


def _follow(graph: _Graph, source: str, merged: Iterable[Merged], shipments: Sequence[Shipment]) -> None:
    for each in merged:
        graph.add(_merged(each), source)
    for environment in dict.fromkeys(each.environment for each in shipments):
        last = [each for each in shipments if each.environment == environment][-1]
        known = last.merged is not None and last.merged.hex in graph.nodes
        graph.add(_environment(last), last.merged.hex if known and last.merged else source)


def _base(details: Details) -> Node:
    return Node(
        key=details.base.digest.hex, kind="base", title=details.base.name, note="base model", url=url_of(details.base),
        column=_BASE,
    )  # fmt: skip


def _itself(checkpoint: Checkpoint) -> Node:
    note = f"step {checkpoint.step}" if checkpoint.step is not None else "this checkpoint"
    if checkpoint.origin is not None:
        note = f"made by {checkpoint.origin.action}"
    return Node(key=checkpoint.ref, kind="self", title=checkpoint.ref, note=note, url=url_of(checkpoint), column=_SELF)


def _checkpoint(ref: str, column: int) -> Node:
    note = "made of it" if column == _CHILD else "part of it"
    return Node(key=ref, kind="checkpoint", title=ref, note=note, url=url_of(ref), column=column)


def _merged(merged: Merged) -> Node:
    several = len(merged.checkpoints)
    note = f"merged, {several} inputs" if several > 1 else "merged model"
    return Node(
        key=merged.digest.hex, kind="merged", title=merged.digest.short, note=note, url=url_of(merged), column=_MERGED
    )


def _environment(shipment: Shipment) -> Node:
    is_live = shipment.until is None
    note = f"live since {shipment.shipped_at:%Y-%m-%d}" if is_live else f"until {shipment.until:%Y-%m-%d}"
    return Node(
        key=f"{shipment.environment} {shipment.checkpoint}", kind="live" if is_live else "past", note=note,
        title=shipment.environment, url=f"/shipped?environment={shipment.environment}", column=_SHIPPED,
    )  # fmt: skip


# -- places


def _laid_out(graph: _Graph) -> Lineage:
    """Boxes in columns. A line that passes by a column has a place of its own there, so that it goes around the boxes."""
    used = sorted({node.column for node in graph.nodes.values()})
    shown = {column: _shortened([node for node in graph.nodes.values() if node.column == column]) for column in used}
    kept = {node.key: node for nodes in shown.values() for node in nodes}
    edges = [(one, other) for one, other in graph.edges if one in kept and other in kept]
    routes = {edge: _route(kept[edge[0]].column, kept[edge[1]].column, used) for edge in edges}
    slots: dict[int, list[_Slot]] = {
        column: [
            *(_Slot(node.key, HEIGHT) for node in shown[column]),
            *(_Slot(edge, _LANE) for edge in edges if column in routes[edge]),
        ]
        for column in used
    }
    _ordered(slots, edges, routes)
    tallest = max(_height(column) for column in slots.values())
    middles = {
        (column, slot.key): middle for column, found in slots.items() for slot, middle in _stacked(found, tallest)
    }
    corners = {column: _EDGE + number * (WIDTH + _GAP_X) for number, column in enumerate(used)}
    nodes = [
        replace(node, x=corners[node.column], y=middles[node.column, key] - HEIGHT / 2) for key, node in kept.items()
    ]
    lines = []
    for one, other in edges:
        start, end = kept[one].column, kept[other].column
        stops = [(corners[start] + WIDTH, corners[start] + WIDTH, middles[start, one])]
        stops += [(corners[by], corners[by] + WIDTH, middles[by, (one, other)]) for by in routes[one, other]]
        lines.append(_line([*stops, (corners[end], corners[end], middles[end, other])]))
    return Lineage(
        width=len(used) * (WIDTH + _GAP_X) - _GAP_X + 2 * _EDGE,
        height=tallest + 2 * _EDGE,
        nodes=tuple(nodes),
        lines=tuple(lines),
        edges=tuple(edges),
    )


_Edge = tuple[str, str]


@final
@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in a column: of a box, by its key, or of a line that passes by."""

    key: str | _Edge
    height: float


def _shortened(column: list[Node]) -> list[Node]:
    if len(column) <= _MOST_IN_COLUMN:
        return column
    left = len(column) - _MOST_IN_COLUMN + 1
    first = column[0].column
    return [
        *column[: _MOST_IN_COLUMN - 1],
        Node(key=f"more {first}", kind="more", title=f"{left} more", note="", url="", column=first),
    ]


def _route(start: int, end: int, used: Sequence[int]) -> list[int]:
    return [column for column in used if start < column < end]


def _ordered(slots: dict[int, list[_Slot]], edges: Sequence[_Edge], routes: Mapping[_Edge, list[int]]) -> None:
    """Sort each column by where its lines come from; boxes without any keep their place."""
    rank: dict[tuple[int, str | _Edge], float] = {}
    for column in sorted(slots):
        for number, slot in enumerate(slots[column]):
            rank[column, slot.key] = number
        mean = {slot.key: _mean(_before(slot.key, column, edges, routes, rank)) for slot in slots[column]}
        slots[column].sort(key=lambda slot, mean=mean: mean[slot.key])  # type: ignore[misc]
        rank |= {(column, slot.key): number - len(slots[column]) / 2 for number, slot in enumerate(slots[column])}


def _before(
    key: str | _Edge,
    column: int,
    edges: Sequence[_Edge],
    routes: Mapping[_Edge, list[int]],
    rank: Mapping[tuple[int, str | _Edge], float],
) -> Iterator[float]:
    for edge in edges:
        if key not in (edge, edge[1]):
            continue
        known = [rank[place] for place in rank if place[1] in (edge, edge[0]) and place[0] < column]
        yield from known[-1:]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _height(column: Sequence[_Slot]) -> float:
    return sum(slot.height for slot in column) + (len(column) - 1) * _GAP_Y


def _stacked(column: Sequence[_Slot], tallest: float) -> Iterator[tuple[_Slot, float]]:
    """Each slot with the height of its middle."""
    at = _EDGE + (tallest - _height(column)) / 2
    for slot in column:
        yield slot, at + slot.height / 2
        at += slot.height + _GAP_Y


def _line(stops: Sequence[tuple[float, float, float]]) -> str:
    """A curve from stop to stop; through each it goes level, from its left end to its right end."""
    drawn = f"M{stops[0][1]:g},{stops[0][2]:g}"
    for (_, x, y), (left, right, level) in pairwise(stops):
        middle = (x + left) / 2
        drawn += f" C{middle:g},{y:g} {middle:g},{level:g} {left:g},{level:g}"
        drawn += f" L{right:g},{level:g}" if right != left else ""
    return drawn
