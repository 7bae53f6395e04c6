"""Base models: fingerprint and record them, find the one an adapter was trained on, and see whether one is still what it was."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from registry.errors import Changed, Conflict, NotACheckpoint, PathNotFound, UnknownBase
from registry.fingerprint import DigestCache, architecture_digest, digest_tensors, weights_digest
from registry.formats import Adapter
from registry.formats.base_model import RUN_FOLDER, BaseHead, read_base
from registry.locations import Location, local_folder, open_location
from registry.manifest import BaseFile, BaseModel, FileEntry, Fingerprint
from registry.refs import AdapterName, Digest, nearest_name
from registry.store import StoredFolder
from registry.workspace import Progress, Workspace, nothing_but, silent

_HUB_SNAPSHOT = re.compile(r"models--(?:(?P<namespace>.+?)--)?(?P<name>.+)/snapshots/[^/]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedBase:
    """A base model that was asked to be recorded; `created` is False when these weights were known."""

    base: BaseModel
    created: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A base model compared with its fingerprint, tensor by tensor."""

    base: BaseModel
    tensors: int
    different: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def is_intact(self) -> bool:
        """Every tensor is what it was, and no other is there."""
        return not (self.different or self.missing or self.unexpected)


def add_base(
    workspace: Workspace,
    url: str,
    *,
    name: str = "",
    arch_version: str = "",
    copy: bool = False,
    progress: Progress = silent,
) -> AddedBase:
    """Fingerprint a base model and record where it is.

    Weights that are known already keep their name; the place they were found at now is recorded instead of the old one.

    Args:
        url: a path or fsspec URL.
        name: what to call it; taken from the place when empty.
        arch_version: the caller's own label for its architecture.
        copy: put its files into the store.

    Raises:
        NotACheckpoint, CorruptFile, UnsafePickle: no base model there, or a damaged one.
        NameTaken: other weights have this name.
        Changed: a file was written to while it was copied.
        Conflict: the weights are known under another name, architecture or label.
    """
    if name:
        AdapterName.parse(name)
    with closing(open_location(url)) as location:
        head = read_base(location)
        files = head.files(location)
        fingerprint = _fingerprint(workspace.cache, location, head, progress)
        entries = _copy(workspace, location, head, files) if copy else ()
        place: Location = StoredFolder(workspace.store, entries) if copy else location
    with workspace.writing() as change:
        workspace.check_stored(entries)
        found = BaseModel(
            name=name,
            url=place.url,
            in_store=copy,
            format=head.format,
            fingerprint=fingerprint,
            arch_version=arch_version,
            config=head.config,
            files=head.files(place) if copy else files,
            tensors=head.tensors,
            created_at=change.at,
            author=change.author,
        )
        known = change.catalog.bases.by_weights(found.digest)
        if known is not None:
            merged = _same_base(known, found, name)
            if merged != known:
                change.catalog.bases.update(merged, stored_entries(merged))
                change.record("base.move", known.name, url=merged.url, **nothing_but({"arch_version": arch_version}))
            return AddedBase(base=merged, created=False)
        base = replace(found, name=name or _free_name(change.catalog.bases.names(), location.url, found.digest))
        change.catalog.bases.add(base, entries)
        change.record("base.add", base.name, weights=base.digest.hex, url=base.url)
        return AddedBase(base=base, created=True)


def _fingerprint(
    cache: DigestCache,
    location: Location,
    head: BaseHead,
    progress: Progress,
    what: str = "fingerprinting the base model",
) -> Fingerprint:
    total = sum(tensor.spec.size_bytes for tensor in head.tensors)
    digests = digest_tensors(location, head.tensors, cache=cache, advance=lambda done: progress(what, done, total))
    return Fingerprint(
        architecture=architecture_digest(head.format, head.config, [tensor.spec for tensor in head.tensors]),
        weights=weights_digest(digests),
        tensors=digests,
    )


def _copy(
    workspace: Workspace, location: Location, head: BaseHead, files: tuple[BaseFile, ...]
) -> tuple[FileEntry, ...]:
    entries = workspace.store_files(location, [file.path for file in files])
    if head.files(location) != files:
        raise Changed(location.url, "the files whose fingerprint was taken", "newer ones: something is writing there")
    return entries


def _same_base(known: BaseModel, found: BaseModel, name: str) -> BaseModel:
    """Weights that are recorded already, at their new place; a copy in the store stays the place to read from."""
    if name and name != known.name:
        raise Conflict(name, f"these weights are recorded as {known.name}")
    if known.fingerprint.architecture != found.fingerprint.architecture:
        raise Conflict(known.name, "the same weights are recorded with another configuration")
    if known.arch_version and found.arch_version and known.arch_version != found.arch_version:
        raise Conflict(known.name, f"recorded as architecture version {known.arch_version}")
    moved = known if known.in_store and not found.in_store else found
    return replace(
        moved,
        name=known.name,
        arch_version=found.arch_version or known.arch_version,
        created_at=known.created_at,
        author=known.author,
    )


def _free_name(taken: list[str], url: str, digest: Digest) -> str:
    chosen = _name_of_place(url)
    return f"{chosen}-{digest.short}" if chosen in taken else chosen


def _name_of_place(url: str) -> str:
    if match := _HUB_SNAPSHOT.search(url):
        return "/".join(part for part in (match["namespace"], match["name"]) if part)
    parent, _, name = url.rstrip("/").rpartition("/")
    if RUN_FOLDER.fullmatch(name):  # what many runs call a step says less than which run it is of
        run = parent.rpartition("/")[2]
        name = run if name == "final" else f"{run}-{name}"
    return str(nearest_name(name, "base"))


def find_base(workspace: Workspace, text: str, *, arch_version: str = "", progress: Progress = silent) -> BaseModel:
    """The base model that a name, digest, path or URL means; one that is not recorded yet is.

    Raises:
        UnknownBase: no such name, and no base model at such a place.
    """
    try:
        with workspace.reading() as catalog:
            return catalog.bases.find(text)
    except UnknownBase as unknown:
        try:
            return add_base(workspace, text, arch_version=arch_version, progress=progress).base
        except PathNotFound:
            raise unknown from None


def base_of_adapter(
    workspace: Workspace, adapter: Adapter, near: str, *, arch_version: str = "", progress: Progress = silent
) -> BaseModel:
    """The base model that an adapter's files name: recorded under that name, or at one of the places where it would lie.

    Args:
        near: the adapter's own folder; relative paths are tried from there and its parents.

    Raises:
        UnknownBase: not found; the caller has to say which it is.
    """
    if not adapter.base_name:
        raise UnknownBase("(the files do not name one)")
    for place in _places(adapter.base_name, near, workspace.settings.hub_cache):
        try:
            return add_base(workspace, str(place), arch_version=arch_version, progress=progress).base
        except (NotACheckpoint, PathNotFound):
            continue
    with workspace.reading() as catalog:
        names = catalog.bases.names()
        if adapter.base_name in names:
            return catalog.bases.find(adapter.base_name)
    raise UnknownBase(adapter.base_name, names)


def _places(name: str, near: str, hub_cache: Path) -> Iterator[Path]:
    """Where a base model called so may lie: a path from here or from around the adapter, in litgpt's `checkpoints/`, in the Hub's cache."""
    folder = local_folder(near)
    parents = [folder, *list(folder.parents)[:3]] if folder is not None else []
    for start in (Path.cwd(), *parents):
        for place in (start / name, start / "checkpoints" / name):
            if os.path.isdir(place):  # unlike Path.is_dir, false for a name that is too long
                yield place
    main = hub_cache / f"models--{name.replace('/', '--')}" / "refs" / "main"
    if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name) and os.path.isfile(main):
        yield main.parents[1] / "snapshots" / main.read_text(encoding="utf-8").strip()


def open_base(workspace: Workspace, base: BaseModel) -> Location:
    """The folder that a base model is read from.

    Raises:
        PathNotFound: it is not there any more.
    """
    if not base.in_store:
        return open_location(base.url)
    return StoredFolder(workspace.store, stored_entries(base), base.url.partition(":")[2])


def stored_entries(base: BaseModel) -> tuple[FileEntry, ...]:
    """The blobs of a base model that the registry keeps a copy of: a stored file's identity is its digest. Empty for others."""
    if not base.in_store:
        return ()
    return tuple(
        FileEntry(path=file.path, size_bytes=file.size_bytes, digest=Digest.parse(file.identity)) for file in base.files
    )


def current_base(
    workspace: Workspace, base: BaseModel, progress: Progress = silent
) -> tuple[BaseModel, tuple[str, ...]]:
    """A base model as it lies there now, and the files of it that changed so that it is another model.

    Files that are the same by identity are trusted here (merging hashes what it reads). Others are read: a copied or touched file, or a new
    tokenizer, is no change of the model.

    Raises:
        PathNotFound: it is not there any more.
        NotACheckpoint, CorruptFile: it is not readable as a model any more.
    """
    with closing(open_base(workspace, base)) as location:
        head = read_base(location)
        files = head.files(location)
        if files == base.files:
            return base, ()
        fingerprint = _fingerprint(workspace.cache, location, head, progress)
    if fingerprint != base.fingerprint:
        return base, tuple(sorted({file.path for file in {*files} ^ {*base.files}}))
    moved = replace(base, files=files, tensors=head.tensors, config=head.config)
    with workspace.writing() as change:
        change.catalog.bases.update(moved, stored_entries(moved))
    return moved, ()


def verify_base(workspace: Workspace, base: BaseModel, progress: Progress = silent) -> Verification:
    """Read every tensor of a base model, whatever the cache says, and compare it with the fingerprint.

    Raises:
        PathNotFound: it is not there any more.
        NotACheckpoint, CorruptFile: it is not readable as a model any more.
    """
    nowhere = DigestCache(Path(os.devnull))
    with closing(open_base(workspace, base)) as location:
        found = _fingerprint(nowhere, location, read_base(location), progress, "verifying the base model")
    before, after = base.fingerprint.tensors, found.tensors
    return Verification(
        base=base,
        tensors=len(before),
        different=tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
        missing=tuple(sorted(before.keys() - after.keys())),
        unexpected=tuple(sorted(after.keys() - before.keys())),
    )
