"""The first page: what is live where, what is being made, what came last, and the best of each adapter."""

from __future__ import annotations

from functools import partial

from registry.db.listing import Scope as Listed
from registry.server.pages.visits import Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Job, JobState, Role

pages = Pages("overview")

_LIVE = 6  # of each environment
_ADAPTERS = 8
_RECENT = 8
_JOBS = 5
_CURVE = 400


@pages.page("GET", "/", Role.READER)
def show_overview(visit: Visit) -> Shown:
    """Everything at a glance; `part=jobs` only what is being done."""
    jobs = _jobs(visit.scope)
    if visit.is_partial and visit.query.one("part") == "jobs":
        return Shown("_overview_jobs.html", jobs=jobs)
    seen = visit.scope.namespaces
    with visit.scope.registry.workspace.reading() as catalog:
        return Shown(
            "overview.html",
            jobs=jobs,
            environments=catalog.shipments.newest(_LIVE, seen),
            leaders=catalog.overview.leaders(_ADAPTERS, _CURVE, seen),
            recent=catalog.checkpoints.page(Listed(namespaces=seen), limit=_RECENT).items,
            total=catalog.overview.count(namespaces=seen),
            has_bases=bool(catalog.bases.names()),
        )


def _jobs(scope: Scope) -> list[Job]:
    """The work that is being done, or waits."""
    running, queued = (
        scope.last(partial(scope.registry.jobs, state), scope.sees_job, _JOBS)
        for state in (JobState.RUNNING, JobState.QUEUED)
    )
    return [*running, *queued][:_JOBS]
