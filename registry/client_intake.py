"""What a client brings into a server's registry: it reads, checks and hashes here, and sends what is missing there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from registry.base_folders import AddedBase, fingerprint_of, places_of_base
from registry.client_files import entries_of, send
from registry.client_wire import LONG_SECONDS, Wire
from registry.disk import appearing, passing
from registry.errors import Changed, DamagedBlob, NotACheckpoint, PathNotFound, Refused, UnknownBase
from registry.fingerprint import DigestCache
from registry.formats import Adapter, Found, read_adapter
from registry.formats.base_model import BaseHead, read_base
from registry.intake import (
    Intake,
    Registered,
    Registration,
    check_words,
    report_on,
    search,
    size_of,
    take_models,
)
from registry.locations import Location, local_folder, open_location
from registry.manifest import BaseModel, FileEntry, Fingerprint, Report, utc_now
from registry.progress import Progress
from registry.refs import AdapterName
from registry.settings import Settings

if TYPE_CHECKING:
    from registry.separating import Separate, Separation

T = TypeVar("T")
_Checked = tuple[Found, BaseModel, Report]
_TRIES = 4
_TOGETHER = 500  # checkpoints of one request, which is recorded whole or not at all


def register(wire: Wire, settings: Settings, path: str, said: Registration, progress: Progress) -> Intake:
    """Register a checkpoint or a run that lies here; what it does and raises is told at `registry.registering.register`."""
    try:
        place = search(path, with_state=said.with_state)
    except NotACheckpoint:
        add = partial(add_base, wire, settings, name=said.adapter, arch_version=said.arch_version, progress=progress)
        if models := take_models(path, said, add):
            return models
        raise
    check_words(said, len(place.found))
    bases = _Bases(wire, settings, said, progress)
    checked = [bases.match(found) for found in place.found]
    for _, _, report in checked:
        if report.misfits:
            raise Refused(report)
    return Intake(registered=_register_all(wire, checked, said, progress), unreadable=place.unreadable)


def _register_all(
    wire: Wire, checked: Sequence[_Checked], said: Registration, progress: Progress
) -> tuple[Registered, ...]:
    total = sum(size_of(found) for found, _, _ in checked)
    hashed = [_hashed(found, lambda done: progress("reading", done, total)) for found, _, _ in checked]
    files = [(each[0].location, entry) for each, entries in zip(checked, hashed, strict=True) for entry in entries]
    documents = [
        _document(found, base, entries, said) for (found, base, _), entries in zip(checked, hashed, strict=True)
    ]
    recorded = _sent_and_recorded(lambda: send(wire, files, progress), lambda: _recorded(wire, documents))
    reports = [report for _, _, report in checked]
    return tuple(replace(each, report=report) for each, report in zip(recorded, reports, strict=True))


def _recorded(wire: Wire, documents: Sequence[object]) -> list[Registered]:
    parts = [documents[start : start + _TOGETHER] for start in range(0, len(documents), _TOGETHER)]
    path, kind = "/checkpoints/batch", list[Registered]
    return [each for part in parts for each in wire.write(kind, "POST", path, part, patience_seconds=LONG_SECONDS)]


def _sent_and_recorded(send: Callable[[], None], record: Callable[[], T]) -> T:
    """Send, then record; both again when a sweep on the server has taken a file in between."""
    for _ in range(_TRIES - 1):
        try:
            send()
            return record()
        except DamagedBlob:
            continue
    send()
    return record()


def _hashed(found: Found, advance: Callable[[int], None]) -> tuple[FileEntry, ...]:
    """The files of a checkpoint. What is sent must be what was checked: a trainer may have written newer ones in between."""
    entries = entries_of(found.location, found.adapter.files, advance)
    again = read_adapter(found.location)
    if again.tensors != found.adapter.tensors or again.config != found.adapter.config:
        raise Changed(found.location.url, "the files that were checked", "newer ones: something is writing there")
    return entries


def _document(found: Found, base: BaseModel, entries: Sequence[FileEntry], said: Registration) -> dict[str, object]:
    around = {
        "adapter": found.adapter_name,
        "run": found.run,
        "step": found.step,
        "metrics": found.metrics,
        "left_out": found.left_out,
        "began": found.began,
    }
    told = replace(said, base=base.digest.hex, source=said.source or found.location.url)
    return {"files": entries, "said": told, "found": around}


class _Bases:
    """The base models of a place's checkpoints, each looked for once."""

    def __init__(self, wire: Wire, settings: Settings, said: Registration, progress: Progress) -> None:
        self._wire, self._settings, self._said, self._progress = wire, settings, said, progress
        self._known: dict[str, BaseModel] = {}

    def match(self, found: Found) -> _Checked:
        said, key = self._said, self._said.base or found.adapter.base_name
        look = partial(
            find_base if said.base else base_of_adapter,
            self._wire, self._settings, arch_version=said.arch_version, progress=self._progress,
        )  # fmt: skip
        if key not in self._known:
            self._known[key] = look(said.base) if said.base else look(found.adapter, near=found.location.url)
        return found, self._known[key], report_on(found, self._known[key], said)


# -- base models


def find_base(wire: Wire, settings: Settings, text: str, *, arch_version: str = "", progress: Progress) -> BaseModel:
    """The base model that the server knows by a name or digest, or that lies here at a path; the server is told of it then.

    Raises:
        UnknownBase: neither.
    """
    try:
        return wire.get(BaseModel, "/base", {"name": text})
    except UnknownBase as unknown:
        try:
            return add_base(wire, settings, text, arch_version=arch_version, progress=progress).base
        except PathNotFound:
            raise unknown from None


def base_of_adapter(
    wire: Wire, settings: Settings, adapter: Adapter, *, near: str, arch_version: str = "", progress: Progress
) -> BaseModel:
    """The base model that an adapter's files name: at one of the places where it would lie here, or what the server knows by that name.

    Raises:
        UnknownBase: not found; the caller has to say which it is.
    """
    if not adapter.base_name:
        raise UnknownBase("(the files do not name one)")
    for place in places_of_base(adapter.base_name, near, settings.hub_cache):
        try:
            return add_base(wire, settings, str(place), arch_version=arch_version, progress=progress).base
        except (NotACheckpoint, PathNotFound):
            continue
    bases = {base.name: base for base in wire.get(list[BaseModel], "/bases")}
    if adapter.base_name in bases:
        return bases[adapter.base_name]
    raise UnknownBase(adapter.base_name, list(bases))


def add_base(
    wire: Wire,
    settings: Settings,
    url: str,
    *,
    name: str = "",
    arch_version: str = "",
    copy: bool = False,
    progress: Progress,
) -> AddedBase:
    """Tell the server of a base model; see `registry.base_models.add_base`.

    What lies here is fingerprinted here. The server cannot read it, so that merging needs a copy. What a URL names, the server reads itself.
    """
    if name:
        AdapterName.parse(name)
    if local_folder(url) is None:
        asked = {"url": url, "name": name, "arch_version": arch_version, "copy": copy}
        return wire.write(AddedBase, "POST", "/bases/at", asked, patience_seconds=LONG_SECONDS)
    with closing(open_location(url)) as location:
        head = read_base(location)
        files = head.files(location)
        cache = DigestCache(settings.home / "cache" / "tensors")
        fingerprint = fingerprint_of(cache, location, head, progress)
        base = _described(location, head, fingerprint, name=name, arch_version=arch_version, settings=settings)
        known = next(_known(wire, fingerprint), None)
        if copy and not (known and known.in_store):
            return _add_copy(wire, location, base, progress)
    if head.files(location) != files:
        raise Changed(location.url, "the files whose fingerprint was taken", "newer ones: something is writing there")
    if known is None:
        return wire.write(AddedBase, "POST", "/bases", {"base": base})
    if not name and not arch_version:
        return AddedBase(base=known, created=False)
    # It stays where the server reads it; a name or version that is said now is compared there, or added.
    there = replace(known, name=name, arch_version=arch_version)
    return wire.write(AddedBase, "POST", "/bases", {"base": there})


def _known(wire: Wire, fingerprint: Fingerprint) -> Iterator[BaseModel]:
    try:
        yield wire.get(BaseModel, "/base", {"name": fingerprint.weights.hex})
    except UnknownBase:
        return


def _described(
    location: Location,
    head: BaseHead,
    fingerprint: Fingerprint,
    *,
    name: str,
    arch_version: str,
    settings: Settings,
) -> BaseModel:
    return BaseModel(
        name=name,
        url=location.url,
        in_store=False,
        format=head.format,
        fingerprint=fingerprint,
        arch_version=arch_version,
        config=head.config,
        files=head.files(location),
        tensors=head.tensors,
        created_at=utc_now(),
        author=settings.author,
    )


def _add_copy(wire: Wire, location: Location, base: BaseModel, progress: Progress) -> AddedBase:
    total = sum(file.size_bytes for file in base.files)
    entries = entries_of(location, [file.path for file in base.files], lambda done: progress("reading", done, total))
    files = [(location, entry) for entry in entries]
    return _sent_and_recorded(
        lambda: send(wire, files, progress),
        lambda: wire.write(
            AddedBase, "POST", "/bases", {"base": base, "copied": entries}, patience_seconds=LONG_SECONDS
        ),
    )


# -- out of a whole model


def separate(wire: Wire, settings: Settings, wanted: Separate, progress: Progress) -> Separation:
    """Take an adapter out of files here that hold more; see `registry.separating.separate`."""
    from registry.separating import check_fits, registration, take_out

    wanted.check()
    with appearing(wanted.out) if wanted.out else passing(settings.home / "making") as folder:
        found = take_out(wanted, folder)
        if wanted.base:
            base = find_base(wire, settings, wanted.base, progress=progress)
        else:
            adapter, near = read_adapter(open_location(str(folder))), str(wanted.config.absolute().parent)
            base = base_of_adapter(wire, settings, adapter, near=near, progress=progress)
        if not wanted.name:
            check_fits(wanted, folder, base)
            return found
        said = registration(wanted, base.digest.hex)
        (registered,) = register(wire, settings, str(folder), said, progress).registered
    return replace(found, registered=registered)
