"""The verbs of a server's registry that look at repositories and read their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from registry.client_wire import LONG_SECONDS, Wire, check_namespaces
from registry.errors import PathNotFound

if TYPE_CHECKING:
    from registry.client import RemotePlanned
    from registry.results import KeptRecipe, Repository, RepositoryLine, RepositoryRef


class Repositories:
    """A part of `registry.client.RemoteRegistry`."""

    _wire: Wire

    def repositories(self, search: str = "", limit: int = 100, namespaces: Sequence[str] = ()) -> list[RepositoryLine]:
        """The repositories that clients of the Hub find here, the latest first."""
        from registry.results import RepositoryLine

        check_namespaces(namespaces)
        return self._wire.get(list[RepositoryLine], "/repositories", {"search": search, "limit": limit})

    def repository(self, id_: str, revision: str = "main", namespaces: Sequence[str] = ()) -> Repository:
        """What an id means at a revision, as clients of the Hub ask for it."""
        from registry.results import Repository

        check_namespaces(namespaces)
        asked = {"id": id_, "revision": revision}
        return self._wire.get(Repository, "/repository", asked, patience_seconds=LONG_SECONDS)

    def repository_refs(self, id_: str, namespaces: Sequence[str] = ()) -> list[RepositoryRef]:
        """The names that a repository's states have."""
        from registry.results import RepositoryRef

        check_namespaces(namespaces)
        return self._wire.get(list[RepositoryRef], "/repository/refs", {"id": id_}, patience_seconds=LONG_SECONDS)

    def read_file(
        self, repository: Repository, path: str, start: int = 0, end: int | None = None
    ) -> Iterator[bytes | memoryview]:
        """Bytes `start … end` of a file of a repository, in pieces."""
        file = next((each for each in repository.files if each.path == path), None)
        if file is None:
            raise PathNotFound(f"{repository.id}/{path}")
        # The commit that is asked for never means other bytes.
        asked = {"id": repository.id, "revision": repository.commit, "path": path}
        return self._wire.read(
            "/repository/file", asked, start, file.size_bytes if end is None else min(end, file.size_bytes)
        )

    def save_recipe(self, planned: RemotePlanned, note: str = "") -> Repository:
        """Keep the recipe of a plan without carrying it out."""
        from registry.results import Repository

        asked = {**planned.order, "note": note}
        return self._wire.write(Repository, "POST", "/recipes", asked, patience_seconds=LONG_SECONDS)

    def recipes(self) -> list[KeptRecipe]:
        """The recipes that are kept, the oldest first."""
        from registry.results import KeptRecipe

        return self._wire.get(list[KeptRecipe], "/recipes")

    def remove_recipe(self, recipe: str) -> KeptRecipe:
        """Keep a recipe no longer; gives what it was."""
        from registry.results import KeptRecipe

        return self._wire.write(KeptRecipe, "DELETE", "/recipes", query={"recipe": recipe})
