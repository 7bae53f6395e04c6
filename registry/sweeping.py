"""Give back the room that nothing needs any more. Only here are blobs deleted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from registry.workspace import Workspace

# A writer that has not written for so long is dead, whatever the caller wants removed.
_LONGEST_PAUSE = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What was removed, or would be."""

    blobs: int
    size_bytes: int


def sweep(workspace: Workspace, *, older_than: timedelta, dry_run: bool = False) -> Swept:
    """Delete the blobs that no checkpoint, base model or merged model needs.

    It holds the database's write lock meanwhile, and whoever records blobs looks for them under the same lock: no blob that is recorded
    can be missing.

    Args:
        older_than: spare what was put into the store within this time; a merge or registration may be about to record it.
    """
    with workspace.writing() as change:
        needed = change.catalog.blobs.needed()
        unneeded = [
            (digest, size_bytes)
            for digest, size_bytes in workspace.store.blobs()
            if digest not in needed and workspace.store.age(digest) >= older_than
        ]
        swept = Swept(blobs=len(unneeded), size_bytes=sum(size_bytes for _, size_bytes in unneeded))
        if dry_run:
            return swept
        if unneeded:
            known = set(change.catalog.blobs.unreferenced())
            change.catalog.blobs.forget(digest for digest, _ in unneeded if digest in known)
            change.record("sweep", "store", blobs=swept.blobs, size_bytes=swept.size_bytes)
        for digest, _ in unneeded:
            workspace.store.delete(digest)
    workspace.store.sweep_staging(max(older_than, _LONGEST_PAUSE))
    return swept
