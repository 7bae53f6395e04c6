"""Background work: the rows of jobs, of the files that workers share, and of their logs.

Everything that changes here is called within a writing transaction, and those queue: what a method finds still holds when it writes. A job,
or a file of one, belongs to whoever claimed it last; what an earlier one says is refused by its `attempt`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, final

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from registry.codec import from_json, plain
from registry.db.tables import LINE_LENGTH, TEXT_LENGTH, URL_LENGTH, JobLineRow, JobRow, ShardRow
from registry.db.tasks import PUBLISH, RUN, SHARD, Task, are_stalled, hand_over, take_over
from registry.errors import Conflict, UnknownJob
from registry.manifest import FileEntry, TensorRecord, utc_now
from registry.teamwork import Job, JobLine, JobState, Shard

MERGE = "merge"
_FINISHED = "finished"
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Claim:
    """Work that somebody has taken: a whole job, or the file at position `shard`. A later claim of the same has a greater `attempt`."""

    job: int
    attempt: int
    shard: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished file of a merge. `largest_delta` is the largest change of one element in it."""

    entry: FileEntry
    records: tuple[TensorRecord, ...]
    largest_delta: float


@final
class Jobs:
    """The jobs, by their numbers."""

    def __init__(self, session: Session) -> None:
        self._session = session

    # -- read

    def find(self, number: int) -> Job:
        """A job, with the files that it is divided into.

        Raises:
            UnknownJob: there is none of this number.
        """
        row = self._row(number)
        return _value(row, self._shards([row.id])[row.id])

    def all(self, state: str = "", limit: int | None = None) -> list[Job]:
        """The last jobs (in one state), the newest first."""
        statement = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        rows = list(self._session.scalars(statement.where(JobRow.state == state) if state else statement))
        shards = self._shards([row.id for row in rows])
        return [_value(row, shards[row.id]) for row in rows]

    def merge_under_way(self, recipe: str) -> Job | None:
        """The unfinished job that merges a recipe (by the hex digits of its digest) into the store, if there is one."""
        unfinished = select(JobRow).where(JobRow.kind == MERGE, JobRow.state.in_(("queued", "running")))
        for row in self._session.scalars(unfinished.order_by(JobRow.id)):
            if row.arguments.get("recipe") == recipe and not row.is_cancel_wanted:
                return self.find(row.id)
        return None

    def lines(self, number: int) -> list[JobLine]:
        """A job's log, oldest first."""
        self._row(number)
        rows = self._session.scalars(select(JobLineRow).where(JobLineRow.job_id == number).order_by(JobLineRow.id))
        return [JobLine(at=row.at, text=row.text) for row in rows]

    def written(self, number: int) -> list[Written]:
        """What was written of a job's files, in their order; those that are not finished are left out."""
        return [_written(row) for row in self._shard_rows([number]) if row.state == _FINISHED]

    def count(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        counted = select(JobRow.state, func.count()).group_by(JobRow.state)
        return {state: number for state, number in self._session.execute(counted)}  # noqa: C416 - rows are no pairs

    # -- start and stop

    def add(
        self,
        kind: str,
        subject: str,
        arguments: Mapping[str, Any],
        *,
        author: str,
        total_bytes: int = 0,
        files: Sequence[tuple[str, int]] = (),
    ) -> Job:
        """Put a job into the queue. Workers see it when the transaction is committed.

        Args:
            kind: the verb.
            subject: what it is about, for people.
            arguments: everything that the verb follows from, as plain JSON.
            author: who wants it.
            total_bytes: what progress is measured by; 0 when that is not known yet.
            files: path and size in bytes of each file that is a task of its own; none where the job is one task.
        """
        row = self._insert(kind, subject, arguments, author, total_bytes or sum(size for _, size in files))
        for position, (path, size_bytes) in enumerate(files):
            self._session.add(
                ShardRow(job_id=row.id, position=position, path=path, size_bytes=size_bytes, state="queued", attempt=0,
                         worker="", done_bytes=0)
            )  # fmt: skip
        self._session.flush()
        self._hand_over(row)
        return self.find(row.id)

    def add_finished(
        self, kind: str, subject: str, arguments: Mapping[str, Any], result: object, *, author: str, total_bytes: int
    ) -> Job:
        """Record a job whose result was there already."""
        row = self._insert(kind, subject, arguments, author, total_bytes)
        row.state, row.started_at, row.finished_at = "succeeded", row.created_at, row.created_at
        row.done_bytes, row.result = total_bytes, plain(result)
        self.say(row.id, "the result was there already")
        return self.find(row.id)

    def _insert(self, kind: str, subject: str, arguments: Mapping[str, Any], author: str, total_bytes: int) -> JobRow:
        row = JobRow(
            kind=kind, subject=subject[:URL_LENGTH], arguments=plain(arguments), state="queued", what="", done_bytes=0,
            total_bytes=total_bytes, attempts=0, is_cancel_wanted=False, author=author, created_at=self.now(),
        )  # fmt: skip
        self._session.add(row)
        self._session.flush()
        return row

    def _hand_over(self, row: JobRow) -> None:
        """Give the engine what is left to do."""
        shards = self._shard_rows([row.id])
        left = [Task(SHARD, row.id, shard.position) for shard in shards if shard.state != _FINISHED]
        if not shards:
            left = [Task(RUN, row.id)]
        hand_over(self._session, left or [Task(PUBLISH, row.id)])

    def cancel(self, number: int, who: str) -> Job:
        """Stop a job. One that is a single task under way ends when its worker notices; every other one at once.

        Raises:
            UnknownJob: there is none of this number.
            Conflict: it is over.
        """
        row = self._row(number)
        if JobState(row.state).is_over:
            raise Conflict(f"job {number}", _standing(row.state))
        self.say(number, f"cancelled by {who}")
        row.is_cancel_wanted = True
        if row.state == "queued" or self._shard_rows([number]):
            self._end(row, "cancelled")
        return self.find(number)

    def retry(self, number: int, who: str) -> Job:
        """Put a job that failed or was cancelled into the queue again; files that are finished are kept.

        Raises:
            UnknownJob: there is none of this number.
            Conflict: it neither failed nor was cancelled.
        """
        row = self._row(number)
        if row.state not in ("failed", "cancelled"):
            reason = f"{_standing(row.state)}: only what failed or was cancelled can be tried again"
            raise Conflict(f"job {number}", reason)
        self.say(number, f"to be tried again, says {who}")
        self._requeue(row)
        row.error, row.is_cancel_wanted, row.finished_at = None, False, None
        self._session.flush()
        self._hand_over(row)
        return self.find(number)

    def redo(self, number: int, paths: Sequence[str]) -> None:
        """Write files of a job again that were finished and are gone."""
        row = self._row(number)
        for shard in self._shard_rows([number]):
            if shard.path in paths:
                shard.state = "queued"
        self.say(number, f"to be written again, for the store does not have it: {', '.join(paths)}")
        self._requeue(row)
        self._session.flush()
        self._hand_over(row)

    def _requeue(self, row: JobRow) -> None:
        row.state, row.what, row.done_bytes = "queued", "", 0
        for shard in self._shard_rows([row.id]):
            if shard.state != _FINISHED:
                shard.state, shard.done_bytes = "queued", 0

    # -- work

    def claim(self, number: int, worker: str, shard: int | None = None) -> Claim | None:
        """Take a job, or one file of it; whoever had it before is shut out. None when there is nothing left to do."""
        row = self._session.get(JobRow, number)
        if row is None or JobState(row.state).is_over:
            return None
        if row.is_cancel_wanted:
            self._end(row, "cancelled")
            return None
        part: JobRow | ShardRow = row
        if shard is not None:
            part = self._shard_row(number, shard)
            if part.state == _FINISHED:
                return None
        self._tell_claim(row, part, worker)
        row.state, row.started_at = "running", row.started_at or self.now()
        if isinstance(part, ShardRow):
            part.state, part.worker, part.done_bytes = "running", worker, 0
            part.attempt += 1
            return Claim(number, part.attempt, shard)
        row.attempts += 1
        return Claim(number, row.attempts)

    def _tell_claim(self, row: JobRow, part: JobRow | ShardRow, worker: str) -> None:
        if isinstance(part, ShardRow):
            is_taken_over = part.state == "running"
            after = f"taken over by {worker} from {part.worker}" if is_taken_over else f"claimed by {worker}"
            self.say(row.id, f"{part.path}: {after}")
        elif self._shard_rows([row.id]):
            self.say(row.id, f"all files are there; {worker} puts the model together")
        else:
            self.say(row.id, f"{'taken over' if row.state == 'running' else 'claimed'} by {worker}")

    def next(self, but: Sequence[int] = ()) -> int | None:
        """The number of the oldest job in the queue, other than some."""
        queued = select(JobRow.id).where(JobRow.state == "queued", JobRow.id.not_in(but))
        return self._session.scalar(queued.order_by(JobRow.id).limit(1))

    def holds(self, claim: Claim) -> bool:
        """Whether a claim is still good: nobody has taken the work since, and the job is not over."""
        row = self._session.get(JobRow, claim.job)
        if row is None or row.state != "running":
            return False
        if claim.shard is None:
            return row.attempts == claim.attempt
        shard = self._shard_row(claim.job, claim.shard)
        return shard.state == "running" and shard.attempt == claim.attempt

    def is_wanted(self, claim: Claim) -> bool:
        """Whether a claim is good, and nobody wants the job cancelled."""
        return self.holds(claim) and not self._row(claim.job).is_cancel_wanted

    def tell(self, claim: Claim, what: str, done_bytes: int, total_bytes: int) -> bool:
        """Write down progress. False when the work is to stop: it belongs to somebody else, is over, or somebody wants it cancelled."""
        if not self.holds(claim):
            return False
        row = self._row(claim.job)
        if claim.shard is None:
            row.what, row.total_bytes = what[:LINE_LENGTH], total_bytes or row.total_bytes
            if not self._shard_rows([claim.job]):
                row.done_bytes = done_bytes
        else:
            row.what = what[:LINE_LENGTH]
            self._shard_row(claim.job, claim.shard).done_bytes = done_bytes
        return not row.is_cancel_wanted

    def let_go(self, claim: Claim, why: str) -> bool:
        """Leave work that is not finished: a job that is to be cancelled ends with that, any other goes back into the queue.

        Returns:
            Whether it is back in the queue; a claim that is not good any more changes nothing.
        """
        if self.holds(claim) and self._row(claim.job).is_cancel_wanted:
            self._end(self._row(claim.job), "cancelled")
            return False
        return self.give_back(claim, why)

    def give_back(self, claim: Claim, why: str) -> bool:
        """Put work back that is not finished; False, and nothing happens, when it belongs to somebody else by now."""
        if not self.holds(claim):
            return False
        row = self._row(claim.job)
        if claim.shard is None:
            row.state = "queued"
            self.say(claim.job, why)
        else:
            shard = self._shard_row(claim.job, claim.shard)
            shard.state, shard.done_bytes = "queued", 0
            self.say(claim.job, f"{shard.path}: {why}")
        return True

    def take_back_all(self, why: str) -> int:
        """Put every job back that is under way, and say how many that were: for when nobody can be at it any more."""
        rows = list(self._session.scalars(select(JobRow).where(JobRow.state == "running")))
        for row in rows:
            row.state = "queued"
            self.say(row.id, why)
        return len(rows)

    def are_stalled(self, silent_seconds: float) -> bool:
        """Whether a worker that gives no sign of life still has work."""
        return are_stalled(self._session, silent_seconds)

    def take_over(self, silent_seconds: float) -> int:
        """Put the work of workers that give no sign of life back into the queue, and say how many tasks that were."""
        tasks = take_over(self._session, silent_seconds)
        for task in tasks:
            row = self._session.get(JobRow, task.job)
            if row is not None and not JobState(row.state).is_over:
                self.say(
                    task.job,
                    f"{self._whose(task)} has given no sign of life for {silent_seconds:.0f} s: back in the queue",
                )
        return len(tasks)

    def _whose(self, task: Task) -> str:
        if task.shard is None:
            return "the worker"
        shard = self._shard_row(task.job, task.shard)
        return f"{shard.path}: {shard.worker or 'the worker'}"

    def finish_shard(self, claim: Claim, written: Written) -> bool:
        """Record a finished file; False when the claim is not good any more. With the last file, the job's end is put into the queue."""
        if claim.shard is None or not self.holds(claim):
            return False
        shard = self._shard_row(claim.job, claim.shard)
        shard.state, shard.done_bytes = _FINISHED, shard.size_bytes
        shard.entry = plain(written.entry)
        shard.records = {"largest_delta": plain(written.largest_delta), "tensors": plain(written.records)}
        self._session.flush()
        self.say(claim.job, f"{shard.path}: finished by {shard.worker}")
        if all(each.state == _FINISHED for each in self._shard_rows([claim.job])):
            hand_over(self._session, [Task(PUBLISH, claim.job)])
        return True

    def finish(self, claim: Claim, result: object) -> bool:
        """The job has done what was wanted. False when the claim is not good any more."""
        if not self.holds(claim):
            return False
        row = self._row(claim.job)
        row.result, row.done_bytes = plain(result), row.total_bytes
        self.say(claim.job, "finished")
        self._end(row, "succeeded")
        return True

    def fail(self, claim: Claim, error: Mapping[str, Any], text: str) -> bool:
        """The job cannot be done. False when the claim is not good any more.

        Args:
            error: what is the matter, as `registry.failures.to_document` writes it.
            text: the same for people.
        """
        if not self.holds(claim):
            return False
        row = self._row(claim.job)
        row.error = plain(error)
        self.say(claim.job, f"failed: {text}")
        self._end(row, "failed")
        return True

    def _end(self, row: JobRow, state: str) -> None:
        row.state, row.finished_at = state, self.now()
        unfinished = update(ShardRow).where(ShardRow.job_id == row.id, ShardRow.state == "running")
        self._session.execute(unfinished.values(state="queued"), execution_options={"synchronize_session": "fetch"})
        self._session.flush()

    def say(self, number: int, text: str) -> None:
        """Add a line to a job's log."""
        self._session.add(JobLineRow(job_id=number, at=self.now(), text=text[:TEXT_LENGTH]))
        self._session.flush()

    def now(self) -> datetime:
        """The present, by the database's clock."""
        if self._session.get_bind().dialect.name != "postgresql":
            return utc_now()  # its clock is this machine's
        found: datetime = self._session.scalar(select(func.clock_timestamp()))  # type: ignore[assignment]
        return found

    def _row(self, number: int) -> JobRow:
        row = self._session.get(JobRow, number) if 0 < number <= _LARGEST_ID else None
        if row is None:
            raise UnknownJob(str(number))
        return row

    def _shard_row(self, number: int, position: int) -> ShardRow:
        row = self._session.get(ShardRow, (number, position))
        if row is None:
            raise UnknownJob(f"{number}, file {position}")
        return row

    def _shard_rows(self, numbers: Sequence[int]) -> list[ShardRow]:
        statement = select(ShardRow).where(ShardRow.job_id.in_(numbers)).order_by(ShardRow.job_id, ShardRow.position)
        return list(self._session.scalars(statement)) if numbers else []

    def _shards(self, numbers: Sequence[int]) -> Mapping[int, tuple[Shard, ...]]:
        found = defaultdict[int, tuple[Shard, ...]](tuple)
        for row in self._shard_rows(numbers):
            found[row.job_id] += (_shard(row),)
        return found


def _standing(state: str) -> str:
    return f"it has {state}" if state in ("succeeded", "failed") else f"it is {state}"


def _shard(row: ShardRow) -> Shard:
    return Shard(
        position=row.position,
        path=row.path,
        size_bytes=row.size_bytes,
        state=row.state,
        attempt=row.attempt,
        worker=row.worker,
        done_bytes=row.done_bytes,
    )


def _written(row: ShardRow) -> Written:
    found = row.records or {}
    return Written(
        entry=from_json(FileEntry, row.entry),
        records=tuple(from_json(TensorRecord, each) for each in found["tensors"]),
        largest_delta=from_json(float, found["largest_delta"]),
    )


def _value(row: JobRow, shards: tuple[Shard, ...]) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,
        subject=row.subject,
        arguments=row.arguments,
        state=JobState(row.state),
        what=row.what,
        done_bytes=sum(shard.done_bytes for shard in shards) if shards else row.done_bytes,
        total_bytes=row.total_bytes,
        result=row.result,
        error=row.error,
        attempts=row.attempts,
        is_cancel_wanted=row.is_cancel_wanted,
        author=row.author,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        shards=shards,
    )
