"""`ckpt jobs …`, `ckpt worker`: work in the background, and who does it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from cli import output
from cli.options import Json
from registry import connect
from registry.errors import RegistryError
from registry.failures import from_document
from registry.teamwork import Job, JobState

jobs_app = typer.Typer(no_args_is_help=True, help="See what is done in the background, stop it, try it again.")

Number = Annotated[int, typer.Argument(metavar="ID", help="A job's number.")]
Seconds = Annotated[float, typer.Option(hidden=True)]


@jobs_app.command("list")
def list_(
    state: Annotated[
        str, typer.Option("--state", metavar="STATE", help="queued, running, succeeded, failed or cancelled.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="The most to show.")] = 50,
    json: Json = False,
) -> None:
    """The last jobs, the newest first."""
    with connect() as registry:
        found = registry.jobs(state, limit)
    if json:
        output.print_json([_document(job) for job in found])
        return
    rows = [
        [str(job.id), job.kind, job.subject, job.state.value, _progress(job), job.author, output.ago(job.created_at)]
        for job in found
    ]
    output.print_table(["id", "kind", "of", "state", "done", "by", "asked for"], rows, right=["id", "done"])


@jobs_app.command("show")
def show(
    number: Number,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait until it is over, with its progress.")] = False,
    json: Json = False,
) -> None:
    """A job: where it stands, and the files that workers share. With --follow, it fails as the job does."""
    with connect() as registry:
        if follow:
            with output.progress() as progress:
                registry.follow_job(number, progress)
        job = registry.job(number)
    if json:
        output.print_json(_document(job))
        return
    _print_job(job)


def _print_job(job: Job) -> None:
    output.print_facts(
        {
            "job": f"{job.id}: {job.kind} of {job.subject}",
            "state": job.state.value + (", to be cancelled" if job.is_cancel_wanted and not job.state.is_over else ""),
            "done": _progress(job),
            "asked for": f"{output.when(job.created_at)} by {job.author}",
            "started": output.when(job.started_at) if job.started_at else "",
            "ended": output.when(job.finished_at) if job.finished_at else "",
            "failed": _problem(job),
        }
    )
    if job.shards:
        output.print_heading("files")
        rows = [
            [shard.path, shard.state, f"{output.size(shard.done_bytes)} of {output.size(shard.size_bytes)}",
             shard.worker, str(shard.attempt)]
            for shard in job.shards
        ]  # fmt: skip
        output.print_table(["file", "state", "done", "worker", "tries"], rows, right=["done", "tries"])


@jobs_app.command("logs")
def logs(number: Number, json: Json = False) -> None:
    """What a job went through."""
    with connect() as registry:
        lines = registry.job_log(number)
    if json:
        output.print_json([{"at": line.at.isoformat(), "text": line.text} for line in lines])
        return
    for line in lines:
        output.print_line(f"{line.at.astimezone():%Y-%m-%d %H:%M:%S}  {line.text}")


@jobs_app.command("cancel")
def cancel(number: Number) -> None:
    """Stop a job. What is finished of it is kept for `ckpt jobs retry`."""
    with connect() as registry:
        job = registry.cancel_job(number)
    output.print_line(f"job {job.id}: {'cancelled' if job.state is JobState.CANCELLED else 'is being stopped'}")


@jobs_app.command("retry")
def retry(number: Number) -> None:
    """Try a job again that failed or was cancelled."""
    with connect() as registry:
        job = registry.retry_job(number)
    output.print_line(f"job {job.id}: {job.state.value}")


def _document(job: Job) -> dict[str, object]:
    from registry.codec import plain  # noqa: PLC0415 - the table needs none of it

    found: dict[str, object] = plain(job)
    return found


def _progress(job: Job) -> str:
    if job.state.is_over and job.state is not JobState.SUCCEEDED:
        return ""
    if not job.total_bytes:
        return ""
    rate = ""
    if job.state is JobState.RUNNING and job.started_at is not None:
        seconds = max(1e-3, time.time() - job.started_at.timestamp())
        rate = f", {output.size(int(job.done_bytes / seconds))}/s"
    return f"{100 * job.done_bytes // job.total_bytes} % of {output.size(job.total_bytes)}{rate}"


def _problem(job: Job) -> str:
    if job.error is None:
        return ""
    from cli.errors import explain  # noqa: PLC0415 - only what failed needs it

    error: RegistryError = from_document(job.error, f"job {job.id}")
    return explain(error).message


def worker(
    concurrency: Annotated[int, typer.Option(metavar="N", help="How many files or jobs at once.")] = 1,
    queues: Annotated[
        str, typer.Option(metavar="NAMES", help="merge (files of merges), jobs (everything else), or both.")
    ] = "merge,jobs",
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long what is under way may still take once it is to stop.")
    ] = 30.0,
    heartbeat: Seconds = 5.0,
    silent: Seconds = 20.0,
    poll: Seconds = 1.0,
) -> None:
    """Do the jobs of a team's registry, until SIGTERM or Ctrl-C. Any number of workers, on any machines.

    Needs the database and the store themselves (CKPT_DATABASE_URL, CKPT_STORE). On stderr it tells what it does: time, level, worker, job,
    message.
    """
    from registry.service import Registry  # noqa: PLC0415 - the help need not wait for it
    from registry.settings import Settings  # noqa: PLC0415
    from registry.worker import Pace, Worker  # noqa: PLC0415

    pace = Pace(heartbeat=heartbeat, silent=silent, poll=poll)
    with Registry(Settings.from_environment(os.environ)) as registry:
        names = tuple(name.strip() for name in queues.split(",") if name.strip())
        found = Worker(registry, concurrency=concurrency, queues=names, grace_seconds=grace, pace=pace)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: found.stop())
        with _log_on_stderr():
            found.run()


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """One line an event: time, level, worker, job, message."""
    from registry.jobs import worker_name  # noqa: PLC0415 - loaded with the worker

    form = logging.Formatter(
        f"%(asctime)s %(levelname)s {worker_name()} job=%(job)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%SZ",
        defaults={"job": "-"},
    )
    form.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    everything, own = logging.getLogger(), logging.getLogger("ckpt")
    level = own.level
    everything.addHandler(handler)  # what libraries warn of, too
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        everything.removeHandler(handler)
        own.setLevel(level)
