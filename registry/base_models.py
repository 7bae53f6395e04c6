"""Base models: fingerprint and record them, find the one an adapter was trained on, and see whether one is still what it was."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from registry.errors import Changed, Conflict, NotACheckpoint, PathNotFound, UnknownBase
from registry.fingerprint import DigestCache, architecture_digest, digest_tensors, weights_digest
from registry.formats import Adapter
from registry.formats.base_model import BaseHead, read_base
from registry.locations import Location, local_folder, open_location
from registry.manifest import BaseModel, FileEntry, Fingerprint
from registry.refs import AdapterName, Digest, nearest_name
from registry.store import StoredFolder
from registry.workspace import Progress, Workspace, nothing_but, silent

_EPOCH = datetime.fromtimestamp(0, UTC)
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
        found = _describe(workspace.cache, location, head, progress)
        entries = _copy(workspace, location, head, found) if copy else ()
    if entries:
        stored = StoredFolder(workspace.store, entries)
        found = replace(found, url=stored.url, in_store=True, files=head.files(stored))
    with workspace.writing() as change:
        workspace.check_stored(entries)
        found = replace(found, author=change.author, created_at=change.at, arch_version=arch_version)
        known = change.catalog.bases.by_weights(found.digest)
        if known is not None:
            merged = _same_base(known, found, name)
            if merged != known:
                change.catalog.bases.update(merged, stored_entries(merged))
                change.record("base.move", known.name, url=merged.url, **nothing_but({"arch_version": arch_version}))
            return AddedBase(base=merged, created=False)
        base = replace(found, name=name or _free_name(change.catalog.bases.all(), location.url, found.digest))
        change.catalog.bases.add(base, entries)
        change.record("base.add", base.name, weights=base.digest.hex, url=base.url)
        return AddedBase(base=base, created=True)


def _describe(cache: DigestCache, location: Location, head: BaseHead, progress: Progress) -> BaseModel:
    total = sum(tensor.spec.size_bytes for tensor in head.tensors)
    files = head.files(location)
    digests = digest_tensors(
        location, head.tensors, cache=cache, advance=lambda done: progress("fingerprinting the base model", done, total)
    )
    specs = [tensor.spec for tensor in head.tensors]
    return BaseModel(
        name="",
        url=location.url,
        in_store=False,
        format=head.format,
        fingerprint=Fingerprint(
            architecture=architecture_digest(head.format, head.config, specs),
            weights=weights_digest(digests),
            tensors=digests,
        ),
        arch_version="",
        config=head.config,
        files=files,
        tensors=head.tensors,
        created_at=_EPOCH,
        author="",
    )


def _copy(workspace: Workspace, location: Location, head: BaseHead, found: BaseModel) -> tuple[FileEntry, ...]:
    entries = []
    for file in found.files:
        blob = workspace.store.put_file(location, file.path)
        entries.append(FileEntry(path=file.path, size_bytes=blob.size_bytes, digest=blob.digest, sha256=blob.sha256))
    if head.files(location) != found.files:
        raise Changed(location.url, "the files whose fingerprint was taken", "newer ones: something is writing there")
    return tuple(entries)


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


def _free_name(known: list[BaseModel], url: str, digest: Digest) -> str:
    chosen = _name_of_place(url)
    return f"{chosen}-{digest.short}" if any(base.name == chosen for base in known) else chosen


def _name_of_place(url: str) -> str:
    if match := _HUB_SNAPSHOT.search(url):
        return "/".join(part for part in (match["namespace"], match["name"]) if part)
    return str(nearest_name(url.rstrip("/").rsplit("/", 1)[-1], "base"))


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
    with workspace.reading() as catalog:
        known = {base.name: base for base in catalog.bases.all()}
    for place in _places(adapter.base_name, near, workspace.settings.hub_cache):
        try:
            return add_base(workspace, str(place), arch_version=arch_version, progress=progress).base
        except (NotACheckpoint, PathNotFound):
            continue
    if adapter.base_name in known:
        return known[adapter.base_name]
    raise UnknownBase(adapter.base_name, sorted(known))


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
        found = _describe(workspace.cache, location, head, progress)
    if found.fingerprint != base.fingerprint:
        return base, tuple(sorted({file.path for file in {*files} ^ {*base.files}}))
    moved = replace(base, files=found.files, tensors=found.tensors, config=found.config)
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
        found = _describe(
            nowhere,
            location,
            read_base(location),
            lambda what, done, total: progress("verifying the base model", done, total),
        )
    before, after = base.fingerprint.tensors, found.fingerprint.tensors
    return Verification(
        base=base,
        tensors=len(before),
        different=tuple(sorted(name for name in before.keys() & after.keys() if before[name] != after[name])),
        missing=tuple(sorted(before.keys() - after.keys())),
        unexpected=tuple(sorted(after.keys() - before.keys())),
    )
