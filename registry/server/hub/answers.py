"""What Hub clients are told: repositories, files, commits and errors, as `huggingface_hub` reads them. No look-ups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from blake3 import blake3
from starlette.responses import JSONResponse, Response

from registry import errors
from registry.errors import PathNotFound, RegistryError
from registry.manifest import BaseModel, Checkpoint, Level
from registry.results import Repository, RepositoryFile, RepositoryKind, RepositoryLine, RepositoryRef
from registry.server.problems import headers_of, status_of
from registry.wording import explain

# Looked up along the class tree. Clients tell by these what there is not; without one, they blame the connection.
_CODES: Mapping[type, str] = {
    errors.PathNotFound: "EntryNotFound",
    errors.UnknownRevision: "RevisionNotFound",
    errors.UnknownCheckpoint: "RevisionNotFound",
    errors.UnknownEnvironment: "RevisionNotFound",
    errors.UnknownMetric: "RevisionNotFound",
    errors.NotFound: "RepoNotFound",
}
_POINTER_BYTES = 134  # of a Git LFS pointer, which clients want to see and nobody uses
_MESSAGE_CHARACTERS = 1000
_MOST_FINDINGS = 5
# What keeps a repository from being given. On a look at a file's size, clients blame the connection for all that has no code of theirs; with
# this one they say why.
_WITHHELD = (errors.Refused, errors.Ambiguous, errors.Conflict, errors.Changed)
# What 401 means to clients with these words; with others, a repository that is not there for whoever asks.
_BAD_TOKEN = "Invalid credentials in Authorization header"  # noqa: S105 - words, not a password
_LIBRARIES: Mapping[RepositoryKind, str] = {"adapter": "peft", "base": "transformers", "merged": "transformers"}
COMMIT = "X-Repo-Commit"


# -- errors


def hub_problem(
    error: RegistryError,
    *,
    has_token: bool = False,
    is_of_repository: bool = False,
    is_reading: bool = False,
    commit: str = "",
) -> Response:
    """The answer that an error is.

    Args:
        error: what went wrong.
        has_token: whoever asked showed one.
        is_of_repository: a repository was asked for: without a token, that is not there, as on the Hub.
        is_reading: it was to be read, not to be changed.
        commit: of the repository that was found, but not what was asked for in it.
    """
    status, words = status_of(error), explain(error)
    is_advised = words.hint and not isinstance(error, PathNotFound)  # its advice is about folders of this machine
    text = f"{words.message}. {words.hint}" if is_advised else words.message
    if isinstance(error, errors.Refused):
        text = f"{words.message}: {'; '.join(_findings(error))}"
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), "")
    if is_of_repository and is_reading and isinstance(error, _WITHHELD):
        code = code or "RepoNotFound"
    if isinstance(error, errors.Unauthenticated):
        text = _BAD_TOKEN if has_token else text
        code = "RepoNotFound" if is_of_repository and not has_token else ""
    headers = headers_of(error, status)
    if code:
        headers["X-Error-Code"] = code
    if (line := " ".join(text.split())).isascii():  # else the body has to do
        headers["X-Error-Message"] = line[:_MESSAGE_CHARACTERS]
    if commit:
        headers[COMMIT] = commit
    return JSONResponse({"error": text}, status, headers)


def _findings(error: errors.Refused) -> Iterator[str]:
    """What speaks against it, in words: clients show nothing else of it."""
    refusals = [each for each in error.report.findings if each.level is Level.REFUSED]
    for each in refusals[:_MOST_FINDINGS]:
        found = f"expected {each.expected}, found {each.found}" if each.expected else each.found
        yield f"{each.where}: {found}" + (f" ({each.advice})" if each.advice else "")
    if len(refusals) > _MOST_FINDINGS:
        yield f"and {len(refusals) - _MOST_FINDINGS} more"


def no_entry(repository: Repository, path: str) -> Response:
    """The answer for what is not in a repository. With its commit, clients remember that."""
    return hub_problem(PathNotFound(f"{repository.id}/{path}"), commit=repository.commit)


# -- repositories


def info(
    repository: Repository, checkpoint: Checkpoint | None, base: BaseModel | None, *, has_sizes: bool
) -> dict[str, Any]:
    """A repository as `model_info` gives it.

    Args:
        repository: what is told of.
        checkpoint: the only one in it, if there is one.
        base: itself, of a base model.
        has_sizes: with the files' sizes and digests.
    """
    told = {
        **_outline(repository.id, repository.kind, repository.created_at, repository.author),
        "sha": repository.commit,
        "tags": tags(repository, checkpoint),
        "usedStorage": sum(file.size_bytes for file in repository.files) if repository.is_stored else 0,
        "siblings": [_sibling(file, has_sizes=has_sizes) for file in repository.files],
        "widgetData": [],
        "spaces": [],
    }
    if repository.kind != "base":
        relation = "adapter" if repository.kind == "adapter" else "merge"
        told["baseModels"] = {"relation": relation, "models": [{"id": repository.base}]}
    if base is not None:
        told["config"] = {key: base.config[key] for key in ("architectures", "model_type") if key in base.config}
        told["safetensors"] = _elements(base)
    return told


def line(found: RepositoryLine) -> dict[str, Any]:
    """A repository in a list."""
    return {
        **_outline(found.id, found.kind, found.created_at, found.author),
        "tags": [_LIBRARIES[found.kind], found.kind],
    }


def _outline(id_: str, kind: RepositoryKind, created_at: datetime, author: str) -> dict[str, Any]:
    return {
        "_id": blake3(id_.encode()).hexdigest(12),
        "id": id_,
        "modelId": id_,
        "author": id_.partition("/")[0] if "/" in id_ else author,
        "private": True,
        "gated": False,
        "disabled": False,
        "createdAt": moment(created_at),
        "lastModified": moment(created_at),
        "library_name": _LIBRARIES[kind],
        "pipeline_tag": "text-generation",
        "downloads": 0,
        "likes": 0,
    }


def tags(repository: Repository, checkpoint: Checkpoint | None) -> list[str]:
    """What a repository can be filtered by: its library, its kind and method, its base model, and what users said of its checkpoint."""
    found = [_LIBRARIES[repository.kind], "safetensors", repository.kind]
    if repository.kind != "base":
        relation = "adapter" if repository.kind == "adapter" else "merge"
        found += [f"base_model:{repository.base}", f"base_model:{relation}:{repository.base}"]
    if not repository.is_stored:
        found.append("virtual")
    if checkpoint is not None:
        found += [checkpoint.manifest.method, *(f"{key}:{value}" for key, value in checkpoint.tags.items())]
    return list(dict.fromkeys(found))


def _elements(base: BaseModel) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for tensor in base.tensors:
        counts[tensor.spec.dtype] = counts.get(tensor.spec.dtype, 0) + tensor.spec.elements
    return {"parameters": counts, "total": sum(counts.values())}


def moment(time: datetime) -> str:
    """A time as clients read it: UTC, to the millisecond."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


# -- files


def _sibling(file: RepositoryFile, *, has_sizes: bool) -> dict[str, Any]:
    if not has_sizes:
        return {"rfilename": file.path}
    told: dict[str, Any] = {"rfilename": file.path, "size": file.size_bytes, "blobId": _blob_id(file)}
    if file.sha256:
        told["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": _POINTER_BYTES}
    return told


def file_entry(file: RepositoryFile, last: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A file in a tree; `last` is the commit that it came with, for those who want to know."""
    told: dict[str, Any] = {"type": "file", "oid": _blob_id(file), "size": file.size_bytes, "path": file.path}
    if file.sha256:
        told["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": _POINTER_BYTES}
    return {**told, "lastCommit": last} if last else told


def folder_entry(path: str, commit: str, last: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A folder in a tree."""
    told = {"type": "directory", "oid": _named(commit, path), "size": 0, "path": path}
    return {**told, "lastCommit": last} if last else told


def _blob_id(file: RepositoryFile) -> str:
    """40 hex digits, as Git would have."""
    return file.etag if len(file.etag) == 40 else file.etag[:40]


def _named(commit: str, path: str) -> str:
    return blake3(f"{commit} {path}".encode("utf-8", "surrogatepass")).hexdigest(20)


def folders(paths: Iterable[str]) -> list[str]:
    """Every folder that some paths lie in, in order."""
    found = {path[:at] for path in paths for at, letter in enumerate(path) if letter == "/"}
    return sorted(found)


# -- commits and names


def commit_entry(commit: str, title: str, message: str, author: str, time: datetime) -> dict[str, Any]:
    """A commit in a history."""
    return {
        "id": commit,
        "title": title,
        "message": message,
        "authors": [{"user": author}],
        "date": moment(time),
        "formatted": {"title": title, "message": message},
    }


def refs(found: Sequence[RepositoryRef]) -> dict[str, Any]:
    """The names that a repository's states have."""
    return {
        "branches": [_ref(each, "heads") for each in found if each.kind == "branch"],
        "tags": [_ref(each, "tags") for each in found if each.kind == "tag"],
        "converts": [],
        "pullRequests": [],
    }


def _ref(found: RepositoryRef, place: str) -> dict[str, str]:
    return {"name": found.name, "ref": f"refs/{place}/{found.name}", "targetCommit": found.commit}
