"""Routes of repositories, their files and their names, and of recipes that are kept without being carried out."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from starlette.datastructures import Headers
from starlette.responses import Response

from registry.errors import PathNotFound
from registry.results import KeptRecipe, Repository, RepositoryLine, RepositoryRef
from registry.server.bodies import NewRecipe
from registry.server.routing import Routes
from registry.server.scope import Scope
from registry.server.sending_files import send_file
from registry.teamwork import Role

routes = Routes("repositories")

Id = Annotated[str, "An adapter's name, name-merged, name-v3, a base model's name, merged-9a3fb2c41d70."]
Revision = Annotated[str, "main, a commit, or what may follow the @ of a reference: v3, an alias, step:500."]


@routes.route("GET", "/repositories", Role.READER)
def list_repositories(
    scope: Scope,
    search: Annotated[str, "Only those with this text in their ids."] = "",
    limit: Annotated[int, "The most to give.", range(1, 100_001)] = 100,
) -> list[RepositoryLine]:
    """The repositories that clients of the Hub find here, the latest first."""
    return scope.registry.repositories(search, limit, namespaces=scope.namespaces)


@routes.route("GET", "/repository", Role.READER)
def get_repository(scope: Scope, id: Id, revision: Revision = "main") -> Repository:
    """A repository at a revision, with its files."""
    return scope.repository(id, revision)


@routes.route("GET", "/repository/refs", Role.READER)
def list_repository_refs(scope: Scope, id: Id) -> list[RepositoryRef]:
    """The names that a repository's states have."""
    return scope.registry.repository_refs(id, scope.namespaces)


@routes.route("GET", "/repository/file", Role.READER)
def get_repository_file(
    scope: Scope,
    headers: Headers,
    id: Id,
    path: Annotated[str, "Which of its files."],
    revision: Revision = "main",
) -> Response:
    """The bytes of a file, or a range of them; of a merged model that is nowhere, they are computed. Its tag is its `etag`."""
    repository = scope.repository(id, revision)
    file = next((each for each in repository.files if each.path == path), None)
    if file is None:
        raise PathNotFound(f"{id}/{path}")
    pieces = partial(scope.registry.read_file, repository, path)
    return send_file(pieces, file.size_bytes, file.etag, headers, name=path.rpartition("/")[2])


@routes.route("GET", "/recipes", Role.READER)
def list_recipes(scope: Scope) -> list[KeptRecipe]:
    """The recipes that are kept, the oldest first."""
    return scope.recipes()


@routes.route("POST", "/recipes", Role.WRITER)
def save_recipe(scope: Scope, body: NewRecipe) -> Repository:
    """Keep a recipe without carrying it out: whoever asks for its model gets it computed. One that is kept stays as it is."""
    inputs = [scope.checkpoint(each) for each in body.checkpoints]
    planned = scope.registry.plan(*inputs, mixture=body.mixture, dtype=body.dtype, allow_lossy=body.allow_lossy)
    return scope.registry.save_recipe(planned, body.note)


@routes.route("DELETE", "/recipes", Role.WRITER, is_keyed=True)
def remove_recipe(
    scope: Scope, recipe: Annotated[str, "Its repository's id, or its digest's first digits."]
) -> KeptRecipe:
    """Keep a recipe no longer; gives what it was. Where it was carried out, its model stays."""
    return scope.registry.remove_recipe(scope.recipe(recipe).recipe.digest.hex)
