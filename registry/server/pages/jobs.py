"""Pages of background work: what is done, what one job is at, live, and what stops it or tries it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

from registry.codec import from_json
from registry.errors import InvalidInput, UnknownJob
from registry.failures import from_document
from registry.manifest import Checkpoint, Merged, Report, utc_now
from registry.server.pages.drawing import url_of
from registry.server.pages.moments import span
from registry.server.pages.visits import Moved, Pages, Shown, Stream, Visit
from registry.server.scope import Scope
from registry.teamwork import Job, JobLine, JobState, Role
from registry.wording import Words, explain

T = TypeVar("T")
pages = Pages("jobs")

_AT_ONCE = 50
_LOG_LINES = 200
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.4, 2.0
_STREAM_SECONDS = 300.0  # then the browser asks again, and is looked at again
_MOST_NUMBER = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a job goes: bytes a second, and seconds that are left; None where that cannot be told."""

    rate: float | None
    left_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a job has come to: links to what it made, or the words of what went wrong and the report behind them."""

    links: tuple[tuple[str, str], ...] = ()
    words: Words | None = None
    report: Report | None = None


@pages.page("GET", "/jobs", Role.READER)
def list_jobs(visit: Visit) -> Shown:
    """The last jobs, in one state or in any."""
    state = visit.query.one("state")
    if state and state not in set(JobState):
        raise InvalidInput("state", state[:80], f"one of {', '.join(JobState)}")
    limit = visit.query.number("limit", _AT_ONCE, range(1, 1001))
    found = visit.scope.last(lambda count: visit.scope.registry.jobs(state, count), visit.scope.sees_job, limit + 1)
    following = min(limit + _AT_ONCE, 1000)
    more = f"/jobs?{urlencode({'state': state, 'limit': following})}" if len(found) > limit and limit < 1000 else ""
    jobs = found[:limit]
    is_busy = any(not job.state.is_over for job in jobs)
    template = "_jobs.html" if visit.is_partial else "jobs.html"
    return Shown(template, jobs=jobs, span=span, state=state, states=list(JobState), more=more, is_busy=is_busy)


@pages.page("GET", "/jobs/{number}", Role.READER)
def show_job(visit: Visit) -> Shown:
    """A job: where it stands, its files, its log, and what came of it."""
    job = _found(visit)
    return Shown("job.html", **_surroundings(visit.scope, job, visit.scope.registry.job_log(job.id)))


@pages.page("GET", "/jobs/{number}/events", Role.READER)
def watch_job(visit: Visit) -> Stream:
    """The same while it changes."""
    return Stream(_events(visit, _found(visit).id))


@pages.page("POST", "/jobs/{number}/cancel", Role.WRITER)
def cancel_job(visit: Visit) -> Moved:
    """Stop it."""
    return Moved(f"/jobs/{visit.scope.registry.cancel_job(_found(visit).id).id}")


@pages.page("POST", "/jobs/{number}/retry", Role.WRITER)
def retry_job(visit: Visit) -> Moved:
    """Try it again."""
    return Moved(f"/jobs/{visit.scope.registry.retry_job(_found(visit).id).id}")


def _found(visit: Visit) -> Job:
    text = visit.path["number"]
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:18]) <= _MOST_NUMBER:
        raise UnknownJob(text[:80])
    return visit.scope.job(int(text))


# -- live


async def _events(visit: Visit, number: int) -> AsyncIterator[tuple[str, str]]:
    """The parts of a job's page, each when it has changed, and `end` after the last. Who comes back gets all of them first."""
    shown: dict[str, str] = {}
    end, pause = time.monotonic() + _STREAM_SECONDS, _SHORTEST_PAUSE
    while True:
        is_over, parts = await visit.in_thread(lambda: _parts(visit, number))
        changed = {name: html for name, html in parts.items() if shown.get(name) != html}
        shown.update(changed)
        for event in changed.items():
            yield event
        if is_over:
            yield "end", ""
            return
        if time.monotonic() > end:
            return
        pause = _SHORTEST_PAUSE if changed else min(pause * 1.3, _LONGEST_PAUSE)
        await asyncio.sleep(pause)
        if visit.is_closing():
            return


def _parts(visit: Visit, number: int) -> tuple[bool, Mapping[str, str]]:
    with visit.scope.registry.workspace.reading() as catalog:
        job, lines = catalog.jobs.find(number), catalog.jobs.lines(number)
    values = _surroundings(visit.scope, job, lines)
    return job.state.is_over, {name: visit.draw(f"_job_{name}.html", **values) for name in ("head", "body", "log")}


# -- what there is to show


def _surroundings(scope: Scope, job: Job, lines: list[JobLine]) -> dict[str, Any]:
    return {
        "job": job,
        "refs": _refs(job.arguments),
        "lines": lines[-_LOG_LINES:],
        "left_out": max(0, len(lines) - _LOG_LINES),
        "pace": pace(job),
        "span": span,
        "outcome": _outcome(scope, job),
        "is_retryable": job.state in (JobState.FAILED, JobState.CANCELLED),
    }


def _refs(arguments: Mapping[str, Any]) -> list[str]:
    """The checkpoints that a job works on."""
    several = arguments.get("checkpoints")
    named = several if isinstance(several, list) else [arguments.get("one"), arguments.get("other")]
    return [each for each in named if isinstance(each, str)]


def pace(job: Job) -> Pace:
    """How fast a job goes, or went."""
    if job.started_at is None or not job.done_bytes:
        return Pace(rate=None, left_seconds=None)
    seconds = ((job.finished_at or utc_now()) - job.started_at).total_seconds()
    if seconds <= 0:
        return Pace(rate=None, left_seconds=None)
    rate = job.done_bytes / seconds
    is_running = job.state is JobState.RUNNING and job.total_bytes > job.done_bytes
    return Pace(rate=rate, left_seconds=(job.total_bytes - job.done_bytes) / rate if is_running else None)


def _outcome(scope: Scope, job: Job) -> Outcome:
    if job.error is not None:
        error = from_document(job.error, f"job {job.id}")
        return Outcome(words=explain(error), report=getattr(error, "report", None))
    if job.state is not JobState.SUCCEEDED:
        return Outcome()
    return Outcome(links=tuple(_links(job.result)))


def _links(result: Any) -> Iterator[tuple[str, str]]:
    """What a result names that has a page: merged models and checkpoints, wherever the verb puts them."""
    for each in result if isinstance(result, list) else [result]:
        if not isinstance(each, Mapping):
            continue
        if merged := _read(Merged, each.get("merged")):
            yield f"merged model {merged.digest.short}", url_of(merged)
        if checkpoint := _read(Checkpoint, each.get("checkpoint")):
            yield checkpoint.ref, url_of(checkpoint)


def _read(kind: type[T], document: object) -> T | None:
    """A value out of a result; None where there is none, or an older version has written it another way."""
    try:
        return from_json(kind, document) if isinstance(document, Mapping) else None
    except InvalidInput:
        return None
