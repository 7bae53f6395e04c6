"""Plan the merge of an examined checkpoint and carry it out. Nothing is written when the check refused it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from registry.base_models import open_base
from registry.errors import Changed, DamagedBlob, NotFound, PathNotFound, Refused, UnreadableFile
from registry.examining import Examined
from registry.formats.adapter import read_json
from registry.locations import Location, local_folder, open_location
from registry.manifest import (
    BaseFormat,
    BaseModel,
    FileEntry,
    Level,
    Merged,
    Recipe,
    RecipeInput,
    Report,
    TensorRecord,
    content_digest,
    to_json,
)
from registry.merge.journal import Journal
from registry.merge.plan import PROVENANCE_FILE, Inputs, Plan, make_plan
from registry.merge.sinks import Sink, digest_of_stream, open_sink
from registry.store import StoredFolder
from registry.tensors import DType, SafetensorsHeader, read_safetensors_header
from registry.workspace import Progress, Workspace, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """A merged model; `created` is False when the recipe's result was there already. `records` tell what happened to each tensor."""

    merged: Merged
    location: str
    created: bool
    report: Report
    records: tuple[TensorRecord, ...] = ()


def plan_merge(workspace: Workspace, examined: Examined, dtype: DType | None = None) -> Plan:
    """Resolve the merge of one checkpoint into its base against headers, without torch.

    Raises:
        Refused: the check found a reason not to; carries every finding.
        InvalidRecipe: the dtype is not one that weights can have.
    """
    if examined.report.verdict is Level.REFUSED:
        raise Refused(examined.report)
    base, folder = examined.base, workspace.folder_of(examined.checkpoint)
    recipe = Recipe(base=base.digest, inputs=(RecipeInput(checkpoint=examined.checkpoint.digest),), dtype=dtype)
    place = open_base(workspace, base)
    return make_plan(
        Inputs(
            recipe=recipe,
            base=base,
            resolution=examined.resolution,
            adapter_files=tuple(folder.files()),
            adapter_tokenizer_config=_tokenizer_config(folder),
            base_tokenizer_config=_tokenizer_config(place),
            heads=_heads(place, base),
        )
    )


def _tokenizer_config(folder: Location) -> dict[str, Any]:
    return read_json(folder, "tokenizer_config.json") if "tokenizer_config.json" in folder.files() else {}


def _heads(location: Location, base: BaseModel) -> dict[str, tuple[bytes, SafetensorsHeader]]:
    if base.format is not BaseFormat.SAFETENSORS:
        return {}
    sizes, heads = location.files(), {}
    for path in dict.fromkeys(tensor.file for tensor in base.tensors):
        with location.open(path) as stream:
            header = read_safetensors_header(stream, path, sizes[path])
            end = header.tensors[0].offset_bytes if header.tensors else sizes[path]
            stream.seek(0)
            heads[path] = stream.read(end), header
    return heads


def merge(
    workspace: Workspace,
    examined: Examined,
    plan: Plan,
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
    with workspace.reading() as catalog:
        known = catalog.merged.find(plan.recipe.digest)
    place = _place(out)
    if known is not None and place in known.locations and _is_there(workspace, known, place):
        return MergeResult(merged=known, location=place, created=False, report=examined.report)
    sink = open_sink(out, workspace.store)
    with Journal(workspace.settings.home / "merging", plan.recipe.digest, sink.url) as journal:
        if place and (files := _published(workspace, plan, place, journal)):
            records: tuple[TensorRecord, ...] = ()
        else:
            files, records = _execute(workspace, examined, plan, sink, journal, known=known, progress=progress)
        merged = _record(workspace, examined, plan, files, sink.url, note)
        journal.finish()
    return MergeResult(merged=merged, location=sink.url, created=True, report=examined.report, records=records)


def _execute(
    workspace: Workspace,
    examined: Examined,
    plan: Plan,
    sink: Sink,
    journal: Journal,
    *,
    known: Merged | None,
    progress: Progress,
) -> tuple[tuple[FileEntry, ...], tuple[TensorRecord, ...]]:
    from registry.merge.engine import Sources, execute  # noqa: PLC0415 - torch takes a second to import

    with (
        closing(open_base(workspace, plan.base)) as base,
        closing(workspace.folder_of(examined.checkpoint)) as adapter,
    ):
        outcome = execute(
            plan,
            Sources(base=base, adapter=adapter),
            sink,
            journal,
            provenance=lambda files, records: _last_file(workspace, examined, plan, files, records, known=known),
            advance=lambda done: progress("merging", done, plan.size_bytes),
        )
    return outcome.files, outcome.records


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
    examined: Examined,
    plan: Plan,
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
        data = _provenance(examined, plan, files, records)
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


def _provenance(examined: Examined, plan: Plan, files: Sequence[FileEntry], records: Sequence[TensorRecord]) -> bytes:
    """`merge.json`: everything the result follows from, and nothing (time, user, place, names) that it does not."""
    manifest = examined.checkpoint.manifest
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
        "inputs": [
            {
                "digest": str(examined.checkpoint.digest),
                "format": manifest.format.value,
                "method": manifest.method,
                "rank": manifest.rank,
                "alpha": manifest.alpha,
                "scaling": manifest.scaling,
                "base_name": manifest.base_name,
                "files": {entry.path: {"blake3": entry.digest.hex, "sha256": entry.sha256} for entry in manifest.files},
            }
        ],
        "warnings": [to_json(f) for f in examined.report.findings if f.level is Level.WARNING],
        "files": {entry.path: {"blake3": entry.digest.hex, "size_bytes": entry.size_bytes} for entry in files},
        "tensors": {record.name: _without_name(record) for record in records},
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _without_name(record: TensorRecord) -> dict[str, Any]:
    found: dict[str, Any] = to_json(record)
    del found["name"]
    return found


def _record(
    workspace: Workspace, examined: Examined, plan: Plan, files: tuple[FileEntry, ...], url: str, note: str
) -> Merged:
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
                    checkpoints=(examined.checkpoint.ref,),
                    files=files,
                    locations=(url,),
                    note=note,
                    created_at=change.at,
                    author=change.author,
                ),
                kept,
            )
        change.record("merge", examined.checkpoint.ref, merged=merged.digest.hex, location=url or "store")
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
