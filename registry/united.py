"""Several adapters on one base model, seen as one: their files as one folder, and what they do to a tensor as one change. Pure but for reading.

A tensor of input `i` lies in `i/adapter_model.safetensors` of the united folder; paths without a number are those of one input, the leading
one, whose tokenizer the result gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, final

from registry.changes import Change, Combined, LowRank, Part, Resolution
from registry.fingerprint import digest_tensor
from registry.formats import Adapter
from registry.formats.adapter import spec_like
from registry.formats.base_model import Embeddings
from registry.formats.findings import unsupported
from registry.locations import Location
from registry.manifest import BaseModel, Finding, Recipe
from registry.merge.methods import fixed_coefficients
from registry.tensors import StoredTensor

_TIE = "tie_word_embeddings"
_SEPARATELY = "merge each by itself: these inputs make models of different shapes"


@final
class UnitedFolder:
    """The folders of several inputs as one location. `leading` is the number of the input whose files need no number."""

    def __init__(self, folders: Sequence[Location], leading: int = 0) -> None:
        self._folders, self._leading = tuple(folders), leading

    @property
    def url(self) -> str:
        return " + ".join(folder.url for folder in self._folders)

    def files(self) -> Mapping[str, int]:
        numbered = {
            f"{number}/{path}": size
            for number, folder in enumerate(self._folders)
            for path, size in folder.files().items()
        }
        return {**self._folders[self._leading].files(), **numbered}

    def identity(self, path: str) -> str:
        folder, own = self._find(path)
        return folder.identity(own)

    def open(self, path: str) -> IO[bytes]:
        folder, own = self._find(path)
        return folder.open(own)

    def read_into(self, path: str, offset_bytes: int, buffer: memoryview) -> None:
        folder, own = self._find(path)
        folder.read_into(own, offset_bytes, buffer)

    def local_path(self, path: str) -> Path | None:
        folder, own = self._find(path)
        return folder.local_path(own)

    def close(self) -> None:
        for folder in self._folders:
            folder.close()

    def _find(self, path: str) -> tuple[Location, str]:
        number, slash, own = path.partition("/")
        if slash and number.isdecimal() and int(number) < len(self._folders):
            return self._folders[int(number)], own
        return self._folders[self._leading], path


def numbered(adapter: Adapter, number: int) -> Adapter:
    """An adapter as it lies in the united folder."""
    return replace(
        adapter, tensors=tuple(replace(tensor, file=f"{number}/{tensor.file}") for tensor in adapter.tensors)
    )


def without_copies(resolution: Resolution, folder: Location, base: BaseModel) -> Resolution:
    """A resolution that replaces nothing by itself.

    PEFT saves an embedding whole along with the factors that were trained for it. Where that is the base's own to the byte, only the factors
    change anything, and they are low-rank.

    Args:
        resolution: of one adapter.
        folder: where its tensors lie.
        base: what it was matched with.
    """
    is_copy: dict[StoredTensor, bool] = {}
    changes = []
    for change in resolution.changes:
        saved, source = change.replacement, change.source
        if saved is not None and source is not None and saved not in is_copy:
            alike = spec_like(saved.spec, name=source.spec.name) == source.spec
            is_copy[saved] = alike and digest_tensor(folder, saved) == base.fingerprint.tensors[source.spec.name]
        changes.append(replace(change, replacement=None) if saved is not None and is_copy.get(saved) else change)
    return replace(resolution, changes=tuple(changes))


def unite(resolutions: Sequence[Resolution], recipe: Recipe, embeddings: Embeddings | None) -> Resolution:
    """What several adapters do to one base model together.

    Where the method gives each input a fixed share and all of them add low-rank products, so does the result; any other tensor is a
    `Combined` of task vectors, in which an input that does not touch it has a part without steps.

    Args:
        resolutions: one for each of the recipe's inputs, of adapters whose files are `numbered`. None may have been refused.
        recipe: method, weights and options.
        embeddings: the base's.

    Returns:
        One resolution; its findings are only about what the inputs disagree on.
    """
    alike = _untied_alike(resolutions, embeddings)
    by_name = [{change.target.name: change for change in each.changes} for each in alike]
    names = dict.fromkeys(name for changes in by_name for name in changes)
    joint = _Joint(recipe)
    changes = [change for name in names if (change := joint.change([each.get(name) for each in by_name])) is not None]
    findings = [*joint.findings, *_disagreements(alike)]
    config = {key: value for each in alike for key, value in each.config.items()}
    return Resolution(
        changes=tuple(changes),
        findings=tuple(findings),
        config=config,
        removed=frozenset().union(*(r.removed for r in alike)),
    )


def _untied_alike(resolutions: Sequence[Resolution], embeddings: Embeddings | None) -> Sequence[Resolution]:
    """When one input unties the embeddings, what another does to the tied matrix it does to both sides."""
    if embeddings is None or not any(each.config.get(_TIE) is False for each in resolutions):
        return resolutions
    return [
        each if each.config.get(_TIE) is False else replace(each, changes=tuple(_both_sides(each.changes, embeddings)))
        for each in resolutions
    ]


def _both_sides(changes: Iterable[Change], embeddings: Embeddings) -> Iterator[Change]:
    for change in changes:
        if change.target.name != embeddings.head_name:
            yield change
        if change.target.name == embeddings.input_name:
            yield replace(change, target=spec_like(change.target, name=embeddings.head_name))


def _disagreements(resolutions: Sequence[Resolution]) -> Iterator[Finding]:
    """Fields of the configuration and sets of tensors that every input must leave the same. Flags only ever change one way."""
    for key in dict.fromkeys(key for each in resolutions for key in each.config):
        values = {str(each.config.get(key, "as in the base")) for each in resolutions}
        if len(values) > 1 and not any(isinstance(each.config.get(key), bool) for each in resolutions):
            yield unsupported(
                "config_disagrees", f"config.json: {key}", found=", ".join(sorted(values)), advice=_SEPARATELY
            )
    for name in sorted(frozenset().union(*(each.removed for each in resolutions))):
        if any(name not in each.removed for each in resolutions):
            yield unsupported("config_disagrees", name, found="removed by some of the inputs only", advice=_SEPARATELY)


@final
class _Joint:
    """Makes one change of those that the inputs make to one tensor."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._weights = tuple(each.weight for each in recipe.inputs)
        self._shares = fixed_coefficients(recipe.method, self._weights, recipe.options)
        self.findings: list[Finding] = []

    def change(self, found: Sequence[Change | None]) -> Change | None:
        """The joint change, None where nothing is left to do; a finding where the inputs make different tensors of one name."""
        first = next(each for each in found if each is not None)
        present = [each for each in found if each is not None]
        columns = {each.columns for each in present if each.steps} or {first.columns}
        if len({(each.target, each.source) for each in present}) > 1 or len(columns) > 1:
            self._refuse(first, ", ".join(sorted(set(map(_described, present)))), _SEPARATELY)
            return None
        like = replace(first, columns=columns.pop(), replacement=None, steps=())
        if like.source is not None and like.source.spec.shape != like.target.shape:
            return self._grown(like, found)
        if not any(each.steps or each.replacement for each in present):
            return _unless_untouched(like)
        if self._shares is not None and all(each.is_low_rank for each in present):
            return _unless_untouched(replace(like, steps=tuple(self._scaled(found, self._shares))))
        return replace(like, steps=(self._combined(like.target.name, found),))

    def _scaled(self, found: Sequence[Change | None], shares: Sequence[float]) -> Iterator[LowRank]:
        for change, share in zip(found, shares, strict=True):
            for step in change.deltas if change is not None and share else ():
                yield replace(step, scale=step.scale * share)

    def _combined(self, name: str, found: Sequence[Change | None]) -> Combined:
        parts = tuple(
            Part(
                key=each.checkpoint.hex,
                weight=each.weight,
                steps=() if change is None else change.steps,
                replacement=None if change is None else change.replacement,
            )
            for each, change in zip(self._recipe.inputs, found, strict=True)
        )
        return Combined(method=self._recipe.method, parts=parts, name=name, options=self._recipe.options)

    def _grown(self, like: Change, found: Sequence[Change | None]) -> Change | None:
        """A matrix with more rows than the base's: no task vector, but shares that add up to one make a mean of it."""
        is_mean = self._shares is not None and math.isclose(sum(self._shares), 1.0, abs_tol=1e-9)
        if is_mean and all(each is not None and each.replacement is not None for each in found):
            return replace(like, source=None, steps=(self._combined(like.target.name, found),))
        advice = "new rows have no value in the base: only a mean of adapters that all have them can be made (weights that add up to 1)"
        self._refuse(like, _described(like), advice)
        return None

    def _refuse(self, change: Change, found: str, advice: str) -> None:
        self.findings.append(unsupported("shapes_disagree", change.target.name, found=found, advice=advice))


def _described(change: Change) -> str:
    source = f" made of {change.source.spec.name} {list(change.source.spec.shape)}" if change.source else ""
    return f"{list(change.target.shape)}{source}"


def _unless_untouched(change: Change) -> Change | None:
    """A change, unless it would leave the base's tensor as it is."""
    is_same = change.source is not None and change.source.spec == change.target
    return None if is_same and not change.steps else change
