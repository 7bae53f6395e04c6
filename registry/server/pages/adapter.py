"""The page of an adapter: how its metrics went over the steps of its runs, what was best, and where the shipped versions sit."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from urllib.parse import urlencode

from registry.curves import Point
from registry.errors import DirectionUnknown, MixedData, NotFound, UnknownMetric
from registry.filters import parse_filter
from registry.manifest import Checkpoint, Shipment
from registry.refs import AdapterName
from registry.selection import Ranking
from registry.server.pages.drawing import url_of
from registry.server.pages.plotted import Curve, Mark, curves_of, plotted
from registry.server.pages.visits import Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Role

pages = Pages("adapter")

_LATEST, _MOST_MARKS, _MOST_ALIASES, _TABLE_POINTS = 10, 12, 100, 500
_MOST_CURVES, _MOST_PICKS, _MOST_RUNS = 8, 40, 200


@pages.page("GET", "/adapters/{name:path}", Role.READER)
def show_adapter(visit: Visit) -> Shown:
    """An adapter: curves of one metric for all its runs or some, and what there is besides."""
    name, registry = visit.scope.adapter(visit.path["name"]), visit.scope.registry
    page = registry.page(str(name), limit=_LATEST, namespaces=visit.scope.namespaces)
    names = registry.metric_names(str(name))
    ranking = _ranking(visit.scope, name, visit.query.one("metric") or None)
    shown = visit.query.one("metric") or (ranking.metric if ranking else next(iter(names), ""))
    every = curves_of(registry.series(str(name), shown)) if shown else []
    best = _best(every, ranking)
    curves = _chosen(every, visit.query.all("run"), best)
    shipments = _shipments(visit.scope, name)
    marks = _marks(curves, shipments)
    return Shown(
        "adapter.html",
        name=name,
        metric_name=shown,
        metrics=names,
        runs=list(reversed(every))[:_MOST_RUNS],
        left_out=len(every[_MOST_RUNS:]),
        picks=_picks(every, curves),
        curves=curves,
        direction=ranking.direction if ranking else "",
        best=best,
        data=plotted(curves, shown, best=best if _is_among(best, curves) else None, marks=marks) if curves else None,
        rows=[(curve.name, point) for curve in curves for point in curve.points][-_TABLE_POINTS:],
        latest=page.items,
        has_more=bool(page.cursor),
        live=[each for each in shipments if each.until is None],
        aliases=_aliases(visit.scope, name),
        with_query=lambda **said: f"{url_of(name)}?{urlencode(_query(visit, said), doseq=True)}",
    )


def _picks(every: Sequence[Curve], chosen: Sequence[Curve]) -> list[str]:
    """The runs to choose from: the newest, and those that are shown."""
    offered = {curve.name for curve in (*every[-_MOST_PICKS:], *chosen)}
    return [curve.name for curve in every if curve.name in offered]


def _query(visit: Visit, said: dict[str, object]) -> dict[str, object]:
    kept: dict[str, object] = {"metric": visit.query.one("metric"), "run": visit.query.all("run")}
    return {key: value for key, value in {**kept, **said}.items() if value}


def _ranking(scope: Scope, name: AdapterName, metric: str | None) -> Ranking | None:
    """How its checkpoints rank; None where nobody says which way is better, or what was measured cannot be compared."""
    try:
        return scope.registry.rank(str(name), metric=metric)
    except (DirectionUnknown, MixedData, UnknownMetric):
        return None  # an unknown one is told of by whoever looks for its values


def _chosen(curves: Sequence[Curve], runs: Sequence[str], best: Point | None) -> list[Curve]:
    """The curves of some runs; of all of them where none is named, or of the newest and the one with the best where those are too many."""
    known = {curve.name: curve for curve in curves}
    for run in runs:
        if run not in known:
            raise NotFound(run, get_close_matches(run, known))
    if runs:
        return [known[run] for run in runs]
    newest = {curve.name for curve in curves[-_MOST_CURVES:]} | ({best.run} if best else set())
    return [curve for curve in curves if curve.name in newest]


def _best(curves: Sequence[Curve], ranking: Ranking | None) -> Point | None:
    if ranking is None:
        return None
    ref = ranking.groups[0].checkpoints[0].ref
    return next((point for curve in curves for point in curve.points if point.ref == ref), None)


def _is_among(point: Point | None, curves: Sequence[Curve]) -> bool:
    return any(point in curve.points for curve in curves)


def _shipments(scope: Scope, name: AdapterName) -> list[Shipment]:
    every = scope.shipments("", lambda: scope.registry.shipments())
    return [each for each in every if each.checkpoint.partition("@")[0] == str(name)]


def _marks(curves: Sequence[Curve], shipments: Sequence[Shipment]) -> list[Mark]:
    """Where what is live sits on the axis, and then what was, the latest first."""
    places = {point.ref: point.x for curve in curves for point in curve.points}
    found: dict[tuple[str, str], Mark] = {}
    for each in sorted(shipments, key=lambda each: (each.until is not None, -each.number)):
        if each.checkpoint in places:
            version = each.checkpoint.rpartition("@")[2]
            kind = "past" if each.until else "live"
            mark = Mark(x=places[each.checkpoint], label=f"{each.environment} {version}", kind=kind)
            found.setdefault((each.environment, each.checkpoint), mark)
    return list(found.values())[:_MOST_MARKS]


def _aliases(scope: Scope, name: AdapterName) -> list[tuple[str, Checkpoint]]:
    found = scope.registry.page(str(name), parse_filter("alias is not null"), limit=_MOST_ALIASES)
    return sorted(((alias, each) for each in found.items for alias in each.aliases), key=lambda pair: pair[0])
