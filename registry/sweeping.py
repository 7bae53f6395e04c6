"""Give back the room that nothing needs any more: mark it, wait, and only then delete it. Only a sweep deletes blobs.

The wait is for those who have stored blobs and not recorded them yet. It is measured by the database's clock, which all machines share.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

from registry.db.catalog import Catalog
from registry.disk import Translating
from registry.refs import Digest
from registry.storing import delete_doomed
from registry.workspace import Workspace

GRACE = timedelta(hours=24)
# A writer that has not written for so long is dead, whatever the caller wants removed.
_LONGEST_PAUSE = timedelta(hours=1)
# How many blobs are decided on, or messages forgotten, in one transaction: other writers wait for it.
_TOGETHER = 5000
_AT_ONCE = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What was removed (`blobs`, `size_bytes`), what waits for its grace to pass (`marked`, …), the leftovers of dead writers removed, and the
    messages to webhooks forgotten (`deliveries`).

    Of a dry run: what would be.
    """

    blobs: int = 0
    size_bytes: int = 0
    marked: int = 0
    marked_bytes: int = 0
    leftovers: int = 0
    deliveries: int = 0

    def __add__(self, other: Swept) -> Swept:
        return Swept(
            blobs=self.blobs + other.blobs,
            size_bytes=self.size_bytes + other.size_bytes,
            marked=self.marked + other.marked,
            marked_bytes=self.marked_bytes + other.marked_bytes,
            leftovers=self.leftovers + other.leftovers,
            deliveries=self.deliveries + other.deliveries,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judgement:
    """Of some blobs and their sizes in bytes: which are to go, which are to be marked, which are marked and needed again, which wait."""

    due: Mapping[Digest, int]
    new: Mapping[Digest, int]
    pardoned: frozenset[Digest]
    waiting: Mapping[Digest, int]

    @property
    def swept(self) -> Swept:
        return Swept(
            blobs=len(self.due),
            size_bytes=sum(self.due.values()),
            marked=len(self.waiting),
            marked_bytes=sum(self.waiting.values()),
        )


def sweep(workspace: Workspace, *, grace: timedelta = GRACE, dry_run: bool = False) -> Swept:
    """Mark the blobs that nothing needs, and delete those that an earlier sweep has marked long enough ago.

    A sweep that was interrupted is finished by the next one.

    Args:
        workspace: what to sweep.
        grace: how long a blob stays marked first. Nothing: what is unneeded now goes at once, and who is storing just now stores it again.
        dry_run: change nothing, only say.

    Raises:
        Conflict: another sweep is running.
    """
    if dry_run:
        return _foresee(workspace, grace)
    with workspace.sweeping() as still_alone:
        delete_doomed(workspace, still_alone)
        found = iter(_candidates(workspace).items())
        swept = Swept()
        while part := dict(islice(found, _TOGETHER)):
            swept += _decide(workspace, part, grace)
        delete_doomed(workspace, still_alone)
    return swept + Swept(
        leftovers=_tidy(workspace, max(grace, _LONGEST_PAUSE)), deliveries=_forget_deliveries(workspace)
    )


def _foresee(workspace: Workspace, grace: timedelta) -> Swept:
    found = _candidates(workspace)
    with workspace.reading() as catalog:
        doomed, past = len(catalog.condemned.doomed()), catalog.webhooks.count_past(catalog.vitals.now())
        return _judge(catalog, found, grace).swept + Swept(blobs=doomed, deliveries=past)


def _candidates(workspace: Workspace) -> dict[Digest, int]:
    """What may be unneeded, with sizes in bytes. The store may take long to list: no lock is held, so each needs another look."""
    listed = dict(workspace.store.blobs())
    with workspace.reading() as catalog:
        for digest in (*catalog.needs.sizes(), *catalog.condemned.doomed()):
            listed.pop(digest, None)
        # rows without an object, and marks on what has come to be needed
        return {**catalog.condemned.all(), **catalog.needs.unneeded(), **listed}


def _decide(workspace: Workspace, sizes: Mapping[Digest, int], grace: timedelta) -> Swept:
    with workspace.writing() as change:
        catalog = change.catalog
        judged = _judge(catalog, sizes, grace)
        catalog.condemned.pardon(judged.pardoned)
        catalog.condemned.mark(judged.new, catalog.vitals.now())
        if judged.due:
            catalog.blobs.forget(catalog.needs.known(judged.due))
            catalog.condemned.doom(judged.due)
            change.record("sweep", "store", blobs=judged.swept.blobs, size_bytes=judged.swept.size_bytes)
    return judged.swept


def _judge(catalog: Catalog, sizes: Mapping[Digest, int], grace: timedelta) -> _Judgement:
    now = catalog.vitals.now()
    free = catalog.needs.free(sizes, now)
    since = catalog.condemned.marked(sizes)
    due = {digest for digest in free if since.get(digest, now) <= now - grace}
    return _Judgement(
        due={digest: sizes[digest] for digest in due},
        new={digest: sizes[digest] for digest in free - since.keys()},
        pardoned=frozenset(since.keys() - free),
        waiting={digest: sizes[digest] for digest in free - due},
    )


def _tidy(workspace: Workspace, older_than: timedelta) -> int:
    """Remove what dead writers and interrupted work left, and forget what has expired. Gives how many leftovers there were."""
    with workspace.writing() as change:
        change.catalog.needs.expire(change.catalog.vitals.now())
    return workspace.store.sweep_staging(older_than) + sum(1 for _ in _remove_made(workspace, older_than))


def _forget_deliveries(workspace: Workspace) -> int:
    """Forget messages to webhooks that are long over; gives how many. A part at a time, as other writers wait for each."""
    forgotten = 0
    while part := _forget_some(workspace):
        forgotten += part
    return forgotten


def _forget_some(workspace: Workspace) -> int:
    with workspace.writing() as change:
        found = change.catalog.webhooks.forget_past(change.catalog.vitals.now(), _TOGETHER)
        if found:
            change.record("sweep", "webhooks", deliveries=found)
        return found


def _remove_made(workspace: Workspace, older_than: timedelta) -> Iterator[str]:
    """Folders of this machine that conversions work in, and that a killed one has left."""
    making = workspace.settings.home / "making"
    with Translating(str(making)), suppress(FileNotFoundError):
        for folder in making.iterdir():
            if time.time() - folder.stat().st_mtime > older_than.total_seconds():
                shutil.rmtree(folder, ignore_errors=True)
                yield folder.name
