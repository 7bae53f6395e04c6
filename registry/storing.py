"""Between storing blobs and recording them a sweep may come. Here is how the two survive each other.

A sweep decides under the database's write lock, and whoever records blobs asks for its decisions under the same lock. What it has decided to
delete must be gone before it can be stored again; what has once been swept from under somebody is leased to him for the next try.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

from registry.errors import BlobSwept, Conflict, DamagedBlob
from registry.refs import Digest
from registry.workspace import Workspace

T = TypeVar("T")
_LEASE = timedelta(hours=1)
_PATIENCE_SECONDS = 60.0
_TOGETHER = 200  # deletions between two looks at whether this is still the only sweep
_THREADS = 8


def recording(workspace: Workspace, attempt: Callable[[], T]) -> T:
    """Do what stores blobs and then records them; again when a sweep has taken some in between, which it then cannot any more.

    Args:
        attempt: stores, then calls `Workspace.check_stored` in the transaction that records. Within an outer transaction it is tried once: the
            sweep would wait for that one to end.

    Raises:
        DamagedBlob: a blob is missing although no sweep may touch it.
    """
    leased: set[Digest] = set()
    with ExitStack() as leases:
        while True:
            try:
                return attempt()
            except DamagedBlob as error:
                lost = _lost(error)
                if workspace.is_writing or lost <= leased:
                    raise
                leases.enter_context(_leased(workspace, lost - leased))
                leased |= lost


def _lost(error: DamagedBlob) -> set[Digest]:
    """The blobs that a sweep may have taken: those that were about to be recorded, or one that somebody wanted to read."""
    if isinstance(error, BlobSwept):
        return {Digest(text) for text in error.digests}
    return {Digest.parse(error.expected)} if error.found == "missing" else set()


@contextmanager
def _leased(workspace: Workspace, digests: set[Digest]) -> Iterator[None]:
    """Keep blobs from being condemned, and see first that none is just being deleted."""
    holder = f"recording {secrets.token_hex(8)}"
    with workspace.writing() as change:
        change.catalog.leases.take(holder, digests, change.catalog.vitals.now() + _LEASE)
    try:
        wait_until_deleted(workspace, digests)
        yield
    finally:
        with workspace.writing() as change:
            change.catalog.leases.release(holder)


def wait_until_deleted(workspace: Workspace, digests: Iterable[Digest]) -> None:
    """Wait until no sweep is about to delete any of these blobs, so that they can be stored again. What a dead sweep left is deleted here.

    Raises:
        Conflict: it takes more than a minute.
    """
    wanted, end = list(digests), time.monotonic() + _PATIENCE_SECONDS
    while True:
        with workspace.reading() as catalog:
            if not catalog.condemned.doomed(wanted):
                return
        try:
            with workspace.sweeping() as still_alone:
                delete_doomed(workspace, still_alone, wanted)
        except Conflict:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def delete_doomed(
    workspace: Workspace, still_alone: Callable[[], None], digests: Iterable[Digest] | None = None
) -> None:
    """Delete the blobs that a sweep has decided on: these, or all.

    Args:
        workspace: that this process is the only one to sweep.
        still_alone: raises when it is not any more. Asked before each few deletions: a process that was paused must not delete late, when
            another one has finished its work and the blobs are stored again.
        digests: None for all of them.
    """
    with workspace.reading() as catalog:
        doomed = iter(catalog.condemned.doomed(digests))
    with ThreadPoolExecutor(_THREADS) as threads:
        while part := list(islice(doomed, _TOGETHER)):
            still_alone()
            with workspace.reading() as catalog:
                part = catalog.condemned.doomed(part)
            list(threads.map(workspace.store.delete, part))
            with workspace.writing() as change:
                change.catalog.condemned.drop(part)
