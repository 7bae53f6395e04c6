"""Register checkpoints: find them, match them with their base, store their files, record them. Blobs first, rows second."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from registry.base_models import AddedBase, add_base, base_of_adapter, find_base
from registry.compatibility import Facts, check
from registry.errors import Changed, Conflict, InvalidInput, NotACheckpoint, Refused, UnreadableFile
from registry.formats import Found, Search, find_checkpoints, read_adapter, resolve
from registry.formats.adapter import TOKENIZER_FILES, Adapter
from registry.formats.base_model import places_with_models
from registry.locations import local_folder, open_location
from registry.manifest import BaseModel, Checkpoint, FileEntry, Manifest, Metric, Note, Origin, Report
from registry.refs import AdapterName, check_name, nearest_name
from registry.store import StoredFolder
from registry.workspace import Change, Progress, Workspace, nothing_but, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What the caller says about checkpoints; what is left empty, the files have to know.

    `metrics`, `note` and `tags` are recorded beside what the files know. `step` is refused for a run with several checkpoints. Of files that
    the registry itself made, `origin` tells what of, and `source` is recorded instead of where they lay meanwhile.
    """

    adapter: str = ""
    base: str = ""
    run: str = ""
    step: int | None = None
    metrics: tuple[Metric, ...] = ()
    note: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    arch_version: str = ""
    source: str = ""
    origin: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A registered checkpoint; `created` is False when this content was registered before. `left_out`: files that were not taken, and why."""

    checkpoint: Checkpoint
    created: bool
    report: Report
    left_out: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """The result of registering a place. `unreadable` are checkpoints of a run that are damaged; the others are registered all the same.

    `models` are whole models (full fine-tunes) that were there instead of adapters.
    """

    registered: tuple[Registered, ...]
    unreadable: tuple[UnreadableFile, ...]
    models: tuple[AddedBase, ...] = ()


def register(workspace: Workspace, path: str, said: Registration, *, progress: Progress = silent) -> Intake:
    """Register a checkpoint, or every checkpoint of a run in order.

    All are checked before the first is stored. Doing it again changes nothing but adds what is said anew. A whole model, as a full fine-tune
    leaves it, is recorded as a base model; so are all of a run.

    Args:
        path: of a checkpoint's folder, a run's, or the weights file in it; or an fsspec URL.

    Raises:
        PathNotFound, NotACheckpoint, CorruptFile, UnsafePickle: nothing there that can be registered.
        UnknownBase: the base model was not found.
        Refused: an adapter does not fit its base; carries every finding.
        Conflict: this content is registered already, on another base.
    """
    try:
        search = _search(path)
    except NotACheckpoint as refusal:
        return _register_models(workspace, path, said, refusal, progress)
    _check_words(said, len(search.found))
    bases: dict[str, BaseModel] = {}
    checked = [(found, *_match(workspace, found, said, bases, progress)) for found in search.found]
    for _, _, report in checked:
        if report.misfits:
            raise Refused(report)
    total = sum(_size_bytes(found) for found in search.found)
    registered = [
        _register_one(workspace, found, base, report, said=said, advance=lambda done: progress("storing", done, total))
        for found, base, report in checked
    ]
    return Intake(registered=tuple(registered), unreadable=search.unreadable)


def _search(path: str) -> Search:
    file = local_folder(path)
    if file is None or not os.path.isfile(file):
        return find_checkpoints(open_location(path))
    found = find_checkpoints(open_location(str(file.parent))).found
    own = tuple(each for each in found if each.location.local_path(each.adapter.weights_file) == file)
    if not own:
        raise NotACheckpoint(path, "not the weights of a readable checkpoint")
    return Search(found=own)


def _register_models(
    workspace: Workspace, path: str, said: Registration, refusal: NotACheckpoint, progress: Progress
) -> Intake:
    """Record the whole models of a place. Their places name them, unless the caller names the only one."""
    file = local_folder(path)
    is_file = file is not None and os.path.isfile(file)
    places = places_with_models(open_location(str(file.parent) if file and is_file else path))
    if not places or (file and is_file and not file.name.endswith((".pth", ".safetensors"))):
        raise refusal
    _check_model_words(said, len(places))
    added, unreadable = [], []
    for place in places:
        try:
            added.append(
                add_base(workspace, place, name=said.adapter, arch_version=said.arch_version, progress=progress)
            )
        except UnreadableFile as error:
            unreadable.append(type(error)(f"{place}/{error.path}", error.reason))
    if not added:
        raise unreadable[0]
    return Intake(registered=(), unreadable=tuple(unreadable), models=tuple(added))


def _check_model_words(said: Registration, count: int) -> None:
    """A base model has a name and an architecture version; what else may be said, it has no place for."""
    for name in ("base", "run", "step", "metrics", "note", "tags"):
        value = getattr(said, name)
        if value not in ("", None, (), {}):
            raise InvalidInput(name, value, "this is a whole model, to be recorded as a base model, which has none")
    if said.adapter and count > 1:
        raise InvalidInput(
            "adapter", said.adapter, f"there are {count} whole models in this run, each with its own name"
        )


def _size_bytes(found: Found) -> int:
    sizes = found.location.files()
    # A file that is gone by now is noticed when it is to be stored.
    return sum(sizes.get(file, 0) for file in found.adapter.files)


def _check_words(said: Registration, count: int) -> None:
    if said.adapter:
        AdapterName.parse(said.adapter)
    if said.run:
        check_name(said.run)
    for key in said.tags:
        check_name(key)
    if count > 1 and said.step is not None:
        raise InvalidInput("step", said.step, f"there are {count} checkpoints in this run, each with its own step")
    if count > 1 and said.metrics:
        raise InvalidInput(
            "metric", said.metrics[0].name, f"there are {count} checkpoints in this run: register one at a time"
        )


def _match(
    workspace: Workspace, found: Found, said: Registration, bases: dict[str, BaseModel], progress: Progress
) -> tuple[BaseModel, Report]:
    key = said.base or found.adapter.base_name
    if key not in bases:
        if said.base:
            bases[key] = find_base(workspace, said.base, arch_version=said.arch_version, progress=progress)
        else:
            bases[key] = base_of_adapter(
                workspace, found.adapter, found.location.url, arch_version=said.arch_version, progress=progress
            )
    base = bases[key]
    report = check(found.location.url, found.adapter, base, resolve(found.adapter, base), trained=None, facts=Facts())
    if said.arch_version and base.arch_version and said.arch_version != base.arch_version:
        raise Conflict(base.name, f"recorded as architecture version {base.arch_version}, not {said.arch_version}")
    return base, report


def _register_one(
    workspace: Workspace,
    found: Found,
    base: BaseModel,
    report: Report,
    *,
    said: Registration,
    advance: Callable[[int], None],
) -> Registered:
    entries = workspace.store_files(found.location, found.adapter.files, advance)
    manifest = _manifest(found.adapter, entries)
    _check_unchanged(workspace, found, entries)
    with workspace.writing() as change:
        workspace.check_stored(entries)
        checkpoint = _checkpoint(change, found, base, manifest, said)
        known = change.catalog.checkpoints.find(checkpoint.adapter, manifest.digest)
        if known is not None:
            return Registered(
                checkpoint=_say_again(change, known, checkpoint, said.metrics),
                created=False,
                report=report,
                left_out=found.left_out,
            )
        added = change.catalog.checkpoints.add(checkpoint)
        change.record(
            "register",
            added.ref,
            digest=added.digest.hex,
            base=base.digest.hex,
            **nothing_but({"source": added.source}),
        )
    return Registered(checkpoint=added, created=True, report=report, left_out=found.left_out)


def _check_unchanged(workspace: Workspace, found: Found, entries: Sequence[FileEntry]) -> None:
    """What was stored must be what was checked: a trainer may have written a newer file in between."""
    stored = read_adapter(StoredFolder(workspace.store, entries))
    if stored.tensors != found.adapter.tensors or stored.config != found.adapter.config:
        raise Changed(found.location.url, "the files that were checked", "newer ones: something is writing there")


def _manifest(adapter: Adapter, entries: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(
        format=adapter.format,
        method=adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        targets=adapter.targets,
        dtype=adapter.dtype,
        parameters=adapter.parameters,
        tensors=len(adapter.tensors),
        weights_file=adapter.weights_file,
        base_name=adapter.base_name,
        files=entries,
        tokenizer=any(entry.path in TOKENIZER_FILES for entry in entries),
    )


def _checkpoint(change: Change, found: Found, base: BaseModel, manifest: Manifest, said: Registration) -> Checkpoint:
    adapter = AdapterName.parse(said.adapter) if said.adapter else nearest_name(found.adapter_name, "adapter")
    own = {metric.name for metric in said.metrics}
    notes = (Note(text=said.note, author=change.author, created_at=change.at),) if said.note else ()
    return Checkpoint(
        adapter=adapter,
        version=1,  # the catalog gives the next one
        digest=manifest.digest,
        manifest=manifest,
        base=base.digest,
        base_name=base.name,
        architecture=base.fingerprint.architecture,
        arch_version=said.arch_version or base.arch_version,
        run=said.run or found.run,
        step=said.step if said.step is not None else found.step,
        source=said.source or found.location.url,
        created_at=change.at,
        author=change.author,
        metrics=(*(metric for metric in found.metrics if metric.name not in own), *said.metrics),
        notes=notes,
        tags=said.tags,
        origin=said.origin,
    )


def _say_again(change: Change, known: Checkpoint, again: Checkpoint, measured: Sequence[Metric]) -> Checkpoint:
    """Registered before: the same base it must be; what is said anew is added, and of what the files know, the metrics that were missing."""
    if known.base != again.base:
        raise Conflict(known.ref, f"this content is registered on the base model {known.base_name}")
    if again.arch_version and known.arch_version and again.arch_version != known.arch_version:
        raise Conflict(known.ref, f"this content is registered for architecture version {known.arch_version}")
    checkpoints = change.catalog.checkpoints
    told: dict[str, object] = {}
    for metric in _news(known, again, measured):
        checkpoints.add_metric(known, metric, change.author, change.at)
        told[f"metric {metric.name}"] = metric.value
    for note in again.notes:
        if note.text not in {before.text for before in known.notes}:
            checkpoints.add_note(known, note)
            told["note"] = note.text
    for key, value in again.tags.items():
        if known.tags.get(key) != value:
            checkpoints.set_tag(known, key, value)
            told[f"tag {key}"] = value
    if told:
        change.record("annotate", known.ref, **told)
    return checkpoints.find(known.adapter, known.digest) or known


def _news(known: Checkpoint, again: Checkpoint, measured: Sequence[Metric]) -> list[Metric]:
    """Metrics that are missing, and measured ones with another value; what the files say does not overrule what was recorded later."""
    return [
        metric
        for metric in again.metrics
        if known.metric(metric.name) is None or (metric in measured and metric.value != known.metric(metric.name))
    ]
