"""The first page: what is live where, what is being made, what came last, and the best of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

from registry.errors import DirectionUnknown, MixedData, UnknownMetric
from registry.manifest import Shipment
from registry.results import AdapterLine
from registry.selection import Ranking, most_telling
from registry.server.pages.visits import Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Job, JobState, Role

pages = Pages("overview")

_LIVE = 6  # of each environment
_ADAPTERS = 8
_RECENT = 8
_JOBS = 5
_CURVE = 400
_TRIED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment: what went live there last, and how many others are live."""

    name: str
    shipments: tuple[Shipment, ...]
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """An adapter and its best checkpoint, None where nobody can say which that is. `curve` are the metric's values in the best one's run."""

    line: AdapterLine
    ranking: Ranking | None
    curve: tuple[float, ...] = ()


@pages.page("GET", "/", Role.READER)
def show_overview(visit: Visit) -> Shown:
    """Everything at a glance; `part=jobs` only what is being done."""
    jobs = _jobs(visit.scope)
    if visit.is_partial and visit.query.one("part") == "jobs":
        return Shown("_overview_jobs.html", jobs=jobs)
    registry, namespaces = visit.scope.registry, visit.scope.namespaces
    lines = registry.adapters(limit=_ADAPTERS, namespaces=namespaces)
    with registry.workspace.reading() as catalog:
        total = catalog.overview.count(namespaces=namespaces)
    return Shown(
        "overview.html",
        jobs=jobs,
        environments=_live(visit.scope),
        leaders=[_leader(visit.scope, line) for line in lines],
        recent=registry.page(limit=_RECENT, namespaces=namespaces).items,
        total=total,
        has_bases=bool(registry.bases()),
    )


def _jobs(scope: Scope) -> list[Job]:
    """The work that is being done, or waits."""
    running, queued = (
        scope.last(partial(scope.registry.jobs, state), scope.sees_job, _JOBS)
        for state in (JobState.RUNNING, JobState.QUEUED)
    )
    return [*running, *queued][:_JOBS]


def _live(scope: Scope) -> list[Environment]:
    shipments = scope.shipments("", scope.registry.shipped)
    found = []
    for name, live in groupby(shipments, key=lambda each: each.environment):
        newest = sorted(live, key=lambda each: each.number, reverse=True)
        found.append(Environment(name=name, shipments=tuple(newest[:_LIVE]), others=max(0, len(newest) - _LIVE)))
    return found


def _leader(scope: Scope, line: AdapterLine) -> Leader:
    ranking = _ranking(scope, str(line.name), line.metrics)
    if ranking is None:
        return Leader(line=line, ranking=None)
    best = ranking.groups[0].checkpoints[0]
    with scope.registry.workspace.reading() as catalog:
        curve = catalog.overview.values_of_run(line.name, best.run, ranking.metric, _CURVE)
    return Leader(line=line, ranking=ranking, curve=tuple(curve))


def _ranking(scope: Scope, adapter: str, metrics: Sequence[str]) -> Ranking | None:
    """The best of an adapter by the metric that all its checkpoints share, or else by the first that has a direction."""
    for metric in islice((None, *most_telling(metrics)), _TRIED + 1):
        try:
            return scope.registry.rank(adapter, metric=metric, namespaces=scope.namespaces)
        except (UnknownMetric, DirectionUnknown, MixedData):
            continue
    return None
