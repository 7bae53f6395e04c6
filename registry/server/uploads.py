"""Routes by which files come in. Asking first saves sending what is there; see `registry.uploading`."""

from __future__ import annotations

from typing import Annotated

from registry import uploading
from registry.manifest import FileEntry
from registry.refs import Digest
from registry.server.answering import Incoming
from registry.server.bodies import Completion, MissingBlobs, OfferedBlobs, SentParts, StoredBlob
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Role

routes = Routes("uploads")
Hex = Annotated[str, "The BLAKE3 of the whole file, as 64 hex digits."]


@routes.route("POST", "/blobs/missing", Role.WRITER, body_bytes=16 << 20)
def offer_blobs(scope: Scope, body: OfferedBlobs) -> MissingBlobs:
    """Which of some files have to be sent."""
    offered = [FileEntry(path=each.digest.hex, size_bytes=each.size_bytes, digest=each.digest) for each in body.files]
    return MissingBlobs(missing=tuple(uploading.missing(scope.registry.workspace, scope.principal, offered)))


@routes.route("PUT", "/blobs/{hex}", Role.WRITER, body_bytes=uploading.PART_BYTES)
def put_blob(scope: Scope, incoming: Incoming, hex: Hex) -> StoredBlob:
    """Send a file of at most 64 MiB in one piece. It is kept for a day, for what is recorded meanwhile."""
    return _stored(uploading.receive(scope.registry.workspace, scope.principal, Digest(hex), incoming.pieces()))


@routes.route("PUT", "/uploads/{hex}/parts/{number}", Role.WRITER, body_bytes=uploading.PART_BYTES)
def put_part(
    scope: Scope,
    incoming: Incoming,
    hex: Hex,
    number: Annotated[int, "Which part, from 1 on.", range(1, uploading.MOST_PARTS + 1)],
) -> StoredBlob:
    """Send a part of a larger file, of at most 64 MiB. Parts may come in any order, several at once."""
    workspace = scope.registry.workspace
    return _stored(uploading.receive_part(workspace, scope.principal, Digest(hex), number, incoming.pieces()))


@routes.route("GET", "/uploads/{hex}", Role.WRITER)
def list_parts(scope: Scope, hex: Hex) -> SentParts:
    """Which parts of a file have arrived: an upload that was cut goes on with the others."""
    found = uploading.parts(scope.registry.workspace, scope.principal, Digest(hex))
    return SentParts(parts={str(part.number): part.size_bytes for part in found})


@routes.route("POST", "/uploads/{hex}/complete", Role.WRITER)
def complete_upload(scope: Scope, hex: Hex, body: Completion) -> StoredBlob:
    """Put the parts of a file together. When they turn out not to be those of this file, they are dropped."""
    return _stored(
        uploading.put_together(scope.registry.workspace, scope.principal, Digest(hex), body.size_bytes, body.parts)
    )


def _stored(entry: FileEntry) -> StoredBlob:
    return StoredBlob(digest=entry.digest, size_bytes=entry.size_bytes, sha256=entry.sha256)
