"""Routes of base models, of checks, plans and merged models, and of their files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from starlette.datastructures import Headers
from starlette.responses import Response

from registry.base_models import AddedBase
from registry.errors import Forbidden, InvalidInput, PathNotFound
from registry.locations import Location, local_folder, pieces_of
from registry.manifest import BaseModel, Checkpoint, FileEntry, Merged, Report
from registry.merging import Outline, merged_folder
from registry.server.bodies import BaseAt, MergePlan, SentBase
from registry.server.checkpoints import Ref
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.server.sending_files import send_file
from registry.teamwork import Role
from registry.uploading import add_base

routes = Routes("models")

BASE_BYTES = 64 << 20
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
    def pieces(start: int, end: int) -> Iterator[bytes]:
        return pieces_of(folder.open(entry.path), folder.url, start, end)

    return send_file(pieces, entry.size_bytes, entry.digest.hex, headers, name=entry.path.rpartition("/")[2])


def refuse_place(scope: Scope, out: object) -> None:
    """See that only who looks after everything has results written elsewhere than into the store.

    Raises:
        Forbidden: somebody else wants to.
    """
    if out is not None and not (scope.principal.role is Role.ADMIN and not scope.namespaces):
        raise Forbidden("results go into the store; writing elsewhere with the server's credentials takes an admin")
