"""Register checkpoints: find them, match them with their base, store their files, record them. Blobs first, rows second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from registry.base_models import add_base, base_of_adapter, find_base
from registry.errors import Changed, Conflict, NotACheckpoint, NotFound, Refused, UnknownCheckpoint
from registry.formats import Found, read_adapter
from registry.formats.adapter import TOKENIZER_FILES, Adapter
from registry.intake import Intake as Intake
from registry.intake import Received as Received
from registry.intake import Registered as Registered
from registry.intake import Registration as Registration
from registry.intake import check_words, report_on, search, size_of, take_models
from registry.manifest import (
    BaseModel,
    Checkpoint,
    FileEntry,
    Manifest,
    Metric,
    Note,
    Origin,
    Report,
    content_digest,
)
from registry.refs import AdapterName, Digest, nearest_name
from registry.store import StoredFolder
from registry.storing import recording
from registry.training_state import Beginning
from registry.workspace import Change, Progress, Workspace, nothing_but, silent


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
        place = search(path, with_state=said.with_state)
    except NotACheckpoint:
        add = partial(add_base, workspace, name=said.adapter, arch_version=said.arch_version, progress=progress)
        if models := take_models(path, said, add):
            return models
        raise
    check_words(said, len(place.found))
    bases: dict[str, BaseModel] = {}
    checked = [(found, *_match(workspace, found, said, bases, progress)) for found in place.found]
    for _, _, report in checked:
        if report.misfits:
            raise Refused(report)
    total = sum(size_of(found) for found in place.found)
    advance = partial(_storing, progress, total)
    registered = [
        recording(workspace, partial(_register_one, workspace, _Checked(found, base, report, said), advance))
        for found, base, report in checked
    ]
    return Intake(registered=tuple(registered), unreadable=place.unreadable)


@dataclass(frozen=True, slots=True)
class _Checked:
    """A checkpoint that was found to go with its base model."""

    found: Found
    base: BaseModel
    report: Report
    said: Registration


def register_received(workspace: Workspace, received: Sequence[Received]) -> list[Registered]:
    """Register checkpoints whose files were sent before. All are read and checked here, then recorded in one transaction.

    Raises:
        NotACheckpoint, CorruptFile, UnsafePickle: the files are none.
        UnknownBase: the base model is not recorded.
        Refused: an adapter does not fit its base; carries every finding. None is recorded then.
        BlobSwept, DamagedBlob: a file is not in the store (any more): it has to be sent again.
        Conflict: this content is registered already, on another base.
    """
    bases: dict[str, BaseModel] = {}
    checked = []
    for each in received:
        check_words(each.said, 1)
        found = _found(workspace, each)
        _look_up_base(workspace, each.said.base, bases)
        base, report = _match(workspace, found, each.said, bases, silent)
        if report.misfits:
            raise Refused(report)
        checked.append(_Checked(found, base, report, each.said))
    return _record(workspace, checked, [each.files for each in received])


def _found(workspace: Workspace, received: Received) -> Found:
    location = workspace.stored_folder(received.files, content_digest(received.files).hex)
    adapter = read_adapter(location)
    return Found(
        location=location,
        adapter=adapter,
        adapter_name=received.adapter,
        run=received.run,
        step=received.step,
        metrics=received.metrics,
        left_out=dict(received.left_out),
        began=received.began,
    )


def _look_up_base(workspace: Workspace, name: str, bases: dict[str, BaseModel]) -> None:
    """Only what is recorded, once for all: places are the client's, and mean nothing here."""
    if name not in bases:
        with workspace.reading() as catalog:
            bases[name] = catalog.bases.find(name)


def _storing(progress: Progress, total_bytes: int, done_bytes: int) -> None:
    progress("storing", done_bytes, total_bytes)


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
    return base, report_on(found, base, said)


def _register_one(workspace: Workspace, checked: _Checked, advance: Callable[[int], None]) -> Registered:
    entries = workspace.store_files(checked.found.location, checked.found.adapter.files, advance)
    _check_unchanged(workspace, checked.found, entries)
    return _record(workspace, [checked], [entries])[0]


def _record(
    workspace: Workspace, checked: Sequence[_Checked], files: Sequence[tuple[FileEntry, ...]]
) -> list[Registered]:
    """Record checkpoints in one transaction, each with its files: many take hardly more statements than one."""
    with workspace.writing() as change:
        workspace.check_stored(entry for entries in files for entry in entries)
        wanted = [_checkpoint(change, each, entries) for each, entries in zip(checked, files, strict=True)]
        added = _add(change, wanted)
        registered = []
        for each, checkpoint in zip(checked, wanted, strict=True):
            new = added.pop(
                (checkpoint.adapter, checkpoint.digest), None
            )  # a second one of the same content is not new
            registered.append(
                Registered(
                    checkpoint=new or _say_again(change, _known(change, checkpoint), checkpoint, each.said.metrics),
                    created=new is not None,
                    report=each.report,
                    left_out=each.found.left_out,
                )
            )
        return registered


def _add(change: Change, wanted: Sequence[Checkpoint]) -> dict[tuple[AdapterName, Digest], Checkpoint]:
    """Record those of some checkpoints that are new, each content once."""
    known = change.catalog.checkpoints.known((each.adapter, each.digest) for each in wanted)
    new: dict[tuple[AdapterName, Digest], Checkpoint] = {}
    for each in wanted:
        if (each.adapter, each.digest) not in known:
            new.setdefault((each.adapter, each.digest), each)
    added = change.catalog.checkpoints.add_many(list(new.values()))
    for each in added:
        source = nothing_but({"source": each.source})
        change.record("register", each.ref, digest=each.digest.hex, base=each.base.hex, **source)
    return dict(zip(new, added, strict=True))


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


def _checkpoint(change: Change, checked: _Checked, entries: tuple[FileEntry, ...]) -> Checkpoint:
    found, base, said = checked.found, checked.base, checked.said
    manifest = _manifest(found.adapter, entries)
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
        origin=said.origin or _resumed(change, found.began, manifest.digest),
    )


def _resumed(change: Change, began: Beginning | None, digest: Digest) -> Origin | None:
    """The origin of what a resumed run has made. Whoever names its beginning by the digest knows that one: a link gives nothing away."""
    if began is None or began.digest == digest:  # what the run began with was trained
        return None
    try:
        parent = change.catalog.checkpoints.resolve(began.parsed)
    except NotFound:
        return began.origin(is_here=False)
    return began.origin(is_here=parent.digest == began.digest)


def _known(change: Change, again: Checkpoint) -> Checkpoint:
    """The checkpoint of the same adapter and content, which is there."""
    known = change.catalog.checkpoints.find(again.adapter, again.digest)
    if known is None:
        raise UnknownCheckpoint(str(again.digest))
    return known


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
