"""Follow a job from wherever it is seen: this process's database or a server."""

from __future__ import annotations

import time
from collections.abc import Callable

from registry.errors import Cancelled
from registry.failures import from_document
from registry.progress import Progress
from registry.teamwork import Job, JobState

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Unfollowed(KeyboardInterrupt):
    """Somebody interrupted the following of a job, which goes on without them. Fields: `job`."""

    def __init__(self, job: int) -> None:
        super().__init__(f"job {job}")
        self.job = job


def follow(look: Callable[[int], Job], number: int, progress: Progress, source: str = "job") -> Job:
    """Look at a job again and again, until it is over.

    Args:
        look: gives the job as it is now.
        number: which one.
        progress: told of its bytes. They never go back, though a file that another worker takes over starts anew.
        source: where the job is, for an error that this version does not know.

    Raises:
        Cancelled: it was stopped.
        Unfollowed: an interrupt came, from the keyboard; the job is left alone.
        RegistryError: what the job itself raised.
    """
    try:
        job = _until_over(look, number, progress)
    except KeyboardInterrupt as error:
        raise Unfollowed(number) from error
    if job.state is JobState.CANCELLED:
        raise Cancelled(f"job {number}")
    if job.error is not None:
        raise from_document(job.error, f"{source} {number}")
    return job


def _until_over(look: Callable[[int], Job], number: int, progress: Progress) -> Job:
    told, pause = 0, _FIRST_PAUSE
    while True:
        job = look(number)
        if job.total_bytes and job.done_bytes > told:
            progress(job.what or job.kind, job.done_bytes - told, job.total_bytes)
            told = job.done_bytes
        if job.state.is_over:
            return job
        time.sleep(pause)
        pause = min(pause * 1.3, _LONGEST_PAUSE)
