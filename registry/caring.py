"""See whether everything that the registry needs is there and is what was recorded. Nothing is changed, and nothing repaired."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from registry.base_models import verify_base
from registry.errors import DamagedBlob, InvalidInput, RegistryError
from registry.locations import Location, local_folder, open_location
from registry.manifest import BaseModel, Merged
from registry.merge.sinks import digest_of_stream
from registry.refs import Digest
from registry.wording import explain
from registry.workspace import Progress, Workspace, silent

_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not as it was recorded: a blob, a file elsewhere, or a row of the database; and what needs it."""

    what: str
    expected: str
    found: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCheck:
    """How many objects were looked at, how many bytes were read for it, and everything that is wrong."""

    objects: int
    read_bytes: int
    damages: tuple[Damage, ...]

    @property
    def is_sound(self) -> bool:
        """Nothing is missing or damaged."""
        return not self.damages


@dataclass(frozen=True, slots=True)
class _Subset:
    """The n-th of t parts of all digests: which one a digest is in, its first digits say."""

    number: int = 1
    count: int = 1

    def has(self, digest: Digest) -> bool:
        return int(digest.hex[:8], 16) % self.count == self.number - 1


def verify(
    workspace: Workspace, *, read_data: bool = False, subset: str = "", progress: Progress = silent
) -> StoreCheck:
    """Look for every object that something needs, with the size that is recorded, in the store and where models lie otherwise.

    Args:
        workspace: whose.
        read_data: also read the bytes, all of them, and compare digests.
        subset: only the n-th of t parts, as `1/10`: the same objects each time, and after all t of them every object. Empty: everything.
        progress: told of the bytes that are read.

    Raises:
        InvalidInput: no such part.
    """
    part = _parse(subset)
    with workspace.reading() as catalog:
        wanted = {digest: size for digest, size in catalog.needs.sizes().items() if part.has(digest)}
        gaps = list(catalog.needs.gaps()) if part.number == 1 else []
        bases = [base for base in catalog.bases.all() if not base.in_store and part.has(base.digest)]
        merged = [each for each in catalog.merged.all() if part.has(each.digest)]
    damages = [
        *(Damage(what="a record", expected=gap.expected, found=gap.found, needed_by=(gap.owner,)) for gap in gaps),
        *_needed(workspace, _blobs(workspace, wanted, read_data=read_data, progress=progress)),
    ]
    places = [*_bases(workspace, bases, read_data=read_data, progress=progress), *_models(merged, read_data=read_data)]
    damages += [damage for found in places for damage in found]
    read = sum(wanted.values()) + sum(base.size_bytes for base in bases) if read_data else 0
    return StoreCheck(objects=len(wanted) + len(places), read_bytes=read, damages=tuple(damages))


def _parse(subset: str) -> _Subset:
    if not subset:
        return _Subset()
    number, _, count = subset.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 1_000_000):
        raise InvalidInput("subset", subset, "expected n/t, such as 1/10")
    return _Subset(int(number), int(count))


# -- the store


def _blobs(
    workspace: Workspace, wanted: Mapping[Digest, int], *, read_data: bool, progress: Progress
) -> dict[Digest, tuple[str, str]]:
    """Blobs that look wrong, with what was expected and what was found."""
    store, total = workspace.store, sum(wanted.values())
    there = {digest: size_bytes for digest, size_bytes in store.blobs() if digest in wanted}

    def look(digest: Digest) -> tuple[str, str] | None:
        try:
            if there.get(digest) != wanted[digest] and (found := store.size(digest)) != wanted[digest]:
                return f"{wanted[digest]} bytes", f"{found} bytes"
            if read_data:
                store.verify(digest)
        except DamagedBlob as error:
            return error.expected, error.found
        if read_data:
            progress("verifying", wanted[digest], total)
        return None

    suspects = sorted(digest for digest in wanted if read_data or there.get(digest) != wanted[digest])
    with ThreadPoolExecutor(_THREADS if local_folder(store.url) is None else os.cpu_count()) as threads:
        return {digest: found for digest, found in zip(suspects, threads.map(look, suspects), strict=True) if found}


def _needed(workspace: Workspace, suspects: Mapping[Digest, tuple[str, str]]) -> Iterator[Damage]:
    """What was removed and swept while we looked is no damage."""
    with workspace.reading() as catalog:
        for digest, (expected, found) in suspects.items():
            if owners := catalog.needs.owners(digest):
                yield Damage(what=f"blob {digest.hex}", expected=expected, found=found, needed_by=tuple(owners))


# -- elsewhere


def _bases(
    workspace: Workspace, bases: Iterable[BaseModel], *, read_data: bool, progress: Progress
) -> Iterator[list[Damage]]:
    for base in bases:
        owner = f"base model {base.name}"
        damages = _compare(base.url, {file.path: file.size_bytes for file in base.files}, owner)
        if not damages and read_data:
            damages = _reading(base.url, owner, partial(_fingerprint, workspace, base, progress))
        yield damages


def _fingerprint(workspace: Workspace, base: BaseModel, progress: Progress) -> Iterator[Damage]:
    found = verify_base(workspace, base, progress)
    for name in (*found.different, *found.missing, *found.unexpected):
        state = {name in found.missing: "missing", name in found.unexpected: "not in the fingerprint"}.get(
            True, "other bytes"
        )
        yield Damage(
            what=f"{base.url}: tensor {name}",
            expected="as in the fingerprint",
            found=state,
            needed_by=(f"base model {base.name}",),
        )


def _models(merged: Iterable[Merged], *, read_data: bool) -> Iterator[list[Damage]]:
    for model in merged:
        owner = f"merged model {model.digest.short}"
        for place in filter(None, model.locations):
            damages = _compare(place, {entry.path: entry.size_bytes for entry in model.files}, owner)
            if not damages and read_data:
                damages = _reading(place, owner, partial(_files, model, place, owner))
            yield damages


def _files(model: Merged, place: str, owner: str) -> Iterator[Damage]:
    with closing(open_location(place)) as location:
        for entry in model.files:
            with location.open(entry.path) as stream:
                found = digest_of_stream(stream)
            if found != entry.digest:
                yield Damage(
                    what=f"{place}/{entry.path}", expected=str(entry.digest), found=str(found), needed_by=(owner,)
                )


def _compare(place: str, expected: Mapping[str, int], owner: str) -> list[Damage]:
    """The files of a folder that are missing, or have another size."""

    def look() -> Iterator[Damage]:
        location: Location
        with closing(open_location(place)) as location:
            found = location.files()
        for path, size_bytes in expected.items():
            if found.get(path) != size_bytes:
                there = f"{found[path]} bytes" if path in found else "missing"
                yield Damage(what=f"{place}/{path}", expected=f"{size_bytes} bytes", found=there, needed_by=(owner,))

    return _reading(place, owner, look)


def _reading(place: str, owner: str, look: Callable[[], Iterator[Damage]]) -> list[Damage]:
    """What a look at a place finds; that it cannot be looked at is a finding, too."""
    try:
        return list(look())
    except RegistryError as error:
        return [Damage(what=place, expected="to be read", found=explain(error).message, needed_by=(owner,))]
