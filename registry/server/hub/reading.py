"""What Hub clients read: repositories, what is in them, the bytes of their files, their names and histories, and who asks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from registry.errors import InvalidInput, UnknownRepository
from registry.filters import parse_filter
from registry.manifest import Checkpoint
from registry.repository_ids import MAIN
from registry.results import Repository, RepositoryRef
from registry.server.hub import answers
from registry.server.hub.answers import COMMIT, no_entry
from registry.server.hub.routing import HubCall, HubTable
from registry.server.sending_files import send_file
from registry.teamwork import Role

hub = HubTable()

T = TypeVar("T")
_FORM_BYTES = 1 << 20
_TREE_PAGE, _EXPANDED_PAGE, _COMMITS_PAGE = 1000, 50, 50
_MODELS_PAGE, _MOST_MODELS = 1000, 100_000
_DEPRECATED = "deprecated"  # the tag of a checkpoint that is not to be used any more
_IDENTITY = ("_id", "id", "modelId")


# -- repositories


@hub.route("GET", "/api/models", Role.READER)
def list_repositories(call: HubCall) -> Response:
    """The repositories, filtered; a part of them, with the address of the next."""
    start, limit = _number(call, "cursor", 0), min(_number(call, "limit", _MODELS_PAGE), _MODELS_PAGE)
    searches = [text.lower() for text in call.query.getlist("search")]
    registry, namespaces = call.scope.registry, call.scope.namespaces
    lines = registry.repositories(searches[0] if searches else "", limit=_MOST_MODELS, namespaces=namespaces)
    wanted, author = set(call.query.getlist("filter")), call.query.get("author")
    found = [
        told
        for told in map(answers.line, lines)
        if all(text in told["id"].lower() for text in searches[1:])
        and wanted <= {*told["tags"], told["pipeline_tag"]}
        and author in (None, told["author"])
    ]
    shown = [_only(told, call.query.getlist("expand")) for told in found[start : start + limit]]
    return _paged(call, shown, str(start + limit) if start + limit < len(found) else "")


@hub.route("GET", "/api/models/{repo}", Role.READER, is_long=True)
def newest_info(call: HubCall) -> Response:
    """A repository as it is now."""
    return _info(call)


@hub.route("GET", "/api/models/{repo}/revision/{rev}", Role.READER, is_long=True)
def info(call: HubCall) -> Response:
    """A repository at a revision."""
    return _info(call)


def _info(call: HubCall) -> Response:
    repository = call.repository()
    checkpoint = _only_checkpoint(call, repository)
    base = call.scope.registry.base(repository.base) if repository.kind == "base" else None
    told = answers.info(repository, checkpoint, base, has_sizes=call.flag("blobs"))
    expand = [*call.query.getlist("expand"), *call.query.getlist("expand[]")]
    return JSONResponse(_only(told, expand), headers=_warning(repository, checkpoint))


def _only(told: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """What was asked for; everything, if nothing was."""
    return {key: told[key] for key in (*_IDENTITY, *wanted) if key in told} if wanted else told


def _only_checkpoint(call: HubCall, repository: Repository) -> Checkpoint | None:
    return call.scope.registry.resolve(repository.checkpoints[0]) if len(repository.checkpoints) == 1 else None


def _warning(repository: Repository, checkpoint: Checkpoint | None) -> dict[str, str]:
    """What clients show their users once."""
    if checkpoint is None or _DEPRECATED not in checkpoint.tags:
        return {}
    said = f"{repository.id}: {checkpoint.ref} is deprecated: {checkpoint.tags[_DEPRECATED]}"
    line = " ".join(said.split()).encode("ascii", "replace").decode()
    return {"X-HF-Warning": f"{_DEPRECATED}; {line}"}


@hub.route("GET", "/api/models/{repo}/auth-check", Role.READER, is_long=True)
def check_access(call: HubCall) -> Response:
    """Whether a repository is there for whoever asks."""
    call.repository()
    return Response("OK", media_type="text/plain")


@hub.route("GET", "/api/datasets/{path*}", Role.READER)
@hub.route("GET", "/api/spaces/{path*}", Role.READER)
def refuse_other_kinds(call: HubCall) -> Response:
    """Data sets and Spaces: there are none, whatever they are called."""
    raise UnknownRepository(call.path, reason="there are only models here")


@hub.route("GET", "/api/whoami-v2", Role.READER)
def who_asks(call: HubCall) -> dict[str, Any]:
    """Whose token this is; the namespaces that it is limited to are their organizations."""
    principal = call.scope.principal
    organizations = [{"name": name, "fullname": name, "type": "org"} for name in principal.namespaces]
    role = "read" if principal.role is Role.READER else "write"
    token = {"displayName": principal.name, "role": role}
    return {
        "type": "user",
        "id": principal.name,
        "name": principal.name,
        "fullname": principal.name,
        "orgs": organizations,
        "auth": {"type": "access_token", "accessToken": token},
    }


# -- what is in them


@hub.route("GET", "/api/models/{repo}/tree/{rev}/{path*}", Role.READER, is_long=True)
def tree(call: HubCall) -> Response:
    """What is in a folder, or below it."""
    repository, folder = call.repository(), call.path.strip("/")
    entries = _below(repository, folder, is_deep=call.flag("recursive"), last=_last_commit(call, repository))
    if folder and not entries:
        return no_entry(repository, folder)
    size = _EXPANDED_PAGE if call.flag("expand") else _TREE_PAGE
    size = max(1, min(size, _number(call, "limit", size)))
    start = _number(call, "cursor", 0)
    shown = entries[start : start + size]
    return _paged(call, shown, str(start + size) if start + size < len(entries) else "", {COMMIT: repository.commit})


def _below(repository: Repository, folder: str, *, is_deep: bool, last: dict[str, Any] | None) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    paths = [file.path for file in repository.files]
    told = [answers.folder_entry(path, repository.commit, last) for path in answers.folders(paths)]
    told += [answers.file_entry(file, last) for file in repository.files]
    inside = [each for each in told if each["path"].startswith(prefix)]
    shown = [each for each in inside if is_deep or "/" not in each["path"].removeprefix(prefix)]
    return sorted(shown, key=lambda each: str(each["path"]))


@hub.route("POST", "/api/models/{repo}/paths-info/{rev}", Role.READER, body_bytes=_FORM_BYTES, is_long=True)
def paths_info(call: HubCall) -> list[dict[str, Any]]:
    """What some paths are; nothing of those that are not there."""
    repository = call.repository()
    form = call.form()
    wanted = {value.strip("/") for name, value in form if name == "paths"}
    last = _last_commit(call, repository, is_wanted=("expand", "true") in [(name, said.lower()) for name, said in form])
    entries = _below(repository, "", is_deep=True, last=last)
    return [entry for entry in entries if entry["path"] in wanted]


def _last_commit(call: HubCall, repository: Repository, *, is_wanted: bool = False) -> dict[str, Any] | None:
    """The commit that all of a repository's files came with, as they do; None if nobody asks."""
    if not (is_wanted or call.flag("expand")):
        return None
    checkpoint = _only_checkpoint(call, repository)
    date = answers.moment(repository.created_at)
    return {"id": repository.commit, "title": _title(repository, checkpoint), "date": date}


# -- bytes


@hub.route("HEAD", "/{repo}/resolve/{rev}/{path*}", Role.READER, is_long=True)
def look_at_file(call: HubCall) -> Response:
    """A file's size and tag, and the commit that its bytes belong to. Nothing is opened."""
    return _file(call)


@hub.route("GET", "/{repo}/resolve/{rev}/{path*}", Role.READER, is_long=True)
def give_file(call: HubCall) -> Response:
    """A file's bytes, or a range of them."""
    return _file(call)


def _file(call: HubCall) -> Response:
    repository = call.repository()
    file = next((each for each in repository.files if each.path == call.path), None)
    if file is None:
        return no_entry(repository, call.path)
    return send_file(
        partial(call.scope.registry.read_file, repository, file.path),
        file.size_bytes,
        file.etag,
        call.headers,
        name=file.path.rpartition("/")[2],
        extra={COMMIT: repository.commit},
        is_head=call.method == "HEAD",
    )


# -- names and histories


@hub.route("GET", "/api/models/{repo}/refs", Role.READER, is_long=True)
def list_refs(call: HubCall) -> dict[str, Any]:
    """Aliases and environments as branches, versions as tags."""
    repository = call.repository()  # it may not be there for whoever asks
    return answers.refs(_refs(call, repository))


def _refs(call: HubCall, repository: Repository) -> Sequence[RepositoryRef]:
    if not repository.files:  # it was only announced
        return [RepositoryRef(name=MAIN, kind="branch", commit=repository.commit)]
    return call.scope.registry.repository_refs(repository.id)


@hub.route("GET", "/api/models/{repo}/commits/{rev}", Role.READER, is_long=True)
def list_commits(call: HubCall) -> Response:
    """The versions up to a revision, newest first."""
    repository = call.repository()
    checkpoint = _only_checkpoint(call, repository)
    tags = {ref.name: ref.commit for ref in _refs(call, repository) if ref.kind == "tag"}
    if checkpoint is None or f"v{checkpoint.version}" not in tags:
        return _paged(call, [_commit(repository.commit, repository, checkpoint)], "")
    page = call.scope.registry.page(
        str(checkpoint.adapter),
        parse_filter(f"version <= {checkpoint.version}"),
        cursor=call.query.get("cursor", ""),
        limit=max(1, min(_COMMITS_PAGE, _number(call, "limit", _COMMITS_PAGE))),
    )
    told = [(tags[name], each) for each in page.items if (name := f"v{each.version}") in tags]
    return _paged(call, [_commit(commit, repository, each) for commit, each in told], page.cursor)


def _commit(commit: str, repository: Repository, checkpoint: Checkpoint | None) -> dict[str, Any]:
    author, time = (checkpoint or repository).author, (checkpoint or repository).created_at
    notes = "\n\n".join(note.text for note in checkpoint.notes) if checkpoint else ""
    return answers.commit_entry(commit, _title(repository, checkpoint), notes, author, time)


def _title(repository: Repository, checkpoint: Checkpoint | None) -> str:
    """What a commit is called: `v3: step 300`, with the first line of its first note."""
    if checkpoint is None:
        return f"{repository.kind} of {', '.join(repository.checkpoints) or repository.base}"
    step = "" if checkpoint.step is None else f": step {checkpoint.step}"
    note = checkpoint.notes[0].text.strip().partition("\n")[0] if checkpoint.notes else ""
    return f"v{checkpoint.version}{step}" + (f" - {note}" if note else "")


# -- pages of long lists


def _paged(call: HubCall, shown: Sequence[Any], cursor: str, headers: dict[str, str] | None = None) -> Response:
    """A part of a list, with the address of what follows."""
    told = dict(headers or {})
    if cursor:
        pairs = [(name, value) for name, value in call.query.multi_items() if name != "cursor"]
        told["Link"] = f'<{call.endpoint}{call.url_path}?{urlencode([*pairs, ("cursor", cursor)])}>; rel="next"'
    return JSONResponse(list(shown), headers=told)


def _number(call: HubCall, name: str, default: int) -> int:
    text = call.query.get(name, "")
    if text and not re.fullmatch(r"[0-9]{1,9}", text):
        raise InvalidInput(name, text[:80], "expected a whole number")
    return int(text or default)
