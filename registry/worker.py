"""A worker: a process that does the jobs of a team's registry, on any machine that reaches the database and the store.

The engine hands out tasks and notices when a worker is gone; what a job is, where it stands and whose it is, is in the registry's own rows.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

from registry.db.jobs import Claim
from registry.db.tasks import JOBS_QUEUE, MERGE_QUEUE, PUBLISH, RUN, SHARD, worker_app
from registry.errors import Conflict, InvalidInput, InvalidSetting, RegistryError
from registry.jobs import DONE, Attendant, GivenBack, TryLater, run_job, sentence, settle, worker_name
from registry.service import Registry
from registry.shards import Plans, publish, write_shard
from registry.teamwork import Job
from registry.webhooks import deliver_due

if TYPE_CHECKING:
    from procrastinate import JobContext

log = logging.getLogger("ckpt.worker")

QUEUES = (MERGE_QUEUE, JOBS_QUEUE)
# A task whose workers die again and again may be what kills them.
MOST_DEATHS = 20
_MOST_ROUNDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often a worker does what it does by the clock, in seconds.

    `heartbeat`: gives a sign of life. `silent`: after so long without one, a worker's work is taken over. `tell`: looks whether a job is still
    wanted. `poll`: looks for work that nobody told it of. `deliver`: looks for messages to webhooks. `recover`: waits after the database failed.
    """

    heartbeat: float = 5.0
    silent: float = 20.0
    tell: float = 0.5
    poll: float = 1.0
    deliver: float = 1.0
    recover: float = 2.0


@final
class Worker:
    """Does the jobs of a registry until it is told to stop.

    Args:
        registry: a team's.
        concurrency: how many tasks at once.
        queues: which tasks, of `QUEUES`.
        grace_seconds: how long a task may still take once the worker is to stop; then it is given back.
        pace: for tests.

    Raises:
        InvalidInput: an unknown queue, or no task at all at once.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        concurrency: int = 1,
        queues: tuple[str, ...] = QUEUES,
        grace_seconds: float = 30.0,
        pace: Pace | None = None,
    ) -> None:
        if concurrency < 1:
            raise InvalidInput("concurrency", concurrency, "expected at least 1")
        if not queues or not set(queues) <= set(QUEUES):
            raise InvalidInput("queues", ",".join(queues), f"one or more of {', '.join(QUEUES)}")
        self._registry, self._concurrency, self._queues = registry, concurrency, queues
        self._grace, self._pace = grace_seconds, pace or Pace()
        self._threads = max(1, (os.cpu_count() or 1) // concurrency)
        self._name, self._plans = worker_name(), Plans()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._is_over = False
        self._number: int | None = None  # the engine's own, once a task was done

    def check(self) -> None:
        """See that there is work to be done for this registry, and that it can be.

        Raises:
            InvalidSetting: the registry is one process's own, or its store is not good enough for several.
            MissingPackage: the engine is not installed.
            DatabaseVersion, StorageFailed: the database or the store is not ready.
        """
        settings = self._registry.settings
        if not settings.is_shared:
            raise InvalidSetting(
                "database_url",
                settings.database_url,
                "workers need PostgreSQL; with SQLite, `ckpt serve` does the jobs",
            )
        self._registry.jobs(limit=1)
        for finding in self._registry.workspace.store.probe():
            log.warning("the store: %s", finding)

    def run(self) -> None:
        """Work until `stop` is called; a database or store that fails for a while is waited for.

        Raises:
            as `check`.
        """
        self.check()
        asyncio.run(self._serve())

    def stop(self) -> None:
        """Take no more tasks, finish those under way within the grace, and give back the rest. Any thread or signal handler may call it."""
        self._is_over = True  # for a worker that has not begun yet
        if self._loop is not None and self._stopping is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(_log_stray)
        if self._is_over:
            return
        self._loop.set_default_executor(ThreadPoolExecutor(self._concurrency + 4, thread_name_prefix="task"))
        log.info("started: %d at once, queues %s", self._concurrency, ", ".join(self._queues))
        beside = [
            asyncio.create_task(self._every(self._pace.silent / 4, self._take_over)),
            asyncio.create_task(self._every(self._pace.deliver, self._deliver)),
        ]
        while not self._stopping.is_set():
            await self._work_until_stopped()
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        log.info("stopped")

    async def _work_until_stopped(self) -> None:
        """Work for as long as the database answers."""
        from procrastinate.exceptions import ProcrastinateException  # noqa: PLC0415 - only workers have it

        app = self._app()
        try:
            async with app.open_async():
                await self._until_stopped(app)
        except (ProcrastinateException, OSError, _pool_timeout()) as error:
            log.warning("the database does not answer: %s", _cause(error))
            await _first(self._stopped(), asyncio.sleep(self._pace.recover))

    def _engine(self, app: Any) -> Awaitable[None]:
        run: Awaitable[None] = app.run_worker_async(
            queues=list(self._queues),
            name=self._name,
            concurrency=self._concurrency,
            fetch_job_polling_interval=self._pace.poll,
            shutdown_graceful_timeout=self._grace,
            delete_jobs="always",  # what became of them is in the registry's rows
            install_signal_handlers=False,
            update_heartbeat_interval=self._pace.heartbeat,
            stalled_worker_timeout=self._pace.silent,
        )
        return run

    async def _until_stopped(self, app: Any) -> None:
        working = asyncio.ensure_future(self._engine(app))
        stopped = asyncio.ensure_future(self._stopped())
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not working.done():
            log.info("stopping: what is under way has %.0f s", self._grace)
            working.cancel()
            beating = asyncio.create_task(self._beat(app))
            await asyncio.wait([working])
            beating.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if not working.cancelled() and (error := working.exception()) is not None:
            raise error

    async def _beat(self, app: Any) -> None:
        """Give signs of life while the last tasks are finished: the engine itself gives none from the moment it is to stop."""
        while self._number is not None:
            await app.job_manager.update_heartbeat(self._number)
            await asyncio.sleep(self._pace.heartbeat)

    async def _stopped(self) -> None:
        assert self._stopping is not None  # noqa: S101 - it is made first of all
        await self._stopping.wait()

    async def _every(self, seconds: float, step: Callable[[], object]) -> None:
        """Do something again and again, in a thread; a database that fails is tried again."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(step)
            except RegistryError as error:
                log.warning("%s", sentence(error))

    def _take_over(self) -> None:
        workspace, silent = self._registry.workspace, self._pace.silent
        with workspace.reading() as catalog:
            if not catalog.jobs.are_stalled(silent):
                return
        with workspace.writing() as change:
            if number := change.catalog.jobs.take_over(silent):
                log.warning("%d tasks of workers that are gone are back in the queue", number)

    def _deliver(self) -> None:
        deliver_due(self._registry.workspace)

    # -- tasks

    def _app(self) -> Any:
        app = worker_app(self._registry.settings.database_url)
        for name, body in ((RUN, self._run), (SHARD, self._shard), (PUBLISH, self._publish)):
            app.task(name=name, pass_context=True, retry=_retries())(partial(self._task, body))
        return app

    def _task(
        self,
        body: Callable[[Registry, Job, Claim, Attendant], object],
        context: JobContext,
        job: int,
        shard: int | None = None,
        deaths: int = 0,
    ) -> None:
        """Claim what the engine hands out, and do it."""
        self._number = context.job.worker_id
        with self._registry.workspace.writing() as change:
            claim = change.catalog.jobs.claim(job, self._name, shard)
            if claim is None:
                return
            found = change.catalog.jobs.find(job)
        registry, extra = self._registry.signed_by(found.author), {"job": job}
        what = found.kind if shard is None else f"{found.kind} {found.shards[shard].path}"
        log.info("%s: claimed", what, extra=extra)
        with Attendant(registry, claim, context.should_abort, self._pace.tell) as attendant:
            settle(
                registry,
                claim,
                lambda: _unless_deadly(deaths, lambda: body(registry, found, claim, attendant)),
                context.job.attempts,
                self._name,
            )
        log.info("%s: done with it", what, extra=extra)

    def _run(self, registry: Registry, job: Job, claim: Claim, attendant: Attendant) -> object:
        del claim
        return run_job(registry, job, attendant.advance)

    def _shard(self, registry: Registry, job: Job, claim: Claim, attendant: Attendant) -> object:
        if not write_shard(registry, job, claim, self._plans, attendant.advance, self._threads):
            raise GivenBack
        return DONE

    def _publish(self, registry: Registry, job: Job, claim: Claim, attendant: Attendant) -> object:
        attendant.check()
        publish(registry, job, claim, self._plans)
        return DONE


def _unless_deadly(deaths: int, work: Callable[[], object]) -> object:
    if deaths >= MOST_DEATHS:
        raise Conflict("job", f"{deaths} workers have died while they were at it")
    return work()


def _retries() -> Any:
    """When the engine hands a task out again: when that was asked for, and when the database did not take down how the task ended."""
    from procrastinate import BaseRetryStrategy, RetryDecision  # noqa: PLC0415 - only workers have it

    class Retries(BaseRetryStrategy):
        def get_retry_decision(self, *, exception: BaseException, job: Any) -> RetryDecision | None:
            if isinstance(exception, TryLater):
                return RetryDecision(retry_in={"milliseconds": int(exception.seconds * 1000)})
            return RetryDecision(retry_in={"seconds": 2}) if job.attempts < _MOST_ROUNDS else None

    return Retries()


def _pool_timeout() -> type[Exception]:
    from psycopg_pool import PoolTimeout  # noqa: PLC0415 - only workers have it

    return PoolTimeout


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0]


async def _first(*awaited: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(each) for each in awaited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Errors that nobody waits for: a task that was taken over cannot be ended by the one that had it before."""
    del loop
    error = context.get("exception")
    log.info("%s: %s", context.get("message"), _cause(error) if error else "")
