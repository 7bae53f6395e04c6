"""The registry as a file system for fsspec: `ckpt://support-bot@v3/adapter_model.safetensors`, read-only.

    ckpt://support-bot/README.md                                   the newest checkpoint
    ckpt://team/support-bot@production/adapter_config.json         what is live there
    ckpt://team/support-bot-merged@v3/model.safetensors            merged with its base model, computed while it is read

Folders are repositories, as clients of the Hugging Face Hub find them (`registry.repository_ids`); what follows the `@` is a revision. Without
one, `a/b` is what there is: the repository of that name, or the file in the repository `a`.

Opening a file settles which version it is of, once: it stays that one's while aliases move, and after pickling.
"""

from __future__ import annotations

import atexit
import errno
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final
from urllib.parse import quote, unquote

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from registry import Settings, connect
from registry.errors import AccessDenied, Ambiguous, Conflict, InvalidReference, NotFound, RegistryError
from registry.results import Repository, RepositoryFile
from registry.service import Registry
from registry.wording import explain

_OPTIONS = ("home", "server", "token", "database_url", "store", "user")
_MAIN = "main"
_MOST_LISTED = 100_000
_BLOCK_BYTES = 4 << 20


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """A repository at a revision (empty: `main`), and the path of a file or folder in it, empty for its root."""

    id: str
    revision: str
    path: str

    def at(self, path: str) -> str:
        """The whole path of a file in the same repository."""
        root = f"{self.id}@{quote(self.revision, safe=':')}" if self.revision else self.id
        return f"{root}/{path}" if path else root


@final
class CheckpointFileSystem(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """The repositories of a registry as folders. Any thread may use it.

    Args:
        home, server, token, database_url, store, user: where the registry is, in place of the variables `CKPT_HOME`, `CKPT_SERVER` and so on;
            those of the environment, and what `ckpt login` kept, where none is given.
        others: as for every file system of fsspec.

    Raises:
        InvalidSetting: they cannot be used.
    """

    protocol = "ckpt"
    root_marker = ""

    def __init__(self, **others: Any) -> None:
        said = {name: others.pop(name) for name in _OPTIONS if name in others}
        super().__init__(**others)
        self._settings = _settings({name: str(value) for name, value in said.items() if value is not None})

    @property
    def registry(self) -> Registry:
        """The registry that is read."""
        return _CONNECTIONS.get(self._settings)

    # -- look

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What is in a folder: repositories in the root and in a namespace, files and folders in a repository.

        Raises:
            FileNotFoundError: there is no such folder.
            PermissionError: not for whoever asks.
            OSError: the registry cannot be reached, or the like.
        """
        path = self._strip_protocol(path)
        entries = self._entries(path)
        return entries if detail else [entry["name"] for entry in entries]

    def _entries(self, path: str) -> list[dict[str, Any]]:
        listed = self._listed(path) if "@" not in path and path.count("/") == 0 else []
        if not path:
            return listed
        try:
            place, repository = self._find(path)
        except FileNotFoundError:
            if listed:  # a namespace
                return listed
            raise
        found = _inside(place, repository)
        if not found:
            raise _missing(path)
        return [*found, *listed]

    def _listed(self, namespace: str) -> list[dict[str, Any]]:
        """The repositories of a namespace; of the root, those without one, and the namespaces."""
        with _as_os_errors(namespace):
            lines = self.registry.repositories(limit=_MOST_LISTED)
        if namespace:
            names = [line.id for line in lines if line.id.startswith(f"{namespace}/")]
        else:
            names = [line.id.partition("/")[0] for line in lines]
        return [_folder(name) for name in sorted(set(names))]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What a path is: `name`, `size`, `type`; of a file also `ETag` (64 digits are its SHA-256), and `commit`, the version that it is of.

        Raises:
            FileNotFoundError, PermissionError, OSError: as `ls`.
        """
        path = self._strip_protocol(path)
        if not path:
            return _folder("")
        try:
            place, repository = self._find(path)
        except FileNotFoundError:
            if "@" not in path and "/" not in path and self._listed(path):
                return _folder(path)
            raise
        if file := _file(repository, place.path):
            return _described(place, repository, file)
        if not _has(repository, place.path):
            raise _missing(path)
        return {**_folder(path), "commit": repository.commit}

    def created(self, path: str) -> Any:
        """When the version that a path is of was made."""
        return self._find(self._strip_protocol(path))[1].created_at

    modified = created

    def ukey(self, path: str) -> str:
        """What changes whenever a file's bytes do."""
        return str(self.info(path).get("ETag") or self.info(path).get("commit") or path)

    def checksum(self, path: str) -> int:
        """The same, as a number."""
        return int.from_bytes(self.ukey(path).encode(), "big")

    # -- read

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, cache_options: Any = None, **others: Any
    ) -> CheckpointFile:
        if mode != "rb":
            raise _read_only(path)
        place, repository, file = self._readable(path)
        others.pop("autocommit", None)
        others.pop("size", None)
        pinned = _Place(place.id, repository.commit, place.path)
        return CheckpointFile(
            self, pinned, repository, file, block_size=block_size or _BLOCK_BYTES, cache_options=cache_options, **others
        )

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """A file's bytes from a place up to another; places below zero count from the end.

        Raises:
            FileNotFoundError, PermissionError, OSError: as `ls`.
        """
        repository, file = self._readable(path)[1:]
        return self.read(repository, file, *slice(start, end).indices(file.size_bytes)[:2])

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: Sequence[int | None] | int | None,
        ends: Sequence[int | None] | int | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **_: Any,
    ) -> list[bytes | OSError]:
        """Ranges of files, all those of one path from one version. An error takes the place of its range, unless `on_error` is `raise`."""
        count = len(paths)
        firsts = starts if isinstance(starts, Sequence) else [starts] * count
        lasts = ends if isinstance(ends, Sequence) else [ends] * count
        if not len(firsts) == len(lasts) == count:
            raise ValueError("there have to be as many starts and ends as paths")
        known: dict[str, tuple[Repository, RepositoryFile]] = {}
        found: list[bytes | OSError] = []
        for path, first, last in zip(paths, firsts, lasts, strict=True):
            try:
                repository, file = known.get(path) or known.setdefault(path, self._readable(path)[1:])
                found.append(self.read(repository, file, *slice(first, last).indices(file.size_bytes)[:2]))
            except OSError as error:
                if on_error == "raise":
                    raise
                found.append(error)
        return found

    def read(self, repository: Repository, file: RepositoryFile, start: int, end: int) -> bytes:
        """Some bytes of a file of a repository.

        Raises:
            FileNotFoundError, PermissionError, OSError: as `ls`.
        """
        data = bytearray()
        with _as_os_errors(file.path):
            for piece in self.registry.read_file(repository, file.path, start, max(start, end)):
                data += piece  # it is valid until the next one
        return bytes(data)

    def _readable(self, path: str) -> tuple[_Place, Repository, RepositoryFile]:
        path = self._strip_protocol(path)
        place, repository = self._find(path)
        file = _file(repository, place.path)
        if file is not None:
            return place, repository, file
        if _has(repository, place.path):
            raise IsADirectoryError(errno.EISDIR, "a folder", path)
        raise _missing(path)

    def _find(self, path: str) -> tuple[_Place, Repository]:
        """The repository that a path is in, as it is now. Of two that it may be in, the one that has it."""
        found: list[tuple[_Place, Repository]] = []
        missing: list[RegistryError] = []
        with _as_os_errors(path):
            for place in _readings(path):
                try:
                    found.append((place, self.registry.repository(place.id, place.revision or _MAIN)))
                except (NotFound, InvalidReference) as error:
                    missing.append(error)
            if not found:
                raise missing[0]
            holding = [(place, repository) for place, repository in found if _has(repository, place.path)] or found
            if len(holding) > 1:
                raise Ambiguous(path, [_Place(place.id, _MAIN, place.path).at(place.path) for place, _ in holding])
        return holding[0]

    # -- what cannot be done

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        raise _read_only(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise _read_only(path)

    def rmdir(self, path: str) -> None:
        raise _read_only(path)

    def _rm(self, path: str) -> None:
        raise _read_only(path)

    def rm_file(self, path: str) -> None:
        raise _read_only(path)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise _read_only(path2)

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:
        raise _read_only(path)


@final
class CheckpointFile(AbstractBufferedFile):  # type: ignore[misc] # fsspec has no types
    """A file of one version, read in blocks ahead.

    Args:
        system: what opened it.
        place: where it is, its revision a commit.
        repository: as it was when the file was opened.
        file: which.
        others: as for every file of fsspec.
    """

    def __init__(
        self, system: CheckpointFileSystem, place: _Place, repository: Repository, file: RepositoryFile, **others: Any
    ) -> None:
        self._repository, self._file = repository, file
        super().__init__(system, place.at(place.path), "rb", size=file.size_bytes, **others)
        self.details = _described(place, repository, file)

    def _fetch_range(self, start: int, end: int) -> bytes:
        system: CheckpointFileSystem = self.fs
        return system.read(self._repository, self._file, start, end)


# -- paths


def _readings(path: str) -> Iterator[_Place]:
    """What a path may mean: with a revision one thing, without one a repository of one segment or of two."""
    parts = path.split("/")
    for count in (1, 2):
        name, at, revision = parts[count - 1].partition("@") if len(parts) >= count else ("", "", "")
        if at and all(parts[: count - 1]):
            id_ = "/".join([*parts[: count - 1], name])
            yield _Place(id_, unquote(revision), "/".join(parts[count:]))
            return
    for count in range(1, min(2, len(parts)) + 1):
        yield _Place("/".join(parts[:count]), "", "/".join(parts[count:]))


def _file(repository: Repository, path: str) -> RepositoryFile | None:
    return next((each for each in repository.files if each.path == path), None)


def _has(repository: Repository, path: str) -> bool:
    """Whether a repository has a file or folder of this path."""
    return not path or any(each.path == path or each.path.startswith(f"{path}/") for each in repository.files)


def _inside(place: _Place, repository: Repository) -> list[dict[str, Any]]:
    """A folder's files and folders; of a file, itself."""
    if file := _file(repository, place.path):
        return [_described(place, repository, file)]
    prefix = f"{place.path}/" if place.path else ""
    below = [each for each in repository.files if each.path.startswith(prefix)]
    files = [each for each in below if "/" not in each.path[len(prefix) :]]
    folders = {prefix + each.path[len(prefix) :].partition("/")[0] for each in below if each not in files}
    return [
        *(_folder(place.at(path)) for path in sorted(folders)),
        *(_described(_Place(place.id, place.revision, each.path), repository, each) for each in files),
    ]


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}


def _described(place: _Place, repository: Repository, file: RepositoryFile) -> dict[str, Any]:
    return {
        "name": place.at(file.path),
        "size": file.size_bytes,
        "type": "file",
        "ETag": file.etag,
        "sha256": file.sha256,
        "commit": repository.commit,
        "created": repository.created_at,
    }


# -- errors


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    """The registry's errors as users of file systems expect them, with their words."""
    try:
        yield
    except RegistryError as error:
        words = explain(error)
        said = f"{words.message}; {words.hint}" if words.hint else words.message
        match error:
            case NotFound() | InvalidReference():
                raise FileNotFoundError(errno.ENOENT, said, path) from error
            case AccessDenied():
                raise PermissionError(errno.EACCES, said, path) from error
            case Ambiguous() | Conflict():
                raise OSError(errno.EINVAL, said, path) from error
            case _:
                raise OSError(errno.EIO, said, path) from error


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _read_only(path: str) -> OSError:
    return OSError(errno.EROFS, "the registry is not written through its files: `ckpt register` does", path)


# -- connections


def _settings(said: Mapping[str, str]) -> Settings:
    """The settings of the environment, with what is said in place of it. A registry that is said is not the environment's server."""
    environment = dict(os.environ)
    if "server" not in said and not {"home", "database_url"}.isdisjoint(said):
        environment.pop("CKPT_SERVER", None)
    return Settings.from_environment(environment | {f"CKPT_{name.upper()}": value for name, value in said.items()})


@final
class _Connections:
    """The open registries of this process, by their settings: fsspec makes a file system for each thread. A fork opens its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, Settings], Registry] = {}
        os.register_at_fork(after_in_child=self._after_fork)
        atexit.register(self.close)

    def get(self, settings: Settings) -> Registry:
        """The registry that settings name."""
        with self._lock:
            key = (os.getpid(), settings)
            if key not in self._open:
                self._open[key] = connect(settings)
            return self._open[key]

    def close(self) -> None:
        """Release those that are this process's own."""
        with self._lock:
            for key in [each for each in self._open if each[0] == os.getpid()]:
                self._open.pop(key).close()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # whoever held it is not here


_CONNECTIONS = _Connections()
