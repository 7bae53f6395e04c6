"""Routes of base models, of checks, plans and merged models, and of their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Annotated
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from registry.base_models import AddedBase
from registry.disk import Translating
from registry.errors import Forbidden, InvalidInput, PathNotFound
from registry.locations import Location, local_folder
from registry.manifest import BaseModel, Checkpoint, FileEntry, Merged, Report
from registry.merging import Outline, merged_folder
from registry.server.bodies import BaseAt, MergePlan, SentBase
from registry.server.checkpoints import Ref
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.teamwork import Role
from registry.uploading import add_base

routes = Routes("models")

BASE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
# Object stores that every machine reaches with its own credentials. Other schemes would let whoever asks send the server anywhere.
_SHARED_SCHEMES = frozenset({"s3", "gs", "gcs", "az", "abfs", "abfss", "hf"})


@routes.route("GET", "/bases", Role.READER)
def list_bases(scope: Scope) -> list[BaseModel]:
    """Every base model, by name."""
    return scope.registry.bases()


@routes.route("GET", "/base", Role.READER)
def get_base(scope: Scope, name: Annotated[str, "Its name, or the first digits of its digest."]) -> BaseModel:
    """A base model."""
    return scope.registry.base(name)


@routes.route("POST", "/bases", Role.WRITER, body_bytes=BASE_BYTES)
def record_base(scope: Scope, body: SentBase) -> AddedBase:
    """Record a base model that was fingerprinted elsewhere, with its files if they were sent before. Known weights keep their name."""
    if not body.copied and local_folder(body.base.url) is None:
        _check_shared(body.base.url)
    return add_base(scope.registry.workspace, scope.principal, body.base, body.copied)


@routes.route("POST", "/bases/at", Role.WRITER)
def record_base_at(scope: Scope, body: BaseAt) -> AddedBase:
    """Fingerprint and record a base model at a URL, which the server reads itself."""
    _check_shared(body.url)
    return scope.registry.add_base(body.url, name=body.name, arch_version=body.arch_version, copy=body.copy)


def _check_shared(url: str) -> None:
    """See that a URL is one of an object store.

    Raises:
        InvalidInput: it is not.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _SHARED_SCHEMES or "::" in url:
        raise InvalidInput("url", url, f"the server reads from {', '.join(sorted(_SHARED_SCHEMES))} only")


@routes.route("GET", "/check", Role.READER)
def check_checkpoint(
    scope: Scope, ref: Ref, base: Annotated[str, "Another recorded base model than its own."] = ""
) -> Report:
    """Compare a checkpoint with its base model, or with another one."""
    return scope.registry.check(scope.checkpoint(ref), scope.registry.base(base).name if base else "")


@routes.route("POST", "/plan", Role.READER)
def plan_merge(scope: Scope, body: MergePlan) -> Outline:
    """What merging checkpoints into their base model would do."""
    inputs = [scope.checkpoint(each) for each in body.checkpoints]
    planned = scope.registry.plan(*inputs, mixture=body.mixture, dtype=body.dtype, allow_lossy=body.allow_lossy)
    return planned.outline


@routes.route("GET", "/merged", Role.READER)
def list_merged(scope: Scope) -> list[Merged]:
    """Every merged model, oldest first."""
    return [merged for merged in scope.registry.merged() if scope.sees(merged)]


# -- files

OfSubject = Annotated[str, "A checkpoint's reference, or a merged model's digest."]


@routes.route("GET", "/files", Role.READER)
def list_files(scope: Scope, subject: OfSubject) -> list[FileEntry]:
    """The files of a checkpoint or merged model."""
    return list(_files(scope.subject(subject)))


@routes.route("GET", "/signable", Role.READER)
def list_signable_files(scope: Scope, subject: OfSubject) -> list[FileEntry]:
    """The files of a checkpoint or merged model, each with its SHA-256: what a signature is made of. Of a large model, that is read first."""
    return list(scope.registry.signable_files(scope.subject(subject)))


@routes.route("GET", "/file", Role.READER)
def get_file(
    scope: Scope, headers: Headers, subject: OfSubject, path: Annotated[str, "Which of its files."]
) -> Response:
    """The bytes of a file, or a range of them. Its tag is its digest."""
    found = scope.subject(subject)
    entry = next((each for each in _files(found) if each.path == path), None)
    if entry is None:
        raise PathNotFound(f"{subject}/{path}")
    return _sent(_folder(scope, found), entry, headers)


def _files(subject: Checkpoint | Merged) -> tuple[FileEntry, ...]:
    return subject.files if isinstance(subject, Merged) else subject.manifest.files


def _folder(scope: Scope, subject: Checkpoint | Merged) -> Location:
    workspace = scope.registry.workspace
    return merged_folder(workspace, subject) if isinstance(subject, Merged) else workspace.folder_of(subject)


def _sent(folder: Location, entry: FileEntry, headers: Headers) -> Response:
    tag, name = f'"{entry.digest.hex}"', quote(entry.path.rpartition("/")[2])
    told = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
    }
    if headers.get("if-none-match", "").strip() == tag:
        return Response(status_code=304, headers=told)
    size, wanted = entry.size_bytes, _range(headers, tag, entry.size_bytes)
    start, end = wanted or (0, size)
    if wanted is not None and start >= end:
        raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
    if wanted is not None:
        told["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    told["Content-Length"] = str(end - start)
    blocks = _blocks(folder.open(entry.path), folder.url, start, end - start)
    return StreamingResponse(blocks, 200 if wanted is None else 206, told, "application/octet-stream")


def _range(headers: Headers, tag: str, size: int) -> tuple[int, int] | None:
    """The bytes that are asked for, from and up to; None for all. Several ranges at once are not answered: all is."""
    match = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or match[1] == match[2] == "" or headers.get("if-range", tag) != tag:
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size if int(match[2]) else 0
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


def _blocks(stream: IO[bytes], url: str, start: int, left: int) -> Iterator[bytes]:
    """Some bytes of a stream, which is closed then, even when nobody reads on."""
    with stream, Translating(url):
        stream.seek(start)
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            yield block


def refuse_place(scope: Scope, out: object) -> None:
    """See that only who looks after everything has results written elsewhere than into the store.

    Raises:
        Forbidden: somebody else wants to.
    """
    if out is not None and not (scope.principal.role is Role.ADMIN and not scope.namespaces):
        raise Forbidden("results go into the store; writing elsewhere with the server's credentials takes an admin")
