"""Carry a LoRA between PEFT and litgpt.

Factors are taken apart and put together again, without arithmetic where the two can say the same. The result is read back and merged, and the
weights compared with those that the source gives, before it is published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from registry.base_models import find_base, open_base
from registry.changes import Change, LowRank, Matrix, Resolution
from registry.disk import appearing, passing
from registry.errors import CorruptFile, NotConvertible, PathNotFound, Refused
from registry.examining import examine
from registry.fingerprint import DigestCache, architecture_digest, digest_tensors
from registry.formats import read_adapter, resolve
from registry.formats.adapter import TOKENIZER_FILES
from registry.formats.base_model import read_base
from registry.formats.litgpt import MODEL_CONFIG_FILE
from registry.formats.litgpt_heads import Heads
from registry.formats.litgpt_names import Moved, Rows, rearrange
from registry.formats.lora_blocks import regroup
from registry.locations import Location, open_location
from registry.lora_files import plan_litgpt, write_litgpt, write_peft, write_yaml
from registry.manifest import BaseFormat, BaseModel, Checkpoint, Fingerprint, Format, Level, Origin
from registry.merge.reading import read_elements, read_matrix
from registry.merge.rounding import Array
from registry.rearranged import RearrangedModel
from registry.rearranging import BUFFERS, Conversion, Wanted, copy_files, other_config, row_table, with_head
from registry.registering import Registered, Registration, register
from registry.tensors import StoredTensor
from registry.workspace import Progress, Workspace, silent

_WORDS = {BaseFormat.SAFETENSORS: "a PEFT adapter", BaseFormat.LITGPT: "a litgpt adapter"}
_NAMES = {BaseFormat.SAFETENSORS: "peft", BaseFormat.LITGPT: "litgpt"}
_TOKENIZER_PARTS = ("special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt", "chat_template.jinja")
_COPIED = frozenset({*TOKENIZER_FILES, *_TOKENIZER_PARTS, "generation_config.json"})
_NO_MODULE = "transformers has no module for it that PEFT could wrap: merge, and convert the merged model"
_BLOCK_ELEMENTS, _SAMPLED_ROWS = 1 << 20, 16
_FLOAT64_SLACK, _FLOAT32_SLACK = 2.0**-40, 2.0**-20


@dataclass(frozen=True, slots=True)
class Side:
    """An adapter on a base model, with what reading them needs."""

    base: BaseModel
    model: Location
    adapter: Location
    resolution: Resolution

    def without_copy(self, change: Change) -> Change:
        """A change without the copy of the base's own values that PEFT saves beside factors of an embedding or output head."""
        copy, source = change.replacement, change.source
        if copy is None or source is None or copy.spec.shape != source.spec.shape:
            return change
        for first in range(0, copy.spec.elements, _BLOCK_ELEMENTS):
            count = min(_BLOCK_ELEMENTS, copy.spec.elements - first)
            ours = read_elements(self.adapter, copy, first, count)
            if (ours != read_elements(self.model, source, first, count)).any():
                return change
        return replace(change, replacement=None)


def convert_adapter(
    workspace: Workspace, checkpoint: Checkpoint, wanted: Wanted, progress: Progress = silent
) -> Conversion:
    """Write a LoRA in the other layout.

    Args:
        workspace: where both are recorded.
        checkpoint: what to convert.
        wanted: with a name, the result is registered under it, on the base model in the other layout; that one is found among the registered
            ones by its weights, unless it is named.
        progress: told of the bytes that are done.

    Raises:
        Refused: the check found a reason not to merge it, and so not to convert it.
        NotConvertible: something in it has no place in the other layout, or merging the result gives other weights.
        Conflict: something is there already.
    """
    words = _WORDS[wanted.layout]
    if (checkpoint.manifest.format is Format.LITGPT) == (wanted.layout is BaseFormat.LITGPT):
        raise NotConvertible(checkpoint.ref, words, ["it is one already"])
    with workspace.reading() as catalog:
        base = catalog.bases.find(checkpoint.base.hex)
    examined = examine(workspace, checkpoint, base, progress)
    if examined.report.verdict is Level.REFUSED:
        raise Refused(examined.report)
    with (
        closing(open_base(workspace, examined.base)) as model,
        closing(workspace.folder_of(checkpoint)) as adapter,
    ):
        side = Side(base=examined.base, model=model, adapter=adapter, resolution=examined.resolution)
        other = Counterpart.find(workspace, side, wanted, progress)
        dropout = _dropout(examined.adapter.config)
        with appearing(wanted.out) if wanted.out else passing(workspace.settings.home / "making") as folder:
            exact = _write_adapter(side, other, folder, words, dropout=dropout, label=checkpoint.ref)
            tensors = len(read_adapter(open_location(str(folder))).tensors)
            compared, difference = verify(side, other, folder, words, exact=exact, label=checkpoint.ref)
            registered = _register(workspace, checkpoint, other, folder, wanted, exact=exact) if wanted.name else None
    return Conversion(
        place=str(wanted.out or ""), tensors=tensors, compared=compared, exact=exact, difference=difference, registered=registered
    )  # fmt: skip


def _dropout(config: Mapping[str, Any]) -> float:
    found = config.get("lora_dropout", 0.0)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else 0.0


@final
class Counterpart:
    """The base model of an adapter in the other layout: the registered one with the same weights, or what converting it would give."""

    def __init__(self, base: BaseModel, model: Location, table: Sequence[Rows], *, is_registered: bool) -> None:
        self.base, self.model, self.table, self.is_registered = base, model, tuple(table), is_registered

    @classmethod
    def find(cls, workspace: Workspace, side: Side, wanted: Wanted, progress: Progress) -> Counterpart:
        """Look for it.

        Raises:
            NotConvertible: the one that was named is another model, or there is none and none can be made.
        """
        to_litgpt = wanted.layout is BaseFormat.LITGPT
        named = find_base(workspace, wanted.base, progress=progress) if wanted.base else None
        with workspace.reading() as catalog:
            candidates = [named] if named else [base for base in catalog.bases.all() if base.format is wanted.layout]
        reasons = []
        for candidate in candidates:
            table, reason = cls._compare(side, candidate, wanted)
            if not reason:
                return cls(candidate, open_base(workspace, candidate), table, is_registered=True)
            reasons.append(f"{candidate.name} {reason}")
        if named:
            raise NotConvertible(side.base.name, _WORDS[wanted.layout], reasons)
        return cls._made(side, wanted, to_litgpt=to_litgpt)

    @classmethod
    def _compare(cls, side: Side, candidate: BaseModel, wanted: Wanted) -> tuple[list[Rows], str]:
        """Where the rows go, and why a candidate is not what converting the base would give; no reason if it is."""
        if candidate.format is not wanted.layout:
            return [], "is not in that layout"
        to_litgpt = wanted.layout is BaseFormat.LITGPT
        try:
            table = row_table(
                candidate.config if to_litgpt else side.base.config, side.base.tensors, to_litgpt=to_litgpt
            )
        except CorruptFile as error:
            return [], f"is another model: {error.reason}"
        different = _first_difference(side, candidate, cls._arranged(side, table), table)
        return table, f"is another model: {different}" if different else ""

    @staticmethod
    def _arranged(side: Side, table: Sequence[Rows]) -> tuple[Moved, ...]:
        tensors = [tensor for tensor in side.base.tensors if not tensor.spec.name.endswith(BUFFERS)]
        return with_head(rearrange(tensors, table).tensors, table)[0]

    @classmethod
    def _made(cls, side: Side, wanted: Wanted, *, to_litgpt: bool) -> Counterpart:
        config = other_config(read_base(side.model), side.model, side.base.name, wanted)
        table = row_table(config if to_litgpt else side.base.config, side.base.tensors, to_litgpt=to_litgpt)
        laid_out = RearrangedModel(side.model, cls._arranged(side, table))
        specs = [tensor.spec for tensor in laid_out.tensors]
        digests = {
            new: side.base.fingerprint.tensors[old] for old, new in _whole_tensors(side.base.tensors, table).items()
        }
        fingerprint = Fingerprint(
            architecture=architecture_digest(wanted.layout, config, specs), weights=side.base.digest, tensors=digests
        )
        made = replace(
            side.base, format=wanted.layout, config=config, tensors=laid_out.tensors, fingerprint=fingerprint
        )
        return cls(made, laid_out, table, is_registered=False)


def _whole_tensors(tensors: Sequence[StoredTensor], table: Sequence[Rows]) -> dict[str, str]:
    """The tensors that are the same in both layouts but for their name."""
    sources: dict[str, list[Rows]] = {}
    targets: dict[str, int] = {}
    for rows in table:
        sources.setdefault(rows.source, []).append(rows)
        targets[rows.target] = targets.get(rows.target, 0) + 1
    found = {}
    for tensor in tensors:
        module, _, kind = tensor.spec.name.rpartition(".")
        places = sources.get(module, [])
        if len(places) == 1 and targets[places[0].target] == 1:
            found[tensor.spec.name] = f"{places[0].target}.{kind}"
    return found


def _first_difference(side: Side, candidate: BaseModel, moved: Sequence[Moved], table: Sequence[Rows]) -> str:
    """The name of a tensor that a candidate does not have as converting would give it; empty when it is the same model."""
    theirs = candidate.fingerprint.tensors
    whole = {new: side.base.fingerprint.tensors[old] for old, new in _whole_tensors(side.base.tensors, table).items()}
    names = {each.spec.name for each in moved}
    tied = {"lm_head.weight"} if "lm_head.weight" in names ^ set(theirs) else set()
    if missing := sorted((names ^ {name for name in theirs if not name.endswith(BUFFERS)}) - tied):
        return missing[0]
    for name, digest in whole.items():
        if name in theirs and theirs[name] != digest:
            return name
    rest = [each for each in moved if each.spec.name in theirs and each.spec.name not in whole]
    laid_out = RearrangedModel(side.model, rest)
    digests = digest_tensors(laid_out, laid_out.tensors, cache=DigestCache(Path(os.devnull)))
    return next((name for name in digests if digests[name] != theirs[name]), "")


def _write_adapter(side: Side, other: Counterpart, folder: Path, words: str, *, dropout: float, label: str) -> bool:
    changes = [
        change for change in map(side.without_copy, side.resolution.changes) if change.steps or change.replacement
    ]
    modules, problems = regroup(changes, other.table)
    # An output head of its own, which a tied model gets from a change of it, is what litgpt's models have anyway.
    if side.resolution.removed or side.resolution.omitted or side.resolution.config.keys() - {"tie_word_embeddings"}:
        problems = (*problems, "it does more than add to weights")
    if other.base.format is BaseFormat.SAFETENSORS:
        problems = (
            *problems,
            *(f"{name}: {_NO_MODULE}" for name in modules if ".experts." in name or name.endswith(".gate")),
        )
    if problems:
        raise NotConvertible(label, words, problems)
    own = [path for path in side.adapter.files() if path in _COPIED]
    base_place = other.base.url if other.is_registered else None
    if other.base.format is BaseFormat.SAFETENSORS:
        everywhere = [t.spec.name.removesuffix(".weight") for t in other.base.tensors if len(t.spec.shape) > 1]
        copy_files(side.adapter, own, folder)
        return write_peft(folder, modules, side.adapter, base_name=base_place, base_modules=everywhere, dropout=dropout)
    specs = [tensor.spec for tensor in other.base.tensors]
    lora = plan_litgpt(modules, specs, Heads.from_config(other.base.config), side.adapter)
    if not lora.plan:
        raise NotConvertible(label, words, ["nothing in it differs from the base model"])
    exact = write_litgpt(folder, lora, side.adapter, base_place=base_place or side.base.name, dropout=dropout)
    write_yaml(folder / MODEL_CONFIG_FILE, other.base.config)
    from_base = [path for path in side.model.files() if path in _COPIED and path not in own]
    copy_files(side.model, from_base, folder)
    copy_files(side.adapter, own, folder)
    return exact


def verify(side: Side, other: Counterpart, folder: Path, words: str, *, exact: bool, label: str) -> tuple[int, float]:
    """See that merging the result gives the weights that merging the source gives.

    The bases have the same rows, so what has to agree is what is added to them: `D = L R` and `D' = L' R'`, two sums of products, whose
    difference `[L, -L'] [R; R']` has the norm of `U Vᵀ`, the small triangular factors of both sides. No weight is too large for that. A few
    rows of every strip are merged as well, base and all.

    Returns:
        How many elements of weights were compared, and the largest `‖D - D'‖ / ‖D‖` of a pair of modules.

    Raises:
        NotConvertible: they differ by more than rounding.
    """
    with closing(open_location(str(folder))) as written:
        resolution = resolve(read_adapter(written), other.base)
        refused = [
            f"{each.where}: {each.code} {each.found}" for each in resolution.findings if each.level is Level.REFUSED
        ]
        if refused:
            raise NotConvertible(label, words, refused)
        before, after = _Merging(side), _Merging(Side(other.base, other.model, written, resolution))
        slack, compared, worst = _FLOAT64_SLACK if exact else _FLOAT32_SLACK, 0, 0.0
        for (source, target), strips in _changed_pairs(other.table, before, after).items():
            ours, theirs = before.delta(source), after.delta(target)
            rows, other_rows = (np.concatenate(list(each)) for each in zip(*map(_row_numbers, strips), strict=True))
            gap, size = _gap(ours.left[rows], ours.right, theirs.left[other_rows], theirs.right)
            if gap > slack * size or not _agree(before, after, strips, slack):
                raise NotConvertible(label, words, [f"{target}: merging gives other weights"])
            compared, worst = compared + len(rows) * ours.right.shape[1], max(worst, gap / size if size else 0.0)
        return compared, worst


def _changed_pairs(table: Sequence[Rows], before: _Merging, after: _Merging) -> dict[tuple[str, str], list[Rows]]:
    """The strips of each pair of modules that either adapter changes."""
    found: dict[tuple[str, str], list[Rows]] = {}
    for rows in table:
        if before.is_changed(rows.source) or after.is_changed(rows.target):
            found.setdefault((rows.source, rows.target), []).append(rows)
    return found


def _row_numbers(strip: Rows) -> tuple[Array, Array]:
    return tuple(np.arange(start, start + strip.count) for start in (strip.source_row, strip.target_row))  # type: ignore[return-value]


def _gap(left: Array, right: Array, other_left: Array, other_right: Array) -> tuple[float, float]:
    """`‖L R - L' R'‖` and `‖L R‖`, Frobenius."""
    tall, wide = _triangle(np.hstack([left, other_left])), _triangle(np.vstack([right, -other_right]).T)
    rank = left.shape[1]
    sizes = (np.linalg.norm(tall[:, part] @ wide[:, part].T) for part in (slice(rank), slice(rank, None)))
    return float(np.linalg.norm(tall @ wide.T)), float(max(sizes))


def _triangle(matrix: Array) -> Array:
    """The triangular factor, `[r, r]` for `[n, r]`: all that a norm needs to know of a tall matrix."""
    found: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(found)


def _agree(before: _Merging, after: _Merging, strips: Sequence[Rows], slack: float) -> bool:
    """Whether the first rows of some strips come out the same, base included: up to the rounding of sums, and of factors."""
    for strip in strips:
        count = min(strip.count, _SAMPLED_ROWS)
        base, delta = before.rows(strip.source, strip.source_row, count)
        other_base, other_delta = after.rows(strip.target, strip.target_row, count)
        bound = slack * max(abs(delta).max(initial=0), abs(other_delta).max(initial=0))
        if (base != other_base).any() or (abs(delta - other_delta) > bound).any():
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Delta:
    """What is added to a weight, as a product: `left [rows, r]` has the scale in it, `right` is `[r, columns]`."""

    left: Array
    right: Array


@final
class _Merging:
    """An adapter on its base model: what it adds to weights, and rows of them, in float64."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._weights = {tensor.spec.name: tensor for tensor in side.base.tensors}
        self._changes = {change.target.name: change for change in side.resolution.changes}
        self._last: tuple[str, _Delta] | None = None

    def is_changed(self, module: str) -> bool:
        """Whether the adapter changes this module's weight."""
        return f"{module}.weight" in self._changes

    def delta(self, module: str) -> _Delta:
        """What it adds to this module's weight."""
        if self._last is None or self._last[0] != module:
            self._last = module, self._load(module)
        return self._last[1]

    def rows(self, module: str, first: int, count: int) -> tuple[Array, Array]:
        """So many rows of the base's weight, and what is added to them."""
        tensor = self._tensor(module)
        columns = tensor.spec.shape[1]
        base = read_elements(self._side.model, tensor, first * columns, count * columns).reshape(count, columns)
        delta = self.delta(module)
        return base, delta.left[first : first + count] @ delta.right

    def _tensor(self, module: str) -> StoredTensor:
        name = f"{module}.weight"
        change = self._changes.get(name)
        found = change.source if change and change.source else self._weights.get(name)
        if found is None:
            raise PathNotFound(name)
        return found

    def _load(self, module: str) -> _Delta:
        rows, columns = self._tensor(module).spec.shape
        steps = _low_rank_steps(self._changes.get(f"{module}.weight"))
        places, width = dict[Matrix, int](), 0
        for step in steps:
            if step.right not in places:
                places[step.right], width = width, width + step.right.rows
        left, right = np.zeros((rows, width)), np.zeros((width, columns))
        for step in steps:
            at = slice(places[step.right], places[step.right] + step.right.rows)
            right[at] = read_matrix(self._side.adapter, step.right)
            left[step.row : step.row + step.left.rows, at] += step.scale * read_matrix(self._side.adapter, step.left)
        return _Delta(left, right)


def _low_rank_steps(change: Change | None) -> list[LowRank]:
    return list(change.deltas) if change else []


def _register(
    workspace: Workspace, checkpoint: Checkpoint, other: Counterpart, folder: Path, wanted: Wanted, *, exact: bool
) -> Registered:
    words = _NAMES[wanted.layout]
    if not other.is_registered:
        layout = "hf" if wanted.layout is BaseFormat.SAFETENSORS else "litgpt"
        made_by = f"`ckpt convert {other.base.name} --to {layout} --out DIR --as NAME` makes it, or --base names it"
        raise NotConvertible(
            checkpoint.ref, _WORDS[wanted.layout], [f"its base model is not registered in that layout: {made_by}"]
        )
    origin = Origin(action="convert", parents=(checkpoint.ref,), detail={"to": words, "exact": exact})
    said = Registration(
        adapter=wanted.name, base=other.base.digest.hex, run=checkpoint.run, step=checkpoint.step,
        metrics=checkpoint.metrics if exact else (), source=f"convert of {checkpoint.ref} to {words}", origin=origin,
    )  # fmt: skip
    (registered,) = register(workspace, str(folder), said).registered
    return registered
