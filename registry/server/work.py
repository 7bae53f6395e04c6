"""Routes of background work."""

from __future__ import annotations

from typing import Annotated, Any

from registry.errors import InvalidInput, NotFound
from registry.ordering import prepared
from registry.server.bases import refuse_place
from registry.server.bodies import NewJob
from registry.server.routing import Later, Routes
from registry.server.scope import Scope, names_in
from registry.teamwork import Job, JobLine, Role

routes = Routes("jobs")
Number = Annotated[int, "A job's number.", range(1, 1 << 31)]
# Where the arguments of a kind say what its result is called.
_NAMED_IN = {
    "combine": ("making", "adapter"),
    "candidates": ("making", "adapter"),
    "convert": ("wanted", "name"),
    "extract": ("wanted", "name"),
}


@routes.route("POST", "/jobs", Role.WRITER, is_keyed=True, status=202)
def start_job(scope: Scope, body: NewJob) -> Later[Job]:
    """Have something done in the background: merge, combine, candidates, convert, extract, diff or verify_base."""
    refuse_place(scope, body.arguments.get("out"))
    if scope.namespaces:
        _check_names(scope, body)
    return Later(prepared(scope.registry.workspace, scope.registry, body.kind, body.arguments, body.subject))


def _check_names(scope: Scope, body: NewJob) -> None:
    for name in names_in(body.kind, dict(body.arguments)):
        try:
            scope.subject(name)
        except NotFound:
            if name not in {base.name for base in scope.registry.bases()}:
                raise
    if body.kind in _NAMED_IN:
        scope.may_change(_result_name(body))


def _result_name(body: NewJob) -> str:
    outer, inner = _NAMED_IN[body.kind]
    inside: Any = body.arguments.get(outer)
    name = inside.get(inner) if isinstance(inside, dict) else None
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"{outer}.{inner}", "", "say what the result is called, within your namespaces")
    return name


@routes.route("GET", "/jobs", Role.READER)
def list_jobs(
    scope: Scope,
    state: Annotated[str, "Only those queued, running, succeeded, failed or cancelled."] = "",
    limit: Annotated[int, "The last so many.", range(1, 1001)] = 50,
) -> list[Job]:
    """The last jobs, the newest first."""
    return scope.last(lambda count: scope.registry.jobs(state, count), scope.sees_job, limit)[:limit]


@routes.route("GET", "/jobs/{number}", Role.READER)
def get_job(scope: Scope, number: Number) -> Job:
    """A job: where it stands."""
    return scope.job(number)


@routes.route("GET", "/jobs/{number}/log", Role.READER)
def list_job_log(scope: Scope, number: Number) -> list[JobLine]:
    """What a job went through, oldest first."""
    return scope.registry.job_log(scope.job(number).id)


@routes.route("POST", "/jobs/{number}/cancel", Role.WRITER, is_keyed=True)
def cancel_job(scope: Scope, number: Number) -> Job:
    """Stop a job. What is finished of it is kept."""
    return scope.registry.cancel_job(scope.job(number).id)


@routes.route("POST", "/jobs/{number}/retry", Role.WRITER, is_keyed=True)
def retry_job(scope: Scope, number: Number) -> Job:
    """Try a job again that failed or was cancelled."""
    return scope.registry.retry_job(scope.job(number).id)
