"""Examine a checkpoint against a base model: gather what only reading can tell, and let the compatibility check judge."""

from __future__ import annotations

import json
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from registry.base_models import current_base, open_base
from registry.changes import Resolution
from registry.compatibility import Facts, check
from registry.errors import CorruptFile, UnreadableFile
from registry.fingerprint import blocks_of
from registry.formats import Adapter, read_adapter, resolve
from registry.formats.adapter import read_json
from registry.locations import Location
from registry.manifest import BaseModel, Checkpoint, Report
from registry.merge.plan import PROVENANCE_FILE
from registry.tensors import DType, StoredTensor
from registry.workspace import Progress, Workspace, silent

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


def examine(workspace: Workspace, checkpoint: Checkpoint, base: BaseModel, progress: Progress = silent) -> Examined:
    """Compare a checkpoint with a base model: headers, values, tokenizer, and whether the base is still what was recorded.

    Raises:
        DamagedBlob: a file of the checkpoint is missing from the store or damaged.
        PathNotFound: the base is not where it was recorded.
    """
    base, changed = current_base(workspace, base, progress)
    with closing(workspace.folder_of(checkpoint)) as folder, closing(open_base(workspace, base)) as place:
        adapter = read_adapter(folder)
        resolution = resolve(adapter, base)
        values = {tensor.spec.name: _look_at(folder, tensor) for tensor in adapter.tensors}
        zeros = frozenset(name for name, seen in values.items() if seen.is_zero)
        facts = Facts(
            nonfinite=[name for name, seen in values.items() if not seen.is_finite],
            zeros=zeros,
            losses={} if changed else _losses(resolution, zeros, place, folder),
            tokens=_token_count(folder),
            changed_files=changed,
            merged_before=str(checkpoint.digest) in _merged_into(place),
        )
    report = check(checkpoint.ref, adapter, base, resolution, trained=checkpoint, facts=facts)
    return Examined(checkpoint=checkpoint, base=base, adapter=adapter, resolution=resolution, report=report)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at all values of a tensor tells."""

    is_finite: bool = True
    is_zero: bool = False


def _look_at(folder: Location, tensor: StoredTensor) -> _Seen:
    """Read a tensor: infinities and NaN have all exponent bits set; zeros have none at all, but perhaps the sign."""
    import numpy as np  # noqa: PLC0415 - 0.12 s that listing and showing need not wait for

    words: dict[DType, tuple[Any, int]] = {
        DType.F16: (np.uint16, 0x7C00),
        DType.BF16: (np.uint16, 0x7F80),
        DType.F32: (np.uint32, 0x7F80_0000),
        DType.F64: (np.uint64, 0x7FF0_0000_0000_0000),
    }
    if tensor.spec.dtype not in words:
        return _Seen()
    (word, exponent), is_zero = words[tensor.spec.dtype], True
    for block in blocks_of(folder, tensor):
        values = np.frombuffer(block, dtype=word)
        if ((values & word(exponent)) == word(exponent)).any():
            return _Seen(is_finite=False)
        is_zero = is_zero and not (values << word(1)).any()
    return _Seen(is_zero=is_zero)


def _losses(resolution: Resolution, zeros: frozenset[str], base: Location, adapter: Location) -> dict[str, str]:
    """What is lost by leaving out what is not zero, by the omission's code."""
    omitted = [each for each in resolution.omitted if not each.zeros <= zeros]
    if not omitted:
        return {}
    from registry.merge.losses import describe_loss  # noqa: PLC0415 - only litgpt's adapters leave something out

    return {each.finding.code: describe_loss(each, base, adapter) for each in omitted}


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
