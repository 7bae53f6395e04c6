"""The job engine's side of a job: on PostgreSQL its tasks are handed to procrastinate within the transaction that writes the job's row.

procrastinate has a schema of its own in the same database. On SQLite there is no engine: there, the rows themselves are the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import make_url, text
from sqlalchemy.orm import Session

from registry.errors import MissingPackage

SCHEMA = "procrastinate"
# What a job is made of: the whole of it, one file of a merge, and what follows when all files are there.
RUN, SHARD, PUBLISH = "ckpt.run", "ckpt.shard", "ckpt.publish"
MERGE_QUEUE, JOBS_QUEUE = "merge", "jobs"
_PUBLISH_PRIORITY = 10  # the last step of a merge goes before the first of another


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of a job for a worker: `name` is what to do, `shard` the position of a file, `deaths` how many workers it has outlived."""

    name: str
    job: int
    shard: int | None = None
    deaths: int = 0

    @property
    def queue(self) -> str:
        """Where it waits."""
        return JOBS_QUEUE if self.name == RUN else MERGE_QUEUE

    @property
    def arguments(self) -> dict[str, Any]:
        """What the worker is told."""
        return {"job": self.job, "shard": self.shard, "deaths": self.deaths}


def hand_over(session: Session, tasks: Sequence[Task]) -> None:
    """Put tasks into the engine's queue; they are there when, and only when, the session's transaction is committed.

    Raises:
        MissingPackage: the engine is not installed.
    """
    connection = session.connection()
    if connection.dialect.name != "postgresql" or not tasks:
        return
    _see_engine(session)
    first, driver = tasks[0], connection.connection.driver_connection
    if first.name == PUBLISH:
        _hand_over_once(session, first, driver)
    else:
        deferrer = _app().configure_task(first.name, allow_unknown=True, queue=first.queue, connection=driver)
        deferrer.batch_defer(*(task.arguments for task in tasks))


def _hand_over_once(session: Session, task: Task, driver: Any) -> None:
    from procrastinate.exceptions import AlreadyEnqueued  # noqa: PLC0415 - as below

    deferrer = _app().configure_task(
        task.name,
        allow_unknown=True,
        queue=task.queue,
        priority=_PUBLISH_PRIORITY,
        queueing_lock=f"publish {task.job}",
        connection=driver,
    )
    with suppress(AlreadyEnqueued), session.begin_nested():
        deferrer.defer(**task.arguments)


@cache
def _app() -> Any:
    """The engine without a connection of its own."""
    try:
        from procrastinate import App, SyncPsycopgConnector  # noqa: PLC0415 - 0.2 s, and an embedded registry has none
    except ImportError as error:
        raise MissingPackage("procrastinate", "postgres") from error
    return App(connector=SyncPsycopgConnector())


def take_over(session: Session, silent_seconds: float) -> list[Task]:
    """Take tasks away from workers that have given no sign of life for so long, and put them into the queue again, as new ones.

    New ones, so that a worker that was only paused ends a task that nobody waits for, whatever it says when it comes back.
    """
    _see_engine(session)
    stalled = session.execute(text(f"{_STALLED} FOR UPDATE OF task SKIP LOCKED"), {"seconds": silent_seconds}).all()
    tasks = []
    for number, name, arguments in stalled:
        session.execute(text("SELECT procrastinate_finish_job_v1(:number, 'failed', true)"), {"number": number})
        deaths = int(arguments.get("deaths", 0)) + 1
        tasks.append(Task(name, int(arguments["job"]), arguments.get("shard"), deaths))
        hand_over(session, tasks[-1:])
    return tasks


def are_stalled(session: Session, silent_seconds: float) -> bool:
    """Whether there is anything to take over."""
    _see_engine(session)
    return session.execute(text(f"{_STALLED} LIMIT 1"), {"seconds": silent_seconds}).first() is not None


_STALLED = """
    SELECT task.id, task.task_name, task.args FROM procrastinate_jobs task
    LEFT JOIN procrastinate_workers worker ON worker.id = task.worker_id
    WHERE task.status = 'doing'
    AND (worker.id IS NULL OR worker.last_heartbeat < now() - make_interval(secs => :seconds))
"""


def _see_engine(session: Session) -> None:
    """Have the engine's names found, in this transaction."""
    session.execute(
        text("SELECT set_config('search_path', current_setting('search_path') || :more, true)"),
        {"more": f", {SCHEMA}"},
    )


def worker_app(url: str) -> Any:
    """The engine with connections of its own, for who does the tasks.

    Args:
        url: of the database, as SQLAlchemy takes it.
    """
    from procrastinate import App, PsycopgConnector  # noqa: PLC0415 - as above

    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    options = {"options": f"-c search_path={SCHEMA}", "application_name": "ckpt worker"}
    return App(connector=PsycopgConnector(conninfo=conninfo, kwargs=options, min_size=1, max_size=4))
