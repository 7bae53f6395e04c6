"""Take files from clients into the store, and record what is made of them. Nobody learns by it which files others have.

A small file comes in one piece, a large one in numbered parts, each kept as a blob of its own until they are put together. Who has sent a blob
has a lease on it for a day: only then may they name it in what they record, and no sweep takes it until then. The leases of parts also tell
which of an upload have arrived, so that one that was cut goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from registry.base_models import AddedBase, receive_base
from registry.codec import from_json, plain
from registry.db.leases import Part
from registry.errors import BlobSwept, Conflict, CorruptFile, DamagedBlob, InvalidInput
from registry.manifest import BaseModel, FileEntry
from registry.refs import Digest
from registry.registering import Received, Registered, register_received
from registry.storing import delete_doomed, wait_until_deleted
from registry.teamwork import Principal
from registry.workspace import Workspace

LEASE = timedelta(hours=24)
PART_BYTES = 64 << 20  # the most that comes in one piece
MOST_PARTS = 10_000
_BLOCK_BYTES = 4 << 20


def missing(workspace: Workspace, principal: Principal, files: Sequence[FileEntry]) -> list[Digest]:
    """Those of some files that somebody has to send. The others are theirs for a day: they sent them before, or see what they are part of.

    A blob that only what they may not see has counts as missing.
    """
    sizes = {entry.digest: entry.size_bytes for entry in files}
    with workspace.writing() as change:
        catalog, now = change.catalog, change.catalog.vitals.now()
        mine = catalog.leases.held(principal.name, sizes, now) | catalog.leases.visible(sizes, principal.namespaces)
        mine -= set(catalog.condemned.doomed(mine))
        there = {digest for digest in mine if _stored_size(workspace, digest) == sizes[digest]}
        catalog.leases.take(principal.name, there, now + LEASE)
        catalog.condemned.pardon(there)
    return [digest for digest in sizes if digest not in there]


def _stored_size(workspace: Workspace, digest: Digest) -> int | None:
    try:
        return workspace.store.size(digest)
    except DamagedBlob:
        return None


def receive(workspace: Workspace, principal: Principal, digest: Digest, data: Iterable[bytes]) -> FileEntry:
    """Store a blob that comes in pieces, hashed on the way.

    Raises:
        DamagedBlob: the bytes have another digest; nothing is kept.
        BlobSwept: a sweep took what was just stored; again is fine.
        StorageFailed: the store does not take them.
    """
    wait_until_deleted(workspace, [digest])  # or what is stored now would be taken for what is to go
    entry = _store(workspace, digest, data)
    _lease(workspace, principal.name, entry)
    return entry


def _store(workspace: Workspace, digest: Digest | None, data: Iterable[bytes]) -> FileEntry:
    with workspace.store.create(sha256=True, expected=digest) as writer:
        for piece in data:
            writer.write(piece)
        blob = writer.commit(digest)
    return FileEntry(path=blob.digest.hex, size_bytes=blob.size_bytes, digest=blob.digest, sha256=blob.sha256)


def _lease(workspace: Workspace, holder: str, entry: FileEntry, *others: str) -> None:
    with workspace.writing() as change:
        workspace.check_stored([entry])
        change.catalog.blobs.add([entry])
        for each in (holder, *others):
            change.catalog.leases.take(each, [entry.digest], change.catalog.vitals.now() + LEASE)


# -- files that others name by their SHA-256, or not at all


def receive_unnamed(
    workspace: Workspace, principal: Principal, data: Iterable[bytes], *, sha256: str = ""
) -> FileEntry:
    """Store a blob whose digest nobody has told; its path is that digest.

    Args:
        principal: who sends it, and may name it for a day.
        data: its bytes.
        sha256: what they are to have, 64 hex digits: `sent` finds it by that; empty where it is not known.

    Raises:
        DamagedBlob: the bytes have another SHA-256.
        BlobSwept: a sweep took what was just stored; again is fine.
        StorageFailed: the store does not take them.
    """
    entry = _store(workspace, None, data)
    if sha256 and entry.sha256 != sha256:
        raise DamagedBlob("upload", f"sha256:{sha256}", f"sha256:{entry.sha256}")
    _lease(workspace, principal.name, entry, *([_sent(principal, sha256)] if sha256 else []))
    return entry


def sent(workspace: Workspace, principal: Principal, sha256: str) -> FileEntry | None:
    """The blob of this SHA-256 that somebody sent within the last day; None if there is none."""
    with workspace.reading() as catalog:
        held = catalog.leases.of(_sent(principal, sha256), catalog.vitals.now())
        return next(iter(catalog.leases.recorded(held).values()), None)


def _sent(principal: Principal, sha256: str) -> str:
    return f"{principal.name} sent {sha256}"


# -- files that wait for the rest of their checkpoint


def waiting(workspace: Workspace, principal: Principal, adapter: str) -> tuple[FileEntry, ...] | None:
    """The files that somebody has sent for an adapter's next checkpoint within the last day, perhaps none yet; None if nothing is awaited."""
    with workspace.reading() as catalog:
        held = catalog.leases.of(_waits(principal, adapter), catalog.vitals.now())
    if not held:
        return None
    with workspace.store.open(held.pop()) as stream:
        return from_json(tuple[FileEntry, ...], json.load(stream))


def keep_waiting(workspace: Workspace, principal: Principal, adapter: str, files: Sequence[FileEntry]) -> None:
    """Keep files that somebody has sent for an adapter's next checkpoint, for a day, instead of those of before.

    Raises:
        BlobSwept, StorageFailed: as `receive_unnamed`.
    """
    holder, entry = _waits(principal, adapter), _store(workspace, None, [json.dumps(plain(files)).encode()])
    with workspace.writing() as change:
        change.catalog.leases.release(holder)
        _lease(workspace, holder, entry)
        until = change.catalog.vitals.now() + LEASE
        change.catalog.leases.take(principal.name, {each.digest for each in files}, until)


def stop_waiting(workspace: Workspace, principal: Principal, adapter: str) -> None:
    """Await nothing any more for an adapter's next checkpoint."""
    with workspace.writing() as change:
        change.catalog.leases.release(_waits(principal, adapter))


def _waits(principal: Principal, adapter: str) -> str:
    return f"{principal.name} pushes {adapter}"


# -- large files


def receive_part(
    workspace: Workspace, principal: Principal, whole: Digest, number: int, data: Iterable[bytes]
) -> FileEntry:
    """Store a part of a large file; one that was sent before is replaced.

    Args:
        principal: whose upload it is.
        whole: the digest of the file.
        number: which part, from 1 on.
        data: its bytes.

    Raises:
        InvalidInput: no such number.
        StorageFailed: the store does not take them.
    """
    if not 1 <= number <= MOST_PARTS:
        raise InvalidInput("number", number, f"parts are numbered from 1 to {MOST_PARTS}")
    entry = _store(workspace, None, data)
    holder = _upload(principal, whole, number)
    with workspace.writing() as change:
        change.catalog.leases.release(holder)
    _lease(workspace, holder, entry)
    return entry


def parts(workspace: Workspace, principal: Principal, whole: Digest) -> list[Part]:
    """The parts of a file that somebody has sent, by number."""
    with workspace.reading() as catalog:
        return catalog.leases.parts(_upload(principal, whole), catalog.vitals.now())


def put_together(workspace: Workspace, principal: Principal, whole: Digest, size_bytes: int, count: int) -> FileEntry:
    """Make a file of its parts. They are dropped then, also when they turn out to be those of another file.

    Args:
        principal: whose upload it is.
        whole: the digest of the file.
        size_bytes: its size.
        count: how many parts it has.

    Raises:
        Conflict: parts have not arrived, or are of another size together.
        DamagedBlob: the parts are not those of this file.
        StorageFailed: the store does not take it.
    """
    found = parts(workspace, principal, whole)
    if [part.number for part in found] != list(range(1, count + 1)):
        raise Conflict(
            f"upload {whole.hex}", f"{count} parts are told of, and {[each.number for each in found]} are here"
        )
    if (total := sum(part.size_bytes for part in found)) != size_bytes:
        raise Conflict(f"upload {whole.hex}", f"its parts are {total} bytes together, not {size_bytes}")
    try:
        return receive(workspace, principal, whole, _read(workspace, found))
    finally:
        _drop(workspace, principal, whole, found)


def _upload(principal: Principal, whole: Digest, number: int | None = None) -> str:
    """Who holds the lease on a part: the upload, for this person alone. Names have no blanks."""
    return f"{principal.name} uploads {whole.hex} {'' if number is None else number}"


def _read(workspace: Workspace, found: Iterable[Part]) -> Iterator[bytes]:
    for part in found:
        with workspace.store.open(part.digest) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block


def _drop(workspace: Workspace, principal: Principal, whole: Digest, found: Sequence[Part]) -> None:
    """Give back the room of parts. While a sweep is running, that is left to the next one."""
    digests = {part.digest for part in found}
    with workspace.writing() as change:
        catalog, now = change.catalog, change.catalog.vitals.now()
        for part in found:
            catalog.leases.release(_upload(principal, whole, part.number))
        free = catalog.needs.free(digests, now)
        sizes = {part.digest: part.size_bytes for part in found if part.digest in free}
        catalog.condemned.mark({d: size for d, size in sizes.items() if d not in catalog.condemned.marked(free)}, now)
        catalog.blobs.forget(free)
        catalog.condemned.doom(free)
    with suppress(Conflict), workspace.sweeping() as still_alone:
        delete_doomed(workspace, still_alone, free)


# -- what is made of files


def register(workspace: Workspace, principal: Principal, received: Sequence[Received]) -> list[Registered]:
    """Register checkpoints of files that were sent; see `registry.registering.register_received`.

    Raises:
        BlobSwept: a file was not sent, or too long ago.
    """
    files = _known(workspace, principal, [entry for each in received for entry in each.files])
    whole = [
        replace(each, files=tuple(replace(files[entry.digest], path=entry.path) for entry in each.files))
        for each in received
    ]
    return register_received(workspace, whole)


def add_base(workspace: Workspace, principal: Principal, base: BaseModel, copied: Sequence[FileEntry]) -> AddedBase:
    """Record a base model that a client has fingerprinted; see `registry.base_models.receive_base`.

    Raises:
        BlobSwept: a file was not sent, or too long ago.
    """
    files = _known(workspace, principal, copied)
    whole = [replace(files[entry.digest], path=entry.path) for entry in copied]
    return receive_base(workspace, base, whole, base.url)


def _known(workspace: Workspace, principal: Principal, entries: Sequence[FileEntry]) -> dict[Digest, FileEntry]:
    """Files that somebody may name, as they are recorded: what the client says of them is not relied on."""
    digests = {entry.digest for entry in entries}
    with workspace.reading() as catalog:
        held = catalog.leases.held(principal.name, digests, catalog.vitals.now())
        held |= catalog.leases.visible(digests - held, principal.namespaces)
        known = catalog.leases.recorded(held)
    if lost := sorted(digests - known.keys()):
        raise BlobSwept(f"blob {lost[0].hex}", str(lost[0]), "not sent", [each.hex for each in lost])
    for entry in entries:
        if known[entry.digest].size_bytes != entry.size_bytes:
            raise CorruptFile(entry.path, f"it has {known[entry.digest].size_bytes} bytes, not {entry.size_bytes}")
    return {digest: _with_sha256(workspace, entry) for digest, entry in known.items()}


def _with_sha256(workspace: Workspace, entry: FileEntry) -> FileEntry:
    if entry.sha256:
        return entry
    with workspace.store.open(entry.digest) as stream:
        hasher = hashlib.sha256()
        while block := stream.read(_BLOCK_BYTES):
            hasher.update(block)
    return replace(entry, sha256=hasher.hexdigest())
