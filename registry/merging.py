"""Check a checkpoint against a base model, plan its merge, and carry it out. Always checked first; nothing is written when it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from registry.base_models import current_base, open_base
from registry.changes import Resolution
from registry.compatibility import Facts, Trained, check
from registry.errors import Changed, CorruptFile, DamagedBlob, PathNotFound, Refused, UnreadableFile
from registry.formats import Adapter, read_adapter, resolve
from registry.formats.adapter import read_json
from registry.locations import Location, local_folder, open_location
from registry.manifest import (
    BaseFormat,
    BaseModel,
    Checkpoint,
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
from registry.merge.plan import PROVENANCE_FILE, Inputs, Plan, make_plan
from registry.store import StoredFolder
from registry.tensors import DType, SafetensorsHeader, StoredTensor, read_safetensors_header
from registry.workspace import Progress, Workspace, silent

_BLOCK_BYTES = 4 << 20
_TOKENIZER_FILE = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A checkpoint compared with a base model: the report, and what a plan is made from. `base` is as it lies there now."""

    checkpoint: Checkpoint
    base: BaseModel
    adapter: Adapter
    resolution: Resolution
    report: Report


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """A merged model; `created` is False when the recipe's result was there already. `records` tell what happened to each tensor."""

    merged: Merged
    location: str
    created: bool
    report: Report
    records: tuple[TensorRecord, ...] = ()


def examine(workspace: Workspace, checkpoint: Checkpoint, base: BaseModel, progress: Progress = silent) -> Examined:
    """Compare a checkpoint with a base model: headers, values, tokenizer, and whether the base is still what was recorded.

    Raises:
        DamagedBlob: a file of the checkpoint is missing from the store or damaged.
        PathNotFound: the base is not where it was recorded.
    """
    base, changed = current_base(workspace, base, progress)
    with closing(workspace.folder_of(checkpoint)) as folder:
        adapter = read_adapter(folder)
        facts = Facts(
            nonfinite=[tensor.spec.name for tensor in adapter.tensors if not _is_finite(folder, tensor)],
            tokens=_token_count(folder),
            changed_files=changed,
            merged_before=str(checkpoint.digest) in _merged_into(open_base(workspace, base)),
        )
    return _compare(checkpoint, base, adapter, facts)


def glance(workspace: Workspace, checkpoint: Checkpoint, base: BaseModel) -> Report:
    """The part of an examination that headers alone can tell, in no time; values are not read, nor the base's folder."""
    return _compare(checkpoint, base, read_adapter(workspace.folder_of(checkpoint)), Facts()).report


def _compare(checkpoint: Checkpoint, base: BaseModel, adapter: Adapter, facts: Facts) -> Examined:
    resolution = resolve(adapter, base)
    trained = Trained(
        base=checkpoint.base,
        base_name=checkpoint.base_name,
        architecture=checkpoint.architecture,
        arch_version=checkpoint.arch_version,
    )
    report = check(checkpoint.ref, adapter, base, resolution, trained=trained, facts=facts)
    return Examined(checkpoint=checkpoint, base=base, adapter=adapter, resolution=resolution, report=report)


def _is_finite(folder: Location, tensor: StoredTensor) -> bool:
    """Whether no value has all exponent bits set, which is how infinities and NaN are written."""
    import numpy as np  # noqa: PLC0415 - 0.12 s that listing and showing need not wait for

    words: dict[DType, tuple[Any, int]] = {
        DType.F16: (np.uint16, 0x7C00),
        DType.BF16: (np.uint16, 0x7F80),
        DType.F32: (np.uint32, 0x7F80_0000),
        DType.F64: (np.uint64, 0x7FF0_0000_0000_0000),
    }
    if tensor.spec.dtype not in words:
        return True
    word, exponent = words[tensor.spec.dtype]
    for start in range(0, tensor.spec.size_bytes, _BLOCK_BYTES):
        block = bytearray(min(_BLOCK_BYTES, tensor.spec.size_bytes - start))
        folder.read_into(tensor.file, tensor.offset_bytes + start, memoryview(block))
        values = np.frombuffer(block, dtype=word)
        if ((values & word(exponent)) == word(exponent)).any():
            return False
    return True


def _token_count(folder: Location) -> int:
    """One more than the largest id of the tokenizer in a folder; 0 when it has none that says."""
    if _TOKENIZER_FILE not in folder.files():
        return 0
    found = _read_tokenizer(folder)
    model, added = found.get("model"), found.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(vocabulary, list):  # a unigram model's tokens are numbered by their places
        ids = list(range(len(vocabulary)))
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((number + 1 for number in ids if isinstance(number, int)), default=0)


def _read_tokenizer(folder: Location) -> dict[str, Any]:
    """The one configuration that may be large: Llama 3's has 17 MB, Gemma's 33."""
    with folder.open(_TOKENIZER_FILE) as stream:
        raw = stream.read(_MAX_TOKENIZER_BYTES + 1)
    if len(raw) > _MAX_TOKENIZER_BYTES:
        raise CorruptFile(_TOKENIZER_FILE, f"larger than {_MAX_TOKENIZER_BYTES >> 20} MiB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(_TOKENIZER_FILE, f"not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _merged_into(base: Location) -> frozenset[str]:
    """Digests of the checkpoints that a base model was itself merged from, by its own record."""
    if PROVENANCE_FILE not in base.files():
        return frozenset()
    with suppress(UnreadableFile):
        inputs = read_json(base, PROVENANCE_FILE).get("inputs")
        if isinstance(inputs, list):
            return frozenset(str(item.get("digest")) for item in inputs if isinstance(item, dict))
    return frozenset()


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
    has_config = "tokenizer_config.json" in folder.files()
    return make_plan(
        Inputs(
            recipe=recipe,
            base=base,
            resolution=examined.resolution,
            adapter_files=tuple(folder.files()),
            adapter_bytes=sum(tensor.spec.size_bytes for tensor in examined.adapter.tensors),
            adapter_tokenizer_config=read_json(folder, "tokenizer_config.json") if has_config else {},
            heads=_heads(open_base(workspace, base), base),
        )
    )


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
    # torch takes a second to import: only now is it needed
    from registry.merge.engine import Sources, execute  # noqa: PLC0415
    from registry.merge.journal import Journal  # noqa: PLC0415
    from registry.merge.sinks import open_sink  # noqa: PLC0415

    sink = open_sink(out, workspace.store)
    with (
        closing(open_base(workspace, plan.base)) as base,
        closing(workspace.folder_of(examined.checkpoint)) as adapter,
        Journal(workspace.settings.home / "merging", plan.recipe.digest, sink.url) as journal,
    ):
        outcome = execute(
            plan,
            Sources(base=base, adapter=adapter),
            sink,
            journal,
            provenance=lambda files, records: _provenance(examined, plan, files, records, known),
            advance=lambda done: progress("merging", done, plan.size_bytes),
        )
        merged = _record(workspace, examined, plan, outcome.files, sink.url, note)
        journal.finish()
    return MergeResult(merged=merged, location=sink.url, created=True, report=examined.report, records=outcome.records)


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


def _provenance(
    examined: Examined,
    plan: Plan,
    files: Sequence[FileEntry],
    records: Sequence[TensorRecord],
    known: Merged | None,
) -> tuple[str, bytes]:
    """`merge.json`: everything the result follows from, and nothing (time, user, place, names) that it does not.

    Raises:
        Changed: the recipe's earlier result had other bytes.
    """
    if known is not None:
        before = {entry.path: entry.digest for entry in known.files}
        for entry in files:
            if before.get(entry.path) != entry.digest:
                raise Changed(entry.path, str(before.get(entry.path)), str(entry.digest))
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
    return PROVENANCE_FILE, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _without_name(record: TensorRecord) -> dict[str, Any]:
    found: dict[str, Any] = to_json(record)
    del found["name"]
    return found


def _record(
    workspace: Workspace, examined: Examined, plan: Plan, files: tuple[FileEntry, ...], url: str, note: str
) -> Merged:
    with workspace.writing() as change:
        if not url:
            workspace.check_stored(files)
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
                )
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
