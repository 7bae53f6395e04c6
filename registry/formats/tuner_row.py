"""How a PEFT tuner is described: the tensors that each module may have, the fields of its configuration, and the steps that they make.

A `Row` describes one `peft_type`. `registry.formats.peft_tuners` goes through an adapter by its row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, final

from registry.changes import LowRank, Matrix, Option, Step, Tuned
from registry.errors import CorruptFile
from registry.formats.adapter import finite_number, positive_rank
from registry.formats.findings import ANOTHER_SAVE, misfit, unsupported
from registry.formats.peft import CONFIG_FILE
from registry.formats.peft_config import COMMON_FIELDS, PatternTable
from registry.formats.peft_keys import parameter
from registry.manifest import Finding
from registry.tensors import StoredTensor

# Dimensions: a number, the name of a size, or of several (`KERNEL`, `ONES`).
Dimension = int | str
KERNEL, ONES = "*kernel", "*ones"
# By `weight` or `bias`: the steps that are added to the base's tensor, or the tensor that replaces it.
Made = Mapping[str, tuple[Step, ...] | StoredTensor]


class Unfit(Exception):
    """A module's parameters cannot be merged; `finding` says why. Never leaves `registry.formats`."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.code)
        self.finding = finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors that one kind of module has, by PEFT's name, with their dimensions.

    `out` and `in` are the weight's as the model multiplies with it, `in` with a convolution's kernel (`channels` without it); of an
    embedding they are its rows and columns. Other names stand for whatever the tensors have, the same everywhere in a module. `KERNEL`
    stands for all dimensions of a convolution's kernel, `ONES` for as many ones. `optional` tensors may be missing. `unused` ones are known
    to be saved, and to have no part in the merge. `is_convolution` None: of any weight.
    """

    tensors: Mapping[str, tuple[Dimension, ...]]
    optional: Mapping[str, tuple[Dimension, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    name: str = ""
    is_convolution: bool | None = False

    def has(self, names: frozenset[str]) -> bool:
        """Whether a module with tensors of these names may be of this kind."""
        return self.tensors.keys() <= names <= {*self.tensors, *self.optional, *self.unused}

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], weight: WeightShape) -> dict[str, int] | str:
        """The sizes behind the names, or which tensor has not the shape that it should."""
        sizes = {"out": weight.out, "in": weight.inner, "channels": weight.channels}
        for name, dimensions in {**self.tensors, **self.optional}.items():
            if name in shapes and not _bind(_spread(dimensions, weight.kernel), shapes[name], sizes):
                return name
        return sizes


def _spread(dimensions: Sequence[Dimension], kernel: tuple[int, ...]) -> list[Dimension]:
    several: dict[Dimension, tuple[int, ...]] = {KERNEL: kernel, ONES: (1,) * len(kernel)}
    return [each for dimension in dimensions for each in several.get(dimension, (dimension,))]


def _bind(dimensions: Sequence[Dimension], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    if len(dimensions) != len(shape):
        return False
    return all(
        size == (sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension)
        for dimension, size in zip(dimensions, shape, strict=True)
    )


def fixed(*layouts: Layout) -> Callable[[Settings], tuple[Layout, ...]]:
    """Layouts that do not depend on the configuration."""
    return lambda _: layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShape:
    """A weight as the model multiplies with it: `[out, channels, kernel...]`; an embedding is `[rows, columns]`, a vector `[out]`."""

    out: int
    channels: int
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], *, transposed: bool) -> WeightShape:
        """From a tensor's shape. `transposed`: it is stored as `[in, out]`."""
        out, channels, *kernel = (*shape, 1, 1)[: max(len(shape), 2)]
        return cls(out=channels, channels=out) if transposed else cls(out=out, channels=channels, kernel=tuple(kernel))

    @property
    def inner(self) -> int:
        """Columns of the matrix that it is seen as."""
        return self.channels * prod(self.kernel)


@final
class Settings:
    """`adapter_config.json`, read field by field. `patterns` names the field that has a field's values for single modules.

    Raises:
        CorruptFile: a field is missing or not what it should be; from every method.
    """

    def __init__(self, values: Mapping[str, Any], patterns: Mapping[str, str]) -> None:
        self.values = values
        self.tables = {name: PatternTable(values.get(table), table) for name, table in patterns.items()}

    def number(self, name: str, module: str = "") -> float:
        """A finite number; the module's own where a pattern gives it one."""
        return finite_number(self._value(name, module), CONFIG_FILE, name)

    def count(self, name: str, module: str = "") -> int:
        """A whole number of at least 1; the module's own where a pattern gives it one."""
        value = self._value(name, module)
        return positive_rank(
            int(value) if isinstance(value, float) and value.is_integer() else value, CONFIG_FILE, name
        )

    def whole(self, name: str) -> int:
        """A whole number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CorruptFile(CONFIG_FILE, f"{name} is {value!r}, expected a whole number")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false when the field is missing."""
        value = self.values.get(name)
        if value not in (None, True, False):
            raise CorruptFile(CONFIG_FILE, f"{name} is {value!r}, expected true or false")
        return bool(value)

    def text(self, name: str, default: str = "") -> str:
        """Text; the default when the field is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise CorruptFile(CONFIG_FILE, f"{name} is {value!r}, expected text")
        return default if value is None else value

    def _value(self, name: str, module: str) -> Any:
        own = self.tables[name].matching(module) if module and name in self.tables else []
        return own[0] if own else self.values.get(name)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One trained module, with tensors of one layout.

    `path` is the training-time one. `tensors` by PEFT's names, `shared` those of the whole adapter by what follows `base_model.`, `sizes`
    by the names in the layout, with `out`, `in` and `channels`. `base` are the module's own `weight` and `bias` in the base's files, if there.
    `modules` is how many modules are trained, `largest` the most outputs and the most inputs that any of them has.
    """

    path: str
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]
    sizes: Mapping[str, int]
    weight: WeightShape
    base: Mapping[str, StoredTensor]
    is_transposed: bool
    settings: Settings
    modules: int
    largest: tuple[int, int]

    def tuned(
        self, method: str, *names: str, options: Mapping[str, Option] | None = None, **shared: StoredTensor
    ) -> Tuned:
        """A step for the weight, with the module's tensors of these names (all of the layout's without names) and shared ones besides."""
        used = {name: self.tensors[name] for name in names or self.tensors if name not in self.layout.unused}
        return Tuned(method=method, tensors={**used, **shared}, options=options or {}, transposed=self.is_transposed)

    def low_rank(self, left: Matrix, right: Matrix, scale: float, row: int = 0, column: int = 0) -> LowRank:
        """`scale * left @ right` added to a part of the weight as the model multiplies with it, `[out, in]`."""
        if self.is_transposed:
            return LowRank(left=right.T, right=left.T, scale=scale, row=column, column=row)
        return LowRank(left=left, right=right, scale=scale, row=row, column=column)

    def of_all(self, name: str, shape: Sequence[int], at_least: Sequence[int] = ()) -> StoredTensor:
        """The tensor of the whole adapter of this name, which must have this shape; in dimensions `at_least` it may be larger."""
        tensor = self.shared.get(name)
        if tensor is None:
            raise self.unfit("missing_factor", expected=f"base_model.{name}", found="none in the file")
        found = tensor.spec.shape
        fits = len(found) == len(shape) and all(
            has >= size if number in at_least else has == size
            for number, (has, size) in enumerate(zip(found, shape, strict=True))
        )
        if not fits:
            told = ", ".join(
                f"at least {size}" if number in at_least else str(size) for number, size in enumerate(shape)
            )
            raise self.unfit("shape_mismatch", expected=f"{name} of [{told}]", found=f"{list(found)}")
        return tensor

    def unfit(self, code: str, *, expected: str, found: str, advice: str = ANOTHER_SAVE) -> Unfit:
        """To raise when adapter and base, or tensors and configuration, do not belong together."""
        return Unfit(misfit(code, self.path, expected=expected, found=found, advice=advice))

    def refused(self, code: str, *, found: str, advice: str) -> Unfit:
        """To raise when this cannot be merged, though it may well fit."""
        return Unfit(unsupported(code, self.path, found=found, advice=advice))


def no_findings(_: Settings) -> Iterator[Finding]:
    """Nothing in the configuration that would stop a merge."""
    return iter(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tuner.

    `layouts` are tried in order: a module is of the first whose names and dimensions its tensors have. `make` gives its steps; every
    tensor of the module must be in one of them. `shared` are the names of tensors of the whole adapter (what follows `base_model.`, as a
    regular expression); each of them must be in a step, too.

    `fields` are those of the configuration that the tuner has besides the common ones. A field that is set and not among them is refused.
    `ranks`: sizes that must be what the configuration says, by the field that says it; `patterns`: the field with values for single
    modules, by the field with the value for all. `check` finds in the configuration alone what cannot be merged, and what to warn of.

    `may_be_empty`: tensors may have no elements. `trains_vectors`: modules with a weight of one dimension may be targets, too. `places` are
    the names of tensors that hold whole numbers, of modules and shared, as a regular expression; `are_places_small`: they are numbers of
    rows and columns, so that nothing is lost where they were saved as float32.
    """

    peft_type: str
    layouts: Callable[[Settings], tuple[Layout, ...]]
    make: Callable[[Site], Made]
    fields: frozenset[str] = frozenset()
    patterns: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, str] = field(default_factory=dict)
    shared: str = ""
    check: Callable[[Settings], Iterator[Finding]] = no_findings
    may_be_empty: bool = False
    trains_vectors: bool = False
    places: str = ""
    are_places_small: bool = False

    @property
    def known_fields(self) -> frozenset[str]:
        """All fields that the configuration may have."""
        return COMMON_FIELDS | self.fields | frozenset(self.patterns.values())

    def is_shared(self, name: str) -> bool:
        """Whether a tensor of the whole adapter is this tuner's, by what follows `base_model.`."""
        return re.fullmatch(rf"(?:{self.shared})(?:\.default)?", name) is not None if self.shared else False

    def holds_places(self, name: str) -> bool:
        """Whether a tensor of a module, or of the whole adapter, holds whole numbers."""
        return re.fullmatch(self.places, name) is not None if self.places else False

    def parameters(self, settings: Settings) -> dict[str, re.Pattern[str]]:
        """The grammar of the module's tensors, by PEFT's name."""
        names = [
            name for layout in self.layouts(settings) for name in (*layout.tensors, *layout.optional, *layout.unused)
        ]
        return {name: _grammar(name) for name in names}


def _grammar(name: str) -> re.Pattern[str]:
    """`glora_A.Xd` has its last part behind the adapter's name, where trainers leave that inside."""
    head, _, leaf = name.rpartition(".")
    return parameter(re.escape(head), re.escape(leaf)) if head else parameter(re.escape(name))
