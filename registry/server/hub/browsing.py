"""What a browser is shown at a repository's address: the page of what is in it."""

from __future__ import annotations

import re
from typing import final
from urllib.parse import quote, unquote

from starlette import types
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import BaseRoute, Match

from registry.errors import NotFound
from registry.refs import CheckpointRef, Digest
from registry.results import Repository
from registry.server.pages.drawing import url_of
from registry.server.pages.serving import PageServer
from registry.server.pages.visits import Moved, PageRule, Visit
from registry.server.scope import Scope
from registry.teamwork import Role

_ADDRESS = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)(?:/(?:tree|blob|commit)/(?P<rev>[^/]+)(?:/.*)?)?")


def show_repository(visit: Visit) -> Moved:
    """The page of an adapter, a checkpoint, a base model or a merged model."""
    revision = visit.path["rev"]
    repository = visit.scope.repository(visit.path["repo"], revision or "main")
    if repository.kind == "adapter" and not revision:
        return Moved(url_of(CheckpointRef.parse(repository.checkpoints[0]).adapter))
    return Moved(_page(visit.scope, repository))


def _page(scope: Scope, repository: Repository) -> str:
    if repository.kind == "base":
        return f"/bases/{quote(repository.base)}"
    if repository.recipe is not None and (kept := _kept(scope, repository.recipe)):
        return kept
    if len(repository.checkpoints) == 1:
        return url_of(repository.checkpoints[0])
    return "/merge?" + "&".join(f"ref={quote(ref, safe='')}" for ref in repository.checkpoints)


def _kept(scope: Scope, recipe: Digest) -> str:
    """The page of the merged model that a recipe has made, empty if it was never carried out."""
    try:
        return url_of(scope.merged(recipe.hex))
    except NotFound:
        return ""


RULE = PageRule(
    method="GET", path="/{repo}", role=Role.READER, handler=show_repository, is_slow=True, subject="repositories"
)


@final
class BrowsedRepositories(BaseRoute):
    """Where browsers come to with a repository's address; after all pages, as it fits theirs, too.

    Args:
        server: answers visits.
    """

    def __init__(self, server: PageServer) -> None:
        self._endpoint = server.endpoint(RULE)

    def matches(self, scope: types.Scope) -> tuple[Match, types.Scope]:
        """Whether a browser asks for what may be a repository."""
        if (
            scope["type"] != "http"
            or scope["method"] != "GET"
            or "text/html" not in Headers(scope=scope).get("accept", "")
        ):
            return Match.NONE, {}
        match = _ADDRESS.fullmatch(scope["raw_path"].decode("latin-1"))
        if match is None:
            return Match.NONE, {}
        return Match.FULL, {"path_params": {name: unquote(text) for name, text in match.groupdict("").items()}}

    async def handle(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Answer a visit."""
        answer = await self._endpoint(Request(scope, receive))
        await answer(scope, receive, send)
