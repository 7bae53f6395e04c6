"""Plan the merge of checkpoints that go together and carry it out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from registry.base_models import find_base, open_base
from registry.errors import Changed, DamagedBlob, NotFound, PathNotFound, UnreadableFile
from registry.examining import Examined, examine
from registry.formats.adapter import read_json
from registry.locations import Location, local_folder, open_location
from registry.manifest import (
    BaseFormat,
    BaseModel,
    Checkpoint,
    FileEntry,
    Finding,
    Level,
    Merged,
    Report,
    TensorRecord,
    content_digest,
    to_json,
)
from registry.merge.journal import Journal
from registry.merge.plan import PROVENANCE_FILE, Inputs, Plan, make_plan
from registry.merge.sinks import Sink, StoreSink, digest_of_stream, open_sink
from registry.mixing import Mixture, Together, check_bases, together
from registry.results import MergeResult as MergeResult
from registry.results import Outline as Outline
from registry.results import OutlinedFile
from registry.store import StoredFolder
from registry.storing import recording
from registry.tensors import DType, SafetensorsHeader, read_safetensors_header
from registry.workspace import Progress, Workspace, nothing_but, silent

if TYPE_CHECKING:
    from registry.merge.blocks import Sources
    from registry.merge.engine import FileOutcome, Outcome

_HEADS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a merge would do, before it does anything."""

    together: Together
    plan: Plan

    @property
    def outline(self) -> Outline:
        """What there is to see of it."""
        plan = self.plan
        return Outline(
            report=self.report,
            recipe=plan.recipe,
            base=plan.base.name,
            files=tuple(OutlinedFile(path=f.path, origin="weights", size_bytes=f.size_bytes) for f in plan.files),
            sidecars=tuple(OutlinedFile(path=sidecar.path, origin=sidecar.origin) for sidecar in plan.sidecars),
            computed=tuple(change.target.name for change in plan.computed),
            tensors=len(plan.base.tensors),
            bytes_copied=plan.bytes_copied,
            bytes_computed=plan.bytes_computed,
            memory_bytes=plan.peak_bytes(0),
            thread_bytes=plan.peak_bytes(1) - plan.peak_bytes(0),
        )

    @property
    def examined(self) -> tuple[Examined, ...]:
        """The inputs, each compared with the base."""
        return self.together.examined

    @property
    def report(self) -> Report:
        """What the check of all inputs found."""
        return self.together.report


def plan(
    workspace: Workspace,
    checkpoints: Sequence[Checkpoint],
    mixture: Mixture | None = None,
    *,
    dtype: DType | None = None,
    allow_lossy: bool = False,
    progress: Progress = silent,
) -> Planned:
    """Examine checkpoints and plan their merge into their one base model; see `registry.service.Registry.plan`."""
    check_bases(checkpoints)
    base = find_base(workspace, checkpoints[0].base.hex, progress=progress)
    examined = [examine(workspace, each, base, progress) for each in checkpoints]
    joint = together(workspace, examined, mixture or Mixture(), allow_lossy=allow_lossy)
    return plan_merge(workspace, joint, dtype)


def plan_merge(workspace: Workspace, joint: Together, dtype: DType | None = None) -> Planned:
    """Resolve the merge of checkpoints into their one base against headers, without torch.

    Raises:
        InvalidRecipe: the dtype is not one that weights can have.
    """
    base, leading = joint.base, workspace.folder_of(joint.checkpoints[joint.leading])
    place = open_base(workspace, base)
    plan = make_plan(
        Inputs(
            recipe=replace(joint.recipe, dtype=dtype),
            base=base,
            resolution=joint.resolution,
            adapter_files=tuple(leading.files()),
            adapter_tokenizer_config=_tokenizer_config(leading),
            base_tokenizer_config=_tokenizer_config(place),
            heads=_heads(place, base),
        )
    )
    return Planned(together=joint, plan=plan)


def _tokenizer_config(folder: Location) -> dict[str, Any]:
    return read_json(folder, "tokenizer_config.json") if "tokenizer_config.json" in folder.files() else {}


def _heads(location: Location, base: BaseModel) -> dict[str, tuple[bytes, SafetensorsHeader]]:
    if base.format is not BaseFormat.SAFETENSORS:
        return {}
    sizes, paths = location.files(), list(dict.fromkeys(tensor.file for tensor in base.tensors))
    with ThreadPoolExecutor(_HEADS_AT_ONCE) as threads:  # each waits for the network once or twice
        return dict(zip(paths, threads.map(lambda path: _head(location, path, sizes[path]), paths), strict=True))


def _head(location: Location, path: str, size_bytes: int) -> tuple[bytes, SafetensorsHeader]:
    with location.open(path) as stream:
        header = read_safetensors_header(stream, path, size_bytes)
        end = header.tensors[0].offset_bytes if header.tensors else size_bytes
        stream.seek(0)
        return stream.read(end), header


def merge(
    workspace: Workspace,
    planned: Planned,
    *,
    out: str | None = None,
    note: str = "",
    progress: Progress = silent,
) -> MergeResult:
    """Carry out a plan: into the store, or straight to `out` (a path or fsspec URL). The same recipe again finds its result.

    Raises:
        Changed: the recipe's earlier result had other bytes; nothing is published.
        BaseChanged, NothingMerged, NotFinite, StorageFailed, Conflict, MergeRunning: as `registry.merge.engine.execute`.
    """
    return recording(workspace, partial(_merge, workspace, planned, out, note, progress))


def _merge(workspace: Workspace, planned: Planned, out: str | None, note: str, progress: Progress) -> MergeResult:
    plan = planned.plan
    with workspace.reading() as catalog:
        known = catalog.merged.find(plan.recipe.digest)
    place = _place(out)
    if known is not None and place in known.locations and _is_there(workspace, known, place):
        return MergeResult(merged=known, location=place, created=False, report=planned.report)
    sink = open_sink(out, workspace.store)
    with Journal(workspace.settings.home / "merging", plan.recipe.digest, sink.url) as journal:
        if place and (files := _published(workspace, plan, place, journal)):
            records: tuple[TensorRecord, ...] = ()
        else:
            files, records = _execute(workspace, planned, sink, journal, known=known, progress=progress)
        merged = _record(workspace, planned, files, sink.url, note)
        journal.finish()
    return MergeResult(merged=merged, location=sink.url, created=True, report=planned.report, records=records)


def _execute(
    workspace: Workspace,
    planned: Planned,
    sink: Sink,
    journal: Journal,
    *,
    known: Merged | None,
    progress: Progress,
) -> tuple[tuple[FileEntry, ...], tuple[TensorRecord, ...]]:
    from registry.merge.engine import execute  # noqa: PLC0415 - so do numpy's

    plan = planned.plan
    with _sources(workspace, planned) as sources:
        outcome = execute(
            plan,
            sources,
            sink,
            journal,
            provenance=lambda files, records: _last_file(workspace, planned, files, records, known=known),
            advance=lambda done: progress("merging", done, plan.size_bytes),
        )
    return outcome.files, outcome.records


def merge_file(
    workspace: Workspace,
    planned: Planned,
    path: str,
    *,
    advance: Callable[[int], None] = lambda done_bytes: None,
    threads: int | None = None,
) -> FileOutcome:
    """Write one weights file of a merge into the store. Nobody refers to it yet.

    Raises:
        BaseChanged, NotFinite, StorageFailed: as `registry.merge.engine.execute_file`; so is whatever `advance` raises.
    """
    from registry.merge.engine import execute_file  # noqa: PLC0415 - so do numpy's

    with _sources(workspace, planned) as sources:
        return execute_file(planned.plan, path, sources, StoreSink(workspace.store), advance=advance, threads=threads)


def put_together(
    workspace: Workspace,
    planned: Planned,
    written: Sequence[tuple[FileEntry, Sequence[TensorRecord]]],
    largest_delta: float,
) -> Outcome:
    """Write what a merge has besides its weights, which lie in the store already, into the store too. Nobody refers to any of it yet.

    Args:
        written: every weights file in the plan's order, with the records of its tensors.
        largest_delta: the largest change of one element in all of them.

    Raises:
        NothingMerged: no element differs from the base's.
        Changed: the recipe's earlier result had other bytes.
        StorageFailed: the store does not take the bytes.
    """
    from registry.merge.engine import check_merged, finish  # noqa: PLC0415 - so do numpy's

    records = [record for _, of_file in written for record in of_file]
    check_merged(planned.plan, records, largest_delta)
    with workspace.reading() as catalog:
        known = catalog.merged.find(planned.plan.recipe.digest)
    with _sources(workspace, planned) as sources:
        return finish(
            planned.plan,
            sources,
            StoreSink(workspace.store),
            [entry for entry, _ in written],
            records,
            provenance=lambda files, records: _last_file(workspace, planned, files, records, known=known),
        )


def record_merge(workspace: Workspace, planned: Planned, outcome: Outcome, note: str) -> MergeResult:
    """Record a model that lies in the store. Within a transaction, it is kept or lost with that.

    Raises:
        BlobSwept: a sweep took a file since it was written.
    """
    merged = _record(workspace, planned, outcome.files, "", note)
    return MergeResult(merged=merged, location="", created=True, report=planned.report, records=outcome.records)


@contextmanager
def _sources(workspace: Workspace, planned: Planned) -> Iterator[Sources]:
    from registry.merge.blocks import Sources  # noqa: PLC0415 - so do numpy's

    with (
        closing(open_base(workspace, planned.plan.base)) as base,
        closing(planned.together.folder(workspace)) as adapter,
    ):
        yield Sources(base=base, adapter=adapter)


def _place(out: str | None) -> str:
    """How a location is recorded: an absolute path or a URL; empty text for the store."""
    if out is None:
        return ""
    folder = local_folder(out)
    return out.rstrip("/") if folder is None else str(folder)


def _is_there(workspace: Workspace, merged: Merged, place: str) -> bool:
    """Whether a merged model lies complete at a place, by the sizes of its files."""
    try:
        if not place:
            return all(workspace.store.size(entry.digest) == entry.size_bytes for entry in merged.files)
        sizes = open_location(place).files()
    except (PathNotFound, DamagedBlob):
        return False
    return all(sizes.get(entry.path) == entry.size_bytes for entry in merged.files)


def _published(workspace: Workspace, plan: Plan, place: str, journal: Journal) -> tuple[FileEntry, ...] | None:
    """The files of this very merge, published by a try that ended before it could record them; None when that is not what is there.

    The journal, which outlives such a try, tells what it wrote; `merge.json` alone could say anything.
    """
    finished = [journal.finished(file.path) for file in plan.files]
    try:
        location = open_location(place)
        said = read_json(location, PROVENANCE_FILE)
        if not all(finished) or said.get("recipe_digest") != str(plan.recipe.digest):
            return None
        blob = workspace.store.put_file(location, PROVENANCE_FILE)
        sizes, files = location.files(), []
        for path in said["files"]:
            with location.open(path) as stream:
                files.append(FileEntry(path=path, size_bytes=sizes[path], digest=digest_of_stream(stream)))
    except (NotFound, UnreadableFile, KeyError, TypeError):
        return None
    found = {each.path: each.digest for each in files}
    if any(found.get(entry.path) != entry.digest for entry, _ in filter(None, finished)):
        return None
    return (*files, FileEntry(path=PROVENANCE_FILE, size_bytes=blob.size_bytes, digest=blob.digest))


def _last_file(
    workspace: Workspace,
    planned: Planned,
    files: Sequence[FileEntry],
    records: Sequence[TensorRecord],
    *,
    known: Merged | None,
) -> tuple[str, bytes]:
    """Name and bytes of `merge.json`. The store keeps it wherever the model goes.

    A recipe's first `merge.json` stays its only one: the versions of the tools in it may be older than today's, its model is the same.

    Raises:
        Changed: the recipe's earlier result had other bytes.
    """
    if known is None:
        data = _provenance(planned, files, records)
        with workspace.store.create() as writer:
            writer.write(data)
            writer.commit()
        return PROVENANCE_FILE, data
    before = {entry.path: entry.digest for entry in known.files}
    for entry in files:
        if before.get(entry.path) != entry.digest:
            raise Changed(entry.path, str(before.get(entry.path)), str(entry.digest))
    with workspace.store.open(before[PROVENANCE_FILE]) as stream:
        return PROVENANCE_FILE, stream.read()


def _provenance(planned: Planned, files: Sequence[FileEntry], records: Sequence[TensorRecord]) -> bytes:
    """`merge.json`: everything the result follows from, and nothing (time, user, place, names) that it does not."""
    plan = planned.plan
    inputs = zip(planned.examined, plan.recipe.inputs, strict=True)
    document: Mapping[str, Any] = {
        "tool": {"ckpt-registry": version("ckpt-registry"), "torch": version("torch")},
        "recipe": to_json(plan.recipe),
        "recipe_digest": str(plan.recipe.digest),
        "base": {
            "weights": str(plan.base.fingerprint.weights),
            "architecture": str(plan.base.fingerprint.architecture),
            "arch_version": plan.base.arch_version,
            "tensors": len(plan.base.tensors),
        },
        "inputs": [_input(each.checkpoint, item.weight) for each, item in inputs],
        "shares": planned.together.shares,
        "warnings": [
            _nameless(finding, planned.examined)
            for finding in planned.report.findings
            if finding.level is Level.WARNING
        ],
        "files": {entry.path: {"blake3": entry.digest.hex, "size_bytes": entry.size_bytes} for entry in files},
        "tensors": {record.name: _without_name(record) for record in records},
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _input(checkpoint: Checkpoint, weight: float) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "digest": str(checkpoint.digest),
        "weight": weight,
        "format": manifest.format.value,
        "method": manifest.method,
        "rank": manifest.rank,
        "alpha": manifest.alpha,
        "scaling": manifest.scaling,
        "base_name": manifest.base_name,
        "files": {entry.path: {"blake3": entry.digest.hex, "sha256": entry.sha256} for entry in manifest.files},
    }


def _nameless(finding: Finding, examined: Sequence[Examined]) -> dict[str, Any]:
    """A finding with the inputs' digests in place of their names, which are no part of what the result follows from."""
    found: dict[str, Any] = to_json(finding)
    for each in sorted((each.checkpoint for each in examined), key=lambda each: -len(each.ref)):
        found = {
            key: text.replace(each.ref, each.digest.short) if isinstance(text, str) else text
            for key, text in found.items()
        }
    return found


def _without_name(record: TensorRecord) -> dict[str, Any]:
    found: dict[str, Any] = to_json(record)
    del found["name"]
    if not record.coefficients:
        del found["coefficients"]
    return found


def _record(workspace: Workspace, planned: Planned, files: tuple[FileEntry, ...], url: str, note: str) -> Merged:
    plan, inputs = planned.plan, tuple(each.checkpoint.ref for each in planned.examined)
    with workspace.writing() as change:
        kept = [entry for entry in files if not url or entry.path == PROVENANCE_FILE]
        workspace.check_stored(kept)
        known = change.catalog.merged.find(plan.recipe.digest)
        if known is not None:
            merged = change.catalog.merged.add_location(known, url)
        else:
            merged = change.catalog.merged.add(
                Merged(
                    digest=content_digest(files),
                    recipe=plan.recipe,
                    base_name=plan.base.name,
                    checkpoints=inputs,
                    files=files,
                    locations=(url,),
                    note=note,
                    created_at=change.at,
                    author=change.author,
                ),
                kept,
            )
        change.record(
            "merge", inputs[0], **nothing_but({"with": inputs[1:]}), merged=merged.digest.hex, location=url or "store"
        )
        return merged


def merged_folder(workspace: Workspace, merged: Merged) -> Location:
    """A folder that holds a merged model: the store's, or one of its places where it still lies complete.

    Raises:
        PathNotFound: it is complete in none of them any more.
    """
    for place in sorted(merged.locations):  # the store, which is empty text, first
        if _is_there(workspace, merged, place):
            return open_location(place) if place else StoredFolder(workspace.store, merged.files, merged.digest.hex)
    raise PathNotFound(", ".join(place or "the store" for place in merged.locations))
