"""Repositories that a client has made and that have nothing yet: for a day they are there for whoever made them, and for nobody else.

Nothing is recorded of an adapter before its first checkpoint, and clients look at what they have just made before they send.
"""

from __future__ import annotations

from registry import uploading
from registry.errors import InvalidReference, UnknownRevision
from registry.manifest import utc_now
from registry.refs import AdapterName
from registry.repository_ids import MAIN, name_of
from registry.results import Repository
from registry.server.scope import Scope


def announce(scope: Scope, adapter: AdapterName) -> None:
    """Have an adapter without checkpoints be there for who asks; what waits for its first one goes on waiting."""
    workspace, name = scope.registry.workspace, str(adapter)
    uploading.keep_waiting(workspace, scope.principal, name, uploading.waiting(workspace, scope.principal, name) or ())


def announced(scope: Scope, id_: str, revision: str) -> Repository | None:
    """The empty repository that who asks has made under an id; None if they have not.

    Raises:
        UnknownRevision: they have, and it has no such revision.
    """
    try:
        name = str(AdapterName.parse(id_))
    except InvalidReference:
        return None
    if uploading.waiting(scope.registry.workspace, scope.principal, name) is None:
        return None
    commit = name_of(["nothing", name])
    if revision not in (MAIN, commit):
        raise UnknownRevision(f"{id_}@{revision}", [MAIN])
    return Repository(
        id=name,
        kind="adapter",
        commit=commit,
        files=(),
        checkpoints=(),
        base="",
        created_at=utc_now(),
        author=scope.principal.name,
    )
