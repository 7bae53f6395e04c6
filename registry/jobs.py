"""Background work: what each kind of job does, and the threads that do it where one process has the registry to itself.

Where a team shares a database, `registry.worker` does the work.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import IO, Any, Protocol, Self, final

from registry.db.jobs import MERGE, Claim
from registry.disk import Translating
from registry.errors import BlobSwept, Cancelled, Conflict, InvalidInput, RegistryError, StorageFailed
from registry.failures import to_document
from registry.merging import merge
from registry.ordering import (
    CandidatesOrder,
    CombineOrder,
    ConvertOrder,
    DiffOrder,
    ExtractOrder,
    MergeOrder,
    VerifyBaseOrder,
    read_order,
)
from registry.service import Registry
from registry.teamwork import Job
from registry.webhooks import deliver_due
from registry.wording import explain
from registry.workspace import Progress, silent

log = logging.getLogger("ckpt.jobs")

MOST_TRIES = 5
_POLL_SECONDS = 0.2
_TELL_SECONDS = 0.5
_DELIVER_SECONDS = 1.0


class JobEngine(Protocol):
    """What does the jobs in the queue; where they come from, `registry.db.jobs.Jobs` knows."""

    def start(self) -> None:
        """Begin to take jobs. What a dead process of this kind has left is taken up again."""

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Take no more jobs, and end when those under way are done; what is not by then is given back to the queue."""


class TryLater(Exception):
    """A job that is not done, and is to be tried again after `seconds`."""

    def __init__(self, seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.seconds, self.reason = seconds, reason


class GivenBack(Exception):
    """Work that is left to somebody else: this process is ending, or the work is somebody else's already."""


# -- what each kind does


def run_job(
    registry: Registry, job: Job, progress: Progress = silent, should_stop: Callable[[], bool] = lambda: False
) -> object:
    """Do what a job is about, here and now.

    Args:
        registry: signs what is recorded with whoever asked.
        job: what to do.
        progress: told of the bytes that are done.
        should_stop: asked at each step.

    Returns:
        What the verb gives.

    Raises:
        Cancelled: it was told to stop.
        TryLater: it is not to be done now.
        RegistryError: what the verb raises.
    """

    def tell(what: str, done_bytes: int, total_bytes: int) -> None:
        if should_stop():
            raise Cancelled(f"job {job.id}")
        progress(what, done_bytes, total_bytes)

    return _VERBS[job.kind](registry, read_order(job.kind, job.arguments), tell)


def _merge(registry: Registry, order: MergeOrder, progress: Progress) -> object:
    inputs = [registry.resolve(each) for each in order.checkpoints]
    planned = registry.plan(*inputs, mixture=order.mixture, dtype=order.dtype, allow_lossy=order.allow_lossy)
    return merge(registry.workspace, planned, out=order.out, note=order.note, progress=progress)


def _combine(registry: Registry, order: CombineOrder, progress: Progress) -> object:
    inputs = [registry.resolve(each) for each in order.checkpoints]
    return registry.combine(*inputs, mixture=order.mixture, rank=order.rank, making=order.making, progress=progress)


def _candidates(registry: Registry, order: CandidatesOrder, progress: Progress) -> object:
    try:
        values = [Decimal(str(each)) for each in order.values]
    except InvalidOperation as error:
        raise InvalidInput("values", str(order.values), "expected decimal numbers") from error
    return registry.candidates(
        *(registry.resolve(each) for each in order.checkpoints),
        mixture=order.mixture,
        option=order.option,
        values=values,
        rank=order.rank,
        making=order.making,
        progress=progress,
    )


def _convert(registry: Registry, order: ConvertOrder, progress: Progress) -> object:
    from registry.rearranging import Wanted  # noqa: PLC0415 - most jobs convert nothing

    wanted = Wanted(layout=order.wanted.layout, name=order.wanted.name, base=order.wanted.base)
    return registry.convert(order.text, wanted, progress)


def _extract(registry: Registry, order: ExtractOrder, progress: Progress) -> object:
    from registry.extracting import Extract  # noqa: PLC0415 - it imports torch

    asked = order.wanted
    wanted = Extract(rank=asked.rank, modules=asked.modules, saved=asked.saved, dtype=asked.dtype, name=asked.name)
    return registry.extract(order.base, order.tuned, wanted, progress)


def _diff(registry: Registry, order: DiffOrder, progress: Progress) -> object:
    return registry.diff(registry.resolve(order.one), registry.resolve(order.other), progress)


def _verify_base(registry: Registry, order: VerifyBaseOrder, progress: Progress) -> object:
    return registry.verify_base(registry.base(order.base), progress)


_VERBS: Mapping[str, Callable[[Registry, Any, Progress], object]] = {
    MERGE: _merge,
    "combine": _combine,
    "candidates": _candidates,
    "convert": _convert,
    "extract": _extract,
    "diff": _diff,
    "verify_base": _verify_base,
}


# -- one claim


def is_passing(error: Exception) -> bool:
    """Whether the same may go well a little later: the store, the disk or the database did not answer as they should."""
    return isinstance(error, (StorageFailed, BlobSwept)) or (type(error) is Conflict and error.subject == "database")


def seconds_until_try(tries: int) -> float:
    """How long to wait after so many tries that failed: 2, 4, 8, 16 seconds."""
    return float(2**tries)


def error_document(error: Exception) -> Mapping[str, Any]:
    """An error as a job keeps it, foreseen or not."""
    if isinstance(error, RegistryError):
        return to_document(error)
    return {"code": "unforeseen", "message": f"{type(error).__name__}: {error}", "fields": {}}


def sentence(error: Exception) -> str:
    """An error for people, in one line."""
    text = explain(error).message if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}"
    return text.replace("\n", " ")


def worker_name() -> str:
    """What a process is called in logs: `machine:process`."""
    return f"{socket.gethostname()}:{os.getpid()}"


@final
class Attendant:
    """Keeps the record of claimed work while it is done: a context manager with a thread that writes progress down and sees when to stop.

    What is done asks `check` between its steps, and tells `advance`; neither waits for the database.
    """

    def __init__(
        self, registry: Registry, claim: Claim, is_ending: Callable[[], bool], every_seconds: float = _TELL_SECONDS
    ) -> None:
        self._registry, self.claim = registry, claim
        self._is_ending, self._every = is_ending, every_seconds
        self._what, self._done, self._total = "", 0, 0
        self._lock, self._over, self._is_lost = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._attend, name=f"job {claim.job}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def advance(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Take note of progress.

        Raises:
            GivenBack: the work is to stop here.
        """
        self.check()
        with self._lock:
            if what != self._what:
                self._what, self._done, self._total = what, 0, total_bytes
            self._done += done_bytes

    def check(self) -> None:
        """Stop when there is a reason to.

        Raises:
            GivenBack: the work is to stop here.
        """
        if self._is_lost.is_set() or self._is_ending():
            raise GivenBack

    def _attend(self) -> None:
        told = None
        while not self._over.wait(self._every):
            with self._lock:
                told, before = (self._what, self._done, self._total), told
            try:
                if not (self._tell(*told) if told != before else self._is_good()):
                    self._is_lost.set()
            except RegistryError as error:  # the database may come back before it matters
                log.warning("progress of job %s is not written: %s", self.claim.job, sentence(error))

    def _tell(self, what: str, done_bytes: int, total_bytes: int) -> bool:
        with self._registry.workspace.writing() as change:
            return change.catalog.jobs.tell(self.claim, what, done_bytes, total_bytes)

    def _is_good(self) -> bool:
        with self._registry.workspace.reading() as catalog:
            return catalog.jobs.is_wanted(self.claim)


def settle(registry: Registry, claim: Claim, work: Callable[[], object], tries: int, name: str) -> None:
    """Do claimed work, and write down how it ended, unless that is for `work` to do itself (then it gives None).

    Args:
        registry: whose job it is.
        claim: what was taken.
        work: does it; what it gives is the job's result, `DONE` where the result is recorded.
        tries: how often it was tried before.
        name: who does it, for the log.

    Raises:
        TryLater: it is back in the queue, to be taken again after a time.
    """
    try:
        result = work()
        if result is not DONE:
            with registry.workspace.writing() as change:
                change.catalog.jobs.finish(claim, result)
    except (GivenBack, Cancelled):
        with registry.workspace.writing() as change:
            is_queued = change.catalog.jobs.let_go(claim, f"given back by {name}")
        if is_queued:
            raise TryLater(0.0, "given back") from None
    except TryLater as later:
        _put_back(registry, claim, later)
        raise
    except Exception as error:  # the worker loop: whatever it is, the job has to end
        if is_passing(error) and tries + 1 < MOST_TRIES:
            again = TryLater(seconds_until_try(tries + 1), sentence(error))
            _put_back(registry, claim, again)
            raise again from error
        log.error("job %s failed: %s", claim.job, sentence(error), exc_info=not isinstance(error, RegistryError))
        with registry.workspace.writing() as change:
            change.catalog.jobs.fail(claim, error_document(error), sentence(error))


DONE = object()


def _put_back(registry: Registry, claim: Claim, later: TryLater) -> None:
    with registry.workspace.writing() as change:
        change.catalog.jobs.give_back(claim, f"tried again in {later.seconds:.0f} s, because: {later.reason}")


# -- one process


@final
class InlineEngine:
    """Does the jobs of a registry that this process has to itself, in threads: one job after the other, and webhooks beside them.

    Of several processes with one registry, one does the jobs, under a lock in the registry's home; when it ends, another takes over.
    """

    def __init__(self, registry: Registry, *, poll_seconds: float = _POLL_SECONDS) -> None:
        self._registry, self._poll = registry, poll_seconds
        self._name = worker_name()
        self._is_stopping, self._is_ending = threading.Event(), threading.Event()
        self._tries: dict[int, int] = {}
        self._not_before: dict[int, float] = {}
        self._threads: list[threading.Thread] = []
        self._lock: IO[bytes] | None = None

    def start(self) -> None:
        """Begin to take jobs, once no other process does."""
        self._threads = [threading.Thread(target=self._wait_for_turn, name="jobs", daemon=True)]
        self._threads[0].start()

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Take no more; what is not done after the grace is put back into the queue at its next step."""
        self._is_stopping.set()
        end = time.monotonic() + grace_seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._is_ending.set()
        for thread in self._threads:
            thread.join()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _wait_for_turn(self) -> None:
        while self._lock is None:
            self._lock = self._take_lock()
            if self._lock is None and self._is_stopping.wait(self._poll):
                return
        self._guarded(self._take_up)
        beside = threading.Thread(
            target=self._loop, args=(self._deliver, _DELIVER_SECONDS), name="webhooks", daemon=True
        )
        beside.start()
        self._threads.append(beside)  # for who stops it: only what has begun can be waited for
        self._loop(self._do_next, self._poll)

    def _take_lock(self) -> IO[bytes] | None:
        path = self._registry.settings.home / "jobs.lock"
        with Translating(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def _take_up(self) -> bool:
        """What a dead process was at goes on."""
        with self._registry.workspace.writing() as change:
            return change.catalog.jobs.take_back_all("taken up again: nobody is at it any more") > 0

    def _loop(self, step: Callable[[], bool], pause_seconds: float) -> None:
        while not self._is_stopping.is_set():
            if not self._guarded(step):
                self._is_stopping.wait(pause_seconds)

    def _guarded(self, step: Callable[[], bool]) -> bool:
        """Whether there was something to do; a database that does not answer must not end the thread."""
        try:
            return step()
        except RegistryError as error:
            log.warning("the queue cannot be read: %s", sentence(error))
            return False

    def _deliver(self) -> bool:
        return deliver_due(self._registry.workspace) > 0

    def _do_next(self) -> bool:
        now, claim = time.monotonic(), None
        waiting = [number for number, at in self._not_before.items() if at > now]
        with self._registry.workspace.reading() as catalog:
            if catalog.jobs.next(waiting) is None:
                # No job is under way here: the end of one that seems to be could not be written down
                return bool(catalog.jobs.all("running", 1)) and self._take_up()
        with self._registry.workspace.writing() as change:
            jobs = change.catalog.jobs
            if number := jobs.next(waiting):
                claim, job = jobs.claim(number, self._name), jobs.find(number)
        if claim is None:
            return False
        self._do(claim, job)
        return True

    def _do(self, claim: Claim, job: Job) -> None:
        registry, tries = self._registry.signed_by(job.author), self._tries.get(job.id, 0)
        with Attendant(registry, claim, self._is_ending.is_set) as attendant:
            try:
                settle(registry, claim, lambda: run_job(registry, job, attendant.advance), tries, self._name)
                self._tries.pop(job.id, None)
                self._not_before.pop(job.id, None)
            except TryLater as later:
                self._tries[job.id], self._not_before[job.id] = tries + 1, time.monotonic() + later.seconds
