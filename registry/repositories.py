"""Adapters, base models and what merging makes of them as repositories: their files, and any bytes of these.

What a merged model's id means need not exist: unless the store has it, its weights are computed while they are read. Plans and what was
found by a commit are remembered, as clients ask for one file after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import PurePosixPath
from typing import final

from registry.base_models import stored_entry
from registry.db.catalog import Catalog
from registry.db.repositories import KnownBase, Newest
from registry.errors import (
    BaseChanged,
    Changed,
    InvalidInput,
    NothingMerged,
    PathNotFound,
    Refused,
    UnknownRepository,
    UnknownRevision,
    Unreachable,
)
from registry.formats.base_model import INDEX_FILE, index_of
from registry.formats.peft_tuners import ROWS
from registry.locations import Location, local_folder, open_location, pieces_of
from registry.manifest import BaseFile, Checkpoint, FileEntry, Level, Merged, Recipe, Report
from registry.merge.plan import PROVENANCE_FILE
from registry.merging import Planned, plan
from registry.mixing import Mixture
from registry.refs import CheckpointRef, Digest
from registry.remembered import Remembered
from registry.repository_ids import (
    COMMIT,
    MAIN,
    MERGED,
    Meaning,
    adapter_commit,
    base_commit,
    check_base_revision,
    checkpoint_at,
    is_seen,
    meaning,
    merged_commit,
    name_of,
    names_merged,
    recipe_alone,
    recipes,
)
from registry.results import KeptRecipe, Repository, RepositoryFile, RepositoryLine, RepositoryRef
from registry.virtual import VirtualModels
from registry.workspace import Workspace, nothing_but

Bytes = bytes | memoryview
_MOST_PLANS, _MOST_SOURCES = 64, 512
_MOST_LISTED = 100_000
_MERGEABLE = frozenset({"lora", "dora", *ROWS})
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".lora", ".ckpt", ".gguf"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Files that are blobs of the store; `index` as of `_Elsewhere`."""

    entries: tuple[FileEntry, ...]
    index: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Elsewhere:
    """The files of a base model outside the store. `index` is its index file, which is made, as none is recorded; or empty."""

    base: KnownBase
    index: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Virtual:
    """A merged model that is nowhere: what makes it, of which checkpoints and base model."""

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    base: KnownBase

    @property
    def key(self) -> tuple[str, str]:
        return self.recipe.digest.hex, base_commit(self.base.digest, self.base.files)


_Source = _Stored | _Elsewhere | _Virtual
_Found = tuple[Repository, _Source]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A plan with the sizes of the files that it makes."""

    planned: Planned
    files: Mapping[str, int]
    base_commit: str


@final
class Repositories:
    """The repositories of a registry, with what a process remembers of them. Any thread may use it.

    Args:
        workspace: where everything is.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._models = VirtualModels(workspace)
        self._plans = Remembered[_Model](_MOST_PLANS)
        self._sources = Remembered[_Source](_MOST_SOURCES)
        self._indexes = Remembered[bytes](_MOST_PLANS)

    def close(self) -> None:
        """Release what is open; whoever still reads comes to the end."""
        self._models.close()

    def find(self, id_: str, revision: str = MAIN, namespaces: Sequence[str] = ()) -> Repository:
        """A repository at a revision; see `registry.service.Registry.repository`."""
        repository, source = self._find(id_, revision, namespaces)
        self._sources.get(_place(repository), lambda: source)
        return repository

    def _find(self, id_: str, revision: str, namespaces: Sequence[str] = ()) -> _Found:
        with self._workspace.reading() as catalog:
            found = meaning(catalog, id_, namespaces)
            if found.base is not None:
                check_base_revision(catalog, id_, found.base, revision, namespaces)
                return _of_base(id_, found.base, self._index(catalog, found.base))
            if found.recipe is not None:
                making = _making_of_recipe(catalog, found.recipe)
            else:
                checkpoint = checkpoint_at(catalog, id_, found, revision)
                if found.kind == "adapter":
                    return _of_checkpoint(id_, checkpoint)
                making = _making_of_checkpoint(catalog, checkpoint)
        repository, source = self._made(id_, making)
        named_by = making.named_by.hex if found.recipe is None else ""
        if not _is_at(repository, revision, named_by):
            raise UnknownRevision(f"{id_}@{revision}", [MAIN])
        return repository, source

    def _index(self, catalog: Catalog, base: KnownBase) -> bytes:
        key = base_commit(base.digest, base.files)
        return self._indexes.get(key, lambda: index_of(catalog.bases.find(base.digest.hex).tensors))

    # -- merged models

    def _made(self, id_: str, making: _Making) -> _Found:
        what = making.what
        if making.stored is not None:
            # They are what the recipe gives, whatever has become of the base model, and have the names of the computed ones.
            entries = tuple(entry for entry in making.stored.files if entry.path != PROVENANCE_FILE)
            sizes = {entry.path: entry.size_bytes for entry in entries}
            return _of_recipe(id_, making, what.key[1], sizes), _Stored(entries=entries)
        if not _is_current(what.base):
            self._plans.drop(what.key)
        model = self._model(id_, what)
        return _of_recipe(id_, making, model.base_commit, model.files), what

    def _model(self, id_: str, what: _Virtual) -> _Model:
        """The plan of a merged model, made if need be.

        Raises:
            UnknownRepository: its checkpoints cannot be merged so; tells why.
            Unreachable: the base model is not where it was recorded.
        """
        try:
            model = self._plans.get(what.key, lambda: self._planned(what))
        except Refused as error:
            raise UnknownRepository(id_, reason=_why(error.report)) from error
        except NothingMerged as error:
            raise UnknownRepository(id_, reason="merging would change nothing: all factors are zero") from error
        except PathNotFound as error:
            raise Unreachable(what.base.name, what.base.url) from error
        if model.planned.plan.recipe.digest != what.recipe.digest:
            raise UnknownRepository(id_, reason="its recipe is of another version, which computed in another way")
        return model

    def _planned(self, what: _Virtual) -> _Model:
        recipe = what.recipe
        options = {name: value for name, value in recipe.options.items() if not isinstance(value, tuple)}
        allow_lossy = bool(options.pop("allow_lossy", False))
        mixture = Mixture(method=recipe.method, weights=tuple(each.weight for each in recipe.inputs), options=options)
        planned = plan(self._workspace, what.checkpoints, mixture, dtype=recipe.dtype, allow_lossy=allow_lossy)
        base = planned.plan.base
        sizes = dict(self._models.open(planned).files)
        return _Model(planned=planned, files=sizes, base_commit=base_commit(base.digest, base.files))

    # -- bytes

    def read(self, repository: Repository, path: str, start: int = 0, end: int | None = None) -> Iterator[Bytes]:
        """Bytes of a file; see `registry.service.Registry.read_file`."""
        file = next((each for each in repository.files if each.path == path), None)
        if file is None:
            raise PathNotFound(f"{repository.id}/{path}")
        source = self._sources.get(_place(repository), lambda: self._again(repository))
        end = file.size_bytes if end is None else min(end, file.size_bytes)
        if isinstance(source, _Virtual):
            return self._computed(repository, source, path, start, end)
        if source.index and path == INDEX_FILE:
            return iter((memoryview(source.index)[start:end],))
        if isinstance(source, _Elsewhere):
            return _of_folder(source.base, path, start, end)
        folder = self._workspace.stored_folder(source.entries, repository.commit)
        return pieces_of(folder.open(path), folder.url, start, end)

    def _again(self, repository: Repository) -> _Source:
        return self._find(repository.id, repository.commit)[1]

    def _computed(self, repository: Repository, what: _Virtual, path: str, start: int, end: int) -> Iterator[Bytes]:
        model = self._model(repository.id, what)
        if not names_merged(repository.commit, what.recipe.digest, model.base_commit):
            raise UnknownRevision(f"{repository.id}@{repository.commit}", [MAIN])
        try:
            return self._models.open(model.planned).read(path, start, end)
        except PathNotFound as error:
            raise Unreachable(what.base.name, what.base.url) from error
        except Changed:
            self._plans.drop(what.key)  # whoever asks for the repository anew is told what it is now
            raise

    # -- names and lists

    def refs(self, id_: str, namespaces: Sequence[str] = ()) -> list[RepositoryRef]:
        """The names of a repository's states; see `registry.service.Registry.repository_refs`."""
        with self._workspace.reading() as catalog:
            found = meaning(catalog, id_, namespaces)
            if found.adapter is not None and found.version is None:
                return _names_of(catalog, found)
        return [RepositoryRef(name=MAIN, kind="branch", commit=self._find(id_, MAIN, namespaces)[0].commit)]

    def listed(self, search: str = "", limit: int = 100, namespaces: Sequence[str] = ()) -> list[RepositoryLine]:
        """Repositories; see `registry.service.Registry.repositories`."""
        if not 1 <= limit <= _MOST_LISTED:
            raise InvalidInput("limit", limit, f"expected 1 to {_MOST_LISTED}")
        with self._workspace.reading() as catalog:
            adapters = catalog.repositories.newest(namespaces)
            bases = catalog.repositories.bases()
            kept = [each for each in recipes(catalog, "") if is_seen(each.checkpoints, namespaces)]
        found = chain(
            chain.from_iterable(map(_lines_of, adapters)), map(_line_of_base, bases), map(_line_of_recipe, kept)
        )
        wanted = [line for line in found if search.lower() in line.id.lower()]
        return sorted(wanted, key=lambda line: line.created_at, reverse=True)[:limit]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Making:
    """A merged model to be told of: what makes it, what its commit is looked up by, and its copy in the store, if there is one."""

    what: _Virtual
    named_by: Digest
    created_at: datetime
    author: str
    stored: Merged | None


def _making_of_checkpoint(catalog: Catalog, checkpoint: Checkpoint) -> _Making:
    recipe = recipe_alone(checkpoint.base, checkpoint.digest)
    return _Making(
        what=_Virtual(recipe=recipe, checkpoints=(checkpoint,), base=_base_of(catalog, checkpoint.base)),
        named_by=checkpoint.digest,
        created_at=checkpoint.created_at,
        author=checkpoint.author,
        stored=_stored(catalog, recipe),
    )


def _making_of_recipe(catalog: Catalog, kept: KeptRecipe) -> _Making:
    recipe = kept.recipe
    checkpoints = tuple(catalog.checkpoints.resolve(CheckpointRef.parse(ref)) for ref in kept.checkpoints)
    return _Making(
        what=_Virtual(recipe=recipe, checkpoints=checkpoints, base=_base_of(catalog, recipe.base)),
        named_by=recipe.digest,
        created_at=kept.created_at,
        author=kept.author,
        stored=_stored(catalog, recipe),
    )


def _base_of(catalog: Catalog, weights: Digest) -> KnownBase:
    return catalog.repositories.bases_starting(weights.hex)[0]


def _stored(catalog: Catalog, recipe: Recipe) -> Merged | None:
    merged = catalog.merged.find(recipe.digest)
    return merged if merged is not None and "" in merged.locations else None


def _of_recipe(id_: str, making: _Making, base: str, sizes: Mapping[str, int]) -> Repository:
    recipe = making.what.recipe.digest
    return Repository(
        id=id_,
        kind="merged",
        commit=merged_commit(making.named_by, recipe, base),
        files=tuple(
            RepositoryFile(path=path, size_bytes=sizes[path], etag=name_of([recipe.hex, base, path]))
            for path in sorted(sizes)
        ),
        checkpoints=tuple(each.ref for each in making.what.checkpoints),
        base=making.what.base.name,
        created_at=making.created_at,
        author=making.author,
        recipe=recipe,
        is_stored=making.stored is not None,
    )


def _is_at(repository: Repository, revision: str, named_by: str) -> bool:
    """Whether a merged model is what a revision asked for. A commit that was known once may be made no longer: the base model's files are
    others now, or merging is carried out in another way.

    Args:
        repository: what was found.
        revision: what was asked for.
        named_by: the digest of the checkpoint that the revision was looked up by; empty for a recipe's, which has no other names.
    """
    if named_by and not COMMIT.fullmatch(revision):
        return True
    return revision in (MAIN, repository.commit) or (named_by != "" and named_by.startswith(revision))


def _is_current(base: KnownBase) -> bool:
    """Whether the files of a base model on this machine are the recorded ones. Of others that is seen when they are read."""
    if base.in_store or local_folder(base.url) is None:
        return True
    try:
        with closing(open_location(base.url)) as folder:
            return all(folder.identity(file.path) == file.identity for file in base.files)
    except PathNotFound:
        return False


def _why(report: Report) -> str:
    """What refuses a merge, in a line."""
    refused = [finding for finding in report.findings if finding.level is Level.REFUSED]
    return "; ".join(f"{each.where}: {each.found or each.code} ({each.advice})" for each in refused[:3])


# -- repositories of what there is


def _place(repository: Repository) -> tuple[str, str, bool]:
    return repository.id, repository.commit, repository.is_stored


def _of_checkpoint(id_: str, checkpoint: Checkpoint) -> _Found:
    entries = checkpoint.manifest.files
    repository = Repository(
        id=id_,
        kind="adapter",
        commit=adapter_commit(checkpoint.digest),
        files=tuple(_stored_file(entry) for entry in sorted(entries, key=lambda entry: entry.path)),
        checkpoints=(checkpoint.ref,),
        base=checkpoint.base_name,
        created_at=checkpoint.created_at,
        author=checkpoint.author,
    )
    return repository, _Stored(entries=entries)


def _stored_file(entry: FileEntry) -> RepositoryFile:
    sha256 = entry.sha256 if PurePosixPath(entry.path).suffix in _WEIGHTS else ""
    return RepositoryFile(
        path=entry.path, size_bytes=entry.size_bytes, etag=sha256 or entry.digest.hex[:40], sha256=sha256
    )


def _of_base(id_: str, base: KnownBase, index: bytes) -> _Found:
    files = {file.path: (file.size_bytes, _tag_of(base, file)) for file in base.files}
    if index:
        files[INDEX_FILE] = (len(index), name_of([base.digest.hex, INDEX_FILE, index.decode()]))
    repository = Repository(
        id=id_,
        kind="base",
        commit=base_commit(base.digest, base.files),
        files=tuple(
            RepositoryFile(path=path, size_bytes=size, etag=tag) for path, (size, tag) in sorted(files.items())
        ),
        checkpoints=(),
        base=base.name,
        created_at=base.created_at,
        author=base.author,
    )
    if not base.in_store:
        return repository, _Elsewhere(base=base, index=index)
    return repository, _Stored(entries=tuple(stored_entry(file) for file in base.files), index=index)


def _tag_of(base: KnownBase, file: BaseFile) -> str:
    """The SHA-256 of a base model's file may become known later; what names a file does not change."""
    return name_of([base.digest.hex, file.path, file.size_bytes, file.identity])


def _of_folder(base: KnownBase, path: str, start: int, end: int) -> Iterator[Bytes]:
    """Bytes of a base model's file outside the store.

    Raises:
        Unreachable: the base model is not where it was recorded.
        BaseChanged: the file is not the recorded one; at once, or before the last of the bytes.
    """
    identity = next(file.identity for file in base.files if file.path == path)
    try:
        folder = open_location(base.url)
    except PathNotFound as error:
        raise Unreachable(base.name, base.url) from error
    _see_unchanged(folder, path, identity)
    return _flowing(folder, path, identity, start, end)


def _flowing(folder: Location, path: str, identity: str, start: int, end: int) -> Iterator[Bytes]:
    with closing(folder):
        for piece in pieces_of(folder.open(path), folder.url, start, end):
            start += len(piece)
            if start == end:
                _see_unchanged(folder, path, identity)
            yield piece
        if start < end:
            raise BaseChanged(path, "the file that was recorded", "a shorter one")


def _see_unchanged(folder: Location, path: str, identity: str) -> None:
    try:
        found = folder.identity(path)
    except PathNotFound:
        found = ""
    if found != identity:
        raise BaseChanged(path, "the file that was recorded", "another one" if found else "none")


# -- names and lists


def _names_of(catalog: Catalog, found: Meaning) -> list[RepositoryRef]:
    """Aliases and environments, which move, and versions, which do not. An alias counts before an environment of its name."""
    if found.adapter is None:
        return []
    names = catalog.repositories.names(found.adapter)
    bases = {each.base: _base_of(catalog, each.base) for each in names} if found.kind == "merged" else {}

    def commit(digest: Digest, weights: Digest) -> str:
        if found.kind == "adapter":
            return adapter_commit(digest)
        base = bases[weights]
        return merged_commit(digest, recipe_alone(weights, digest).digest, base_commit(weights, base.files))

    commits = {each: commit(each.digest, each.base) for each in names}
    versions = {each.name: commits[each] for each in names if each.kind == "version"}
    moving = {each.name: commits[each] for kind in ("environment", "alias") for each in names if each.kind == kind}
    newest = list(versions.values())[-1]
    return [
        *(RepositoryRef(name=name, kind="branch", commit=at) for name, at in ({MAIN: newest} | moving).items()),
        *(RepositoryRef(name=name, kind="tag", commit=at) for name, at in versions.items()),
    ]


def _lines_of(newest: Newest) -> Iterator[RepositoryLine]:
    """An adapter, and its merged model, unless nothing of its method can be merged."""
    name = str(newest.adapter)
    yield RepositoryLine(id=name, kind="adapter", created_at=newest.created_at, author=newest.author)
    if newest.method in _MERGEABLE:
        yield RepositoryLine(id=f"{name}{MERGED}", kind="merged", created_at=newest.created_at, author=newest.author)


def _line_of_base(base: KnownBase) -> RepositoryLine:
    return RepositoryLine(id=base.name, kind="base", created_at=base.created_at, author=base.author)


def _line_of_recipe(kept: KeptRecipe) -> RepositoryLine:
    return RepositoryLine(id=kept.repository, kind="merged", created_at=kept.created_at, author=kept.author)


# -- recipes


def save_recipe(workspace: Workspace, planned: Planned, note: str = "") -> KeptRecipe:
    """Keep the recipe of a plan without carrying it out; one that is kept stays as it is."""
    recipe = planned.plan.recipe
    with workspace.writing() as change:
        for known in change.catalog.recipes.starting(recipe.digest.hex):
            return known
        first, *others = planned.together.checkpoints
        kept = change.catalog.recipes.add(
            recipe, planned.together.checkpoints, note=note, author=change.author, at=change.at
        )
        detail = nothing_but({"with": [each.ref for each in others], "note": note})
        change.record("recipe.save", first.ref, recipe=recipe.digest.hex, **detail)
        return kept


def remove_recipe(workspace: Workspace, recipe: str) -> KeptRecipe:
    """Keep a recipe no longer; see `registry.service.Registry.remove_recipe`."""
    with workspace.writing() as change:
        kept = change.catalog.recipes.remove(recipe)
        first, *others = kept.checkpoints
        detail = nothing_but({"with": others, "note": kept.note})
        change.record("recipe.remove", first, recipe=kept.recipe.digest.hex, **detail)
        return kept
