"""Match an adapter of any PEFT tuner but LoRA with a base model, by the tuner's row: every tensor used, every size right, or a finding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import final

from registry.changes import Change, Combined, LowRank, Resolution, Step
from registry.formats import (
    tuner_rows_dependent,
    tuner_rows_products,
    tuner_rows_rotations,
    tuner_rows_scalings,
    tuner_rows_sums,
)
from registry.formats.adapter import Adapter
from registry.formats.findings import ANOTHER_SAVE, OTHER_BASE
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import Scope, table_findings, unknown_fields
from registry.formats.peft_keys import Keys, plain_path, sort_keys
from registry.formats.peft_matching import Matching
from registry.formats.tuner_refusals import refusal
from registry.formats.tuner_row import Layout, Made, Row, Settings, Site, Unfit, WeightShape
from registry.manifest import BaseModel, Level
from registry.tensors import DType, StoredTensor

_TABLES = (tuner_rows_dependent, tuner_rows_products, tuner_rows_rotations, tuner_rows_scalings, tuner_rows_sums)
ROWS: Mapping[str, Row] = {row.peft_type.lower(): row for table in _TABLES for row in table.ROWS}


def resolve_tuner(adapter: Adapter, base: BaseModel) -> Resolution:
    """Match an adapter with a base model, from headers alone.

    Returns:
        As `resolve_peft`.

    Raises:
        CorruptFile: the configuration is not one.
    """
    row = ROWS.get(adapter.method)
    if row is None:
        return Resolution(changes=(), findings=(refusal(adapter.method),))
    settings = Settings(adapter.config, row.patterns)
    findings = tuple(row.check(settings))
    if any(finding.level is Level.REFUSED for finding in findings):  # what is in such a file is not known
        return Resolution(changes=(), findings=findings)
    keys = sort_keys(adapter.tensors, row.parameters(settings), may_be_empty=row.may_be_empty)
    matching = Matching(keys, Scope.read(adapter.config), base)
    matching.findings += findings
    return _Tuner(row, settings, keys, matching).resolve()


@final
class _Tuner:
    """One matching by a row."""

    def __init__(self, row: Row, settings: Settings, keys: Keys, matching: Matching) -> None:
        self._row, self._settings, self._keys, self._matching = row, settings, keys, matching
        self._layouts = row.layouts(settings)
        names = [name for name in keys.shared if row.is_shared(name)]
        self._shared = {name.removesuffix(".default"): keys.shared.pop(name) for name in names}
        self._used = set[str]()
        self._largest = self._find_largest()

    def resolve(self) -> Resolution:
        matching, settings, modules = self._matching, self._settings, list(map(plain_path, self._keys.parts))
        matching.findings += unknown_fields(settings.values, self._row.known_fields)
        for table in settings.tables.values():
            matching.findings += table_findings(table, modules)
        matching.replace_whole()
        for module, parts in self._keys.parts.items():
            try:
                self._add(module, parts)
            except Unfit as unfit:
                matching.findings.append(unfit.finding)
        for tensor in self._shared.values():
            if tensor.spec.name not in self._used:
                matching.unused(tensor)
        places = frozenset(self._places())
        found = matching.finish(self._keys.parts, least_dimensions=1 if self._row.trains_vectors else 2)
        return replace(found, places=places)

    def _places(self) -> Iterator[str]:
        """Tensors that hold whole numbers, as such."""
        for name, tensor in chain(self._shared.items(), *(parts.items() for parts in self._keys.parts.values())):
            if self._row.holds_places(name):
                if tensor.spec.dtype.is_whole:
                    yield tensor.spec.name
                elif not (self._row.are_places_small and tensor.spec.dtype is DType.F32):
                    self._matching.refuse("dtype", tensor.spec.name, expected="whole numbers", found=tensor.spec.dtype.long_name,
                                          advice="they may have lost digits: save the adapter again without casting it")  # fmt: skip

    def _add(self, module: str, parts: Mapping[str, StoredTensor]) -> None:
        some = next(iter(parts.values()))
        change = self._matching.change(module, some)
        if change is None:
            return
        site = self._site(module, parts, change)
        made = self._row.make(site)
        self._account(site, made)
        for kind, what in made.items():
            change = self._matching.change(module, some, kind)
            if change is None:
                continue
            if isinstance(what, StoredTensor):
                self._matching.replace(change, what)
            else:
                self._matching.add(change, *what)

    def _site(self, module: str, parts: Mapping[str, StoredTensor], change: Change) -> Site:
        weight, transposed = self._weight(module, change.target.shape)
        own = {"weight": change.source, "bias": self._matching.base.get(self._matching.name(module, "bias"))}
        site = Site(
            path=plain_path(module),
            layout=Layout(tensors={}),
            tensors=parts,
            shared=self._shared,
            sizes={},
            weight=weight,
            base={kind: tensor for kind, tensor in own.items() if tensor},
            is_transposed=transposed,
            settings=self._settings,
            modules=len(self._keys.parts),
            largest=self._largest,
        )
        return self._with_layout(site)

    def _weight(self, module: str, shape: tuple[int, ...]) -> tuple[WeightShape, bool]:
        transposed = len(shape) == 2 and self._matching.is_transposed(module)
        return WeightShape.of(shape, transposed=transposed), transposed

    def _find_largest(self) -> tuple[int, int]:
        """The most outputs and the most inputs of a trained module."""
        found = [(module, self._matching.source(self._matching.name(module))) for module in self._keys.parts]
        weights = [self._weight(module, tensor.spec.shape)[0] for module, tensor in found if tensor]
        return max((each.out for each in weights), default=0), max((each.inner for each in weights), default=0)

    def _with_layout(self, site: Site) -> Site:
        """Find the layout that the module's tensors have, and check sizes with base and configuration."""
        named = [layout for layout in self._layouts if layout.has(frozenset(site.tensors))]
        if not named:
            expected = " or ".join(sorted({", ".join(layout.tensors) for layout in self._layouts}))
            raise site.unfit("missing_factor", expected=expected, found=", ".join(site.tensors))
        named = [layout for layout in named if layout.is_convolution in (None, bool(site.weight.kernel))]
        if not named:
            expected = "a linear layer" if site.weight.kernel else "a convolution"
            raise site.unfit("shape_mismatch", expected=f"{expected}, for these tensors",
                             found=f"a weight of {list(site.base['weight'].spec.shape)}", advice=OTHER_BASE)  # fmt: skip
        shapes = {name: tensor.spec.shape for name, tensor in site.tensors.items()}
        for layout in named:
            sizes = layout.sizes(shapes, site.weight)
            if isinstance(sizes, dict):
                found = replace(site, layout=layout, sizes=sizes)
                self._check_ranks(found)
                return found
        raise self._wrong_shape(site, named[0])

    def _wrong_shape(self, site: Site, layout: Layout) -> Unfit:
        shapes = {name: tensor.spec.shape for name, tensor in site.tensors.items()}
        name = layout.sizes(shapes, site.weight)
        dimensions = ", ".join(map(str, {**layout.tensors, **layout.optional}[str(name)]))
        weight = [site.weight.out, site.weight.channels, *site.weight.kernel]
        return site.unfit(
            "shape_mismatch",
            expected=f"{name} as [{dimensions}] for a weight [out, in] = {weight}",
            found=f"{list(shapes[str(name)])}",
            advice=OTHER_BASE,
        )

    def _check_ranks(self, site: Site) -> None:
        for size, field in self._row.ranks.items():
            if size in site.sizes and site.sizes[size] != self._settings.count(field, site.path):
                told = self._settings.count(field, site.path)
                raise site.unfit("rank_mismatch", expected=f"{field} {told}, says {CONFIG_FILE}",
                                 found=f"{site.sizes[size]}", advice=ANOTHER_SAVE)  # fmt: skip

    def _account(self, site: Site, made: Made) -> None:
        """Every tensor of the module is in a step, or known to have no part in it."""
        used = {name for what in made.values() for name in _names_in(what)}
        self._used |= used
        for name, tensor in site.tensors.items():
            if tensor.spec.name not in used and name not in site.layout.unused:
                self._matching.unused(tensor)


def _names_in(what: tuple[Step, ...] | StoredTensor) -> set[str]:
    if isinstance(what, StoredTensor):
        return {what.spec.name}
    return set[str]().union(*map(_names_in_step, what))


def _names_in_step(step: Step) -> set[str]:
    if isinstance(step, LowRank):
        return {step.left.tensor.spec.name, step.right.tensor.spec.name}
    assert not isinstance(step, Combined)  # noqa: S101 - one adapter makes none
    return {tensor.spec.name for tensor in step.tensors.values()}
