"""Base models: fingerprint and record them, find the one an adapter was trained on, and see whether one is still what it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from registry.base_folders import AddedBase as AddedBase
from registry.base_folders import fingerprint_of, name_of_place, places_of_base
from registry.errors import Changed, Conflict, NotACheckpoint, PathNotFound, UnknownBase, Unreachable
from registry.fingerprint import DigestCache, architecture_digest, weights_digest
from registry.formats import Adapter
from registry.formats.base_model import BaseHead, read_base
from registry.locations import Location, local_folder, open_location
from registry.manifest import BaseFile, BaseModel, FileEntry, Fingerprint, utc_now
from registry.refs import AdapterName, Digest
from registry.settings import Settings
from registry.store import StoredFolder
from registry.storing import recording
from registry.workspace import Progress, Workspace, nothing_but, silent

_OF_ONE_MACHINE = ("local", "memory")  # besides paths and `file://`


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
    add = partial(_add_base, workspace, url, name=name, arch_version=arch_version, copy=copy, progress=progress)
    return recording(workspace, add)


def _add_base(
    workspace: Workspace, url: str, *, name: str, arch_version: str, copy: bool, progress: Progress
) -> AddedBase:
    with closing(open_location(url)) as location:
        head = read_base(location)
        files = head.files(location)
        fingerprint = fingerprint_of(workspace.cache, location, head, progress)
        entries = _copy(workspace, location, head, files) if copy else ()
        place: Location = StoredFolder(workspace.store, entries) if copy else location
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
        created_at=utc_now(),
        author=workspace.settings.author,
    )
    return _record(workspace, found, entries, location.url)


def receive_base(
    workspace: Workspace, base: BaseModel, copied: Sequence[FileEntry] = (), source: str = ""
) -> AddedBase:
    """Record a base model that a client has fingerprinted.

    Its digests of tensors are taken over: merging compares every tensor that it reads with them. Everything else follows from them and, where
    the files are in the store, from those.

    Args:
        base: as the client found it.
        copied: its files, where they were sent into the store.
        source: where they lay, which may name it.

    Raises:
        Changed: the client's fingerprint is not that of what it says, or of the files.
        NotACheckpoint, CorruptFile, UnsafePickle, NameTaken, Conflict: as `add_base`.
        BlobSwept, DamagedBlob: a file is not in the store (any more).
    """
    if base.name:
        AdapterName.parse(base.name)
    found = replace(base, in_store=bool(copied), author=workspace.settings.author, created_at=utc_now())
    if copied:
        place = StoredFolder(workspace.store, copied)
        head = read_base(place)
        found = replace(
            found, url=place.url, format=head.format, config=head.config, files=head.files(place), tensors=head.tensors
        )
    specs = [tensor.spec for tensor in found.tensors]
    expected = Fingerprint(
        architecture=architecture_digest(found.format, found.config, specs),
        weights=weights_digest(found.fingerprint.tensors),
        tensors=found.fingerprint.tensors,
    )
    if expected != found.fingerprint or {spec.name for spec in specs} != set(found.fingerprint.tensors):
        raise Changed(source or base.url, str(expected.weights), str(base.fingerprint.weights))
    return _record(workspace, found, tuple(copied), source or base.url)


def _record(workspace: Workspace, found: BaseModel, entries: tuple[FileEntry, ...], place: str) -> AddedBase:
    """Record a base model, or where one lies that is known."""
    name, arch_version = found.name, found.arch_version
    with workspace.writing() as change:
        workspace.check_stored(entries)
        known = change.catalog.bases.by_weights(found.digest)
        if known is not None:
            merged = _same_base(known, found, name)
            if merged != known:
                change.catalog.bases.update(merged, stored_entries(merged))
                change.record("base.move", known.name, url=merged.url, **nothing_but({"arch_version": arch_version}))
            return AddedBase(base=merged, created=False)
        base = replace(found, name=name or _free_name(change.catalog.bases.names(), place, found.digest))
        change.catalog.bases.add(base, entries)
        change.record("base.add", base.name, weights=base.digest.hex, url=base.url)
        return AddedBase(base=base, created=True)


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
    chosen = name_of_place(url)
    return f"{chosen}-{digest.short}" if chosen in taken else chosen


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
    for place in places_of_base(adapter.base_name, near, workspace.settings.hub_cache):
        try:
            return add_base(workspace, str(place), arch_version=arch_version, progress=progress).base
        except (NotACheckpoint, PathNotFound):
            continue
    with workspace.reading() as catalog:
        names = catalog.bases.names()
        if adapter.base_name in names:
            return catalog.bases.find(adapter.base_name)
    raise UnknownBase(adapter.base_name, names)


def open_base(workspace: Workspace, base: BaseModel) -> Location:
    """The folder that a base model is read from.

    Raises:
        PathNotFound: it is not there any more.
    """
    if not base.in_store:
        return open_location(base.url)
    return workspace.stored_folder(stored_entries(base), base.url.partition(":")[2])


def stored_entries(base: BaseModel) -> tuple[FileEntry, ...]:
    """The blobs of a base model that the registry keeps a copy of: a stored file's identity is its digest. Empty for others."""
    if not base.in_store:
        return ()
    return tuple(map(stored_entry, base.files))


def stored_entry(file: BaseFile) -> FileEntry:
    """The blob that a base model's file in the store is."""
    return FileEntry(path=file.path, size_bytes=file.size_bytes, digest=Digest.parse(file.identity))


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
        fingerprint = fingerprint_of(workspace.cache, location, head, progress)
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
        found = fingerprint_of(nowhere, location, read_base(location), progress, "verifying the base model")
    before, after = base.fingerprint.tensors, found.tensors
    return Verification(
        base=base,
        tensors=len(before),
        different=tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
        missing=tuple(sorted(before.keys() - after.keys())),
        unexpected=tuple(sorted(after.keys() - before.keys())),
    )


def check_reachable(settings: Settings, base: BaseModel) -> None:
    """See that every worker of a team can read a base model.

    Raises:
        Unreachable: it lies on the disk of one machine.
    """
    is_here = local_folder(base.url) is not None or base.url.partition("://")[0].lower() in _OF_ONE_MACHINE
    if settings.is_shared and not base.in_store and is_here:
        raise Unreachable(base.name, base.url)
