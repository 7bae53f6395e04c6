"""What Hub clients send: `hf upload`, `push_to_hub` and their like register checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response

from registry import uploading
from registry.errors import Conflict, InvalidInput, UnknownRevision
from registry.refs import check_label
from registry.repository_ids import MAIN
from registry.server.hub.announced import announce
from registry.server.hub.commits import Intake, read_commit
from registry.server.hub.pushing import Pushed, Target, check_no_whole_model, is_taken, point, push, target
from registry.server.hub.routing import NO_NAMESPACE, HubCall, HubTable
from registry.server.hub.tickets import TICKET, ticket
from registry.teamwork import Role

hub = HubTable()

# Clients hold what they send as base64 in memory; larger files stream, which new ones do only without Xet.
REGULAR_BYTES = 1 << 30
_MOST_COMMIT_BYTES, _MOST_FILE_BYTES = 16 << 30, 64 << 30
_FORM_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LFS = "/{repo}.git/info/lfs/objects"


# -- repositories


@hub.route("POST", "/api/repos/create", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def create(call: HubCall) -> Response:
    """Say whether an adapter of this name may get checkpoints. Nothing is recorded of it before it has one."""
    asked = call.document()
    if asked.get("type") not in (None, "model"):
        raise InvalidInput("type", str(asked["type"])[:80], "there are only models here")
    named = "/".join(str(asked[key]) for key in ("organization", "name") if asked.get(key))
    into = _target(replace(call, id=named))
    id_ = str(into.adapter)
    told = {"url": _address(call, into), "name": id_, "id": id_}
    if into.newest is None:
        announce(call.scope, into.adapter)
        return JSONResponse(told)
    return JSONResponse({**told, "error": f"there is an adapter {id_} already"}, 409)


@hub.route("POST", "/api/models/{repo}/branch/{rev}", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def create_branch(call: HubCall) -> Response:
    """Make an alias, of the newest checkpoint unless another is named. Of an adapter that has none yet, the first one makes it."""
    into = _target(call)
    return _new_alias(call, into, call.revision, str(call.document().get("startingPoint") or MAIN))


@hub.route("POST", "/api/models/{repo}/tag/{rev}", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def create_tag(call: HubCall) -> Response:
    """Make an alias of a revision."""
    asked = call.document()
    into = _target(replace(call, revision=str(asked.get("tag") or "")))
    return _new_alias(call, into, into.revision, call.revision)


@hub.route("DELETE", "/api/models/{repo}/branch/{rev}", Role.WRITER, is_long=True)
def delete_branch(call: HubCall) -> dict[str, Any]:
    """Take an alias away."""
    return _remove_alias(call)


@hub.route("DELETE", "/api/models/{repo}/tag/{rev}", Role.WRITER, is_long=True)
def delete_tag(call: HubCall) -> dict[str, Any]:
    """Take an alias away."""
    return _remove_alias(call)


def _new_alias(call: HubCall, into: Target, alias: str, of: str) -> Response:
    check_label(alias)
    if into.newest is None:
        return JSONResponse({})
    wanted = call.scope.repository(str(into.adapter), of)
    try:
        known = call.scope.repository(str(into.adapter), alias)
    except UnknownRevision:
        point(call.scope, call.scope.checkpoint(wanted.checkpoints[0]), alias)
        return JSONResponse({})
    return JSONResponse({"error": f"{into.adapter} has {alias} already, at {known.commit[:12]}"}, 409)


def _remove_alias(call: HubCall) -> dict[str, Any]:
    call.scope.registry.remove_alias(str(_target(call).adapter), check_label(call.revision))
    return {}


def _target(call: HubCall) -> Target:
    return target(call.scope, call.id, call.revision, replace(call, revision=MAIN).repository)


def _address(call: HubCall, into: Target) -> str:
    """Of an adapter's repository, out of which clients read its id: they want a namespace in it."""
    name = into.adapter
    return f"{call.endpoint}/{name if name.namespace else f'{NO_NAMESPACE}/{name}'}"


@hub.route("POST", "/api/models/{repo}/discussions", Role.WRITER, body_bytes=_FORM_BYTES)
def open_discussion(call: HubCall) -> Response:
    """Refuse a pull request."""
    raise _no_pull_requests()


def _no_pull_requests() -> InvalidInput:
    return InvalidInput("create_pr", "", "there are no pull requests here: send to a branch, which is an alias")


# -- what a client asks before it sends


@hub.route("POST", "/api/validate-yaml", Role.WRITER, body_bytes=_FORM_BYTES)
def check_card(call: HubCall) -> dict[str, Any]:
    """See what is wrong with a model card: nothing is asked of one here."""
    call.document()
    return {"errors": [], "warnings": []}


@hub.route("POST", "/api/models/{repo}/preupload/{rev}", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def say_how(call: HubCall) -> dict[str, Any]:
    """Say of each file how it is to be sent, if it is taken at all."""
    _target(call)
    files = _objects(call.document(), "files")
    check_no_whole_model(str(each.get("path")) for each in files)
    return {"files": [_how(str(each.get("path")), each.get("size")) for each in files]}


def _how(path: str, size: object) -> dict[str, Any]:
    if not isinstance(size, int):
        raise InvalidInput("size", str(size)[:80], "expected a number of bytes")
    mode = "regular" if size <= REGULAR_BYTES else "lfs"
    return {"path": path, "uploadMode": mode, "shouldIgnore": not is_taken(path)}


def _objects(document: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidInput(key, "", "expected a list of objects")
    return found


# -- large files, by the rules of Git LFS


@hub.route("POST", f"{_LFS}/batch", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def offer_files(call: HubCall) -> Response:
    """Say where each of some files is to be sent; nowhere, if it is here."""
    into, asked = _target(call), call.document()
    if asked.get("operation") != "upload":
        raise InvalidInput("operation", str(asked.get("operation"))[:80], "files are downloaded from their repository")
    told = [_offered(call, into, each) for each in _objects(asked, "objects")]
    document = {"transfer": "basic", "hash_algo": "sha256", "objects": told}
    return JSONResponse(document, media_type="application/vnd.git-lfs+json")


def _offered(call: HubCall, into: Target, asked: Mapping[str, Any]) -> dict[str, Any]:
    oid, size = _named(asked)
    told = {"oid": oid, "size": size, "authenticated": True}
    if size > _MOST_FILE_BYTES:
        return {**told, "error": {"code": 413, "message": f"at most {_MOST_FILE_BYTES} bytes in a file"}}
    if uploading.sent(call.scope.registry.workspace, call.scope.principal, oid) is not None:
        return told
    place = f"/{quote(str(into.adapter))}.git/info/lfs/objects"
    upload, verify = f"{place}/{oid}", f"{place}/verify"
    secret = call.headers.get("authorization", "").partition(" ")[2].strip()
    if secret:
        upload += f"?{TICKET}={quote(ticket(call.scope.principal, secret, 'PUT', upload), safe='')}"
    return {**told, "actions": {"upload": {"href": call.endpoint + upload}, "verify": {"href": call.endpoint + verify}}}


def _named(asked: Mapping[str, Any]) -> tuple[str, int]:
    oid, size = asked.get("oid"), asked.get("size")
    if not isinstance(oid, str) or not _SHA256.fullmatch(oid) or not isinstance(size, int):
        raise InvalidInput("objects", str(oid)[:80], "expected the SHA-256 and the size of each")
    return oid, size


@hub.route("PUT", f"{_LFS}/{{oid}}", Role.WRITER, body_bytes=_MOST_FILE_BYTES, is_long=True)
def take_file(call: HubCall) -> dict[str, Any]:
    """Take a file. It is kept for a day, for the commit that names it."""
    _target(call)
    oid, _ = _named({"oid": call.names["oid"], "size": 0})
    uploading.receive_unnamed(call.scope.registry.workspace, call.scope.principal, call.incoming.pieces(), sha256=oid)
    return {}


@hub.route("POST", f"{_LFS}/verify", Role.WRITER, body_bytes=_FORM_BYTES, is_long=True)
def verify_file(call: HubCall) -> dict[str, Any]:
    """See that a file has arrived whole."""
    oid, size = _named(call.document())
    found = uploading.sent(call.scope.registry.workspace, call.scope.principal, oid)
    if found is None or found.size_bytes != size:
        raise Conflict(f"upload {oid}", f"{found.size_bytes if found else 0} of {size} bytes have arrived")
    return {}


# -- commits


@hub.route("POST", "/api/models/{repo}/commit/{rev}", Role.WRITER, body_bytes=_MOST_COMMIT_BYTES, is_long=True)
def commit(call: HubCall) -> Response:
    """Register the checkpoints of a commit."""
    if call.flag("create_pr"):
        raise _no_pull_requests()
    into = _target(call)
    workspace, principal = call.scope.registry.workspace, call.scope.principal
    intake = Intake(
        take=partial(uploading.receive_unnamed, workspace, principal),
        sent=partial(uploading.sent, workspace, principal),
    )
    return _committed(call, into, push(call.scope, into, read_commit(call.incoming.pieces(), intake)))


def _committed(call: HubCall, into: Target, pushed: Pushed) -> Response:
    told = {
        "success": True,
        "commitOid": pushed.commit,
        "commitUrl": f"{_address(call, into)}/commit/{pushed.commit}",
        "hookOutput": "",
    }
    if not pushed.waiting:
        return JSONResponse(told)
    said = f"{into.adapter}: kept for a day, until the rest of the checkpoint comes: {', '.join(pushed.waiting)}"
    return JSONResponse(told, headers={"X-HF-Warning": f"waiting; {said.encode('ascii', 'replace').decode()[:1000]}"})
