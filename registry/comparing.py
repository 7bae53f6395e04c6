"""What differs between two checkpoints: configuration, metrics, and what each does to every weight of the base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.base_models import current_base, open_base
from registry.changes import Change, Resolution
from registry.errors import Changed, Conflict
from registry.formats import Adapter, read_adapter, resolve
from registry.locations import Location
from registry.manifest import BaseModel, Checkpoint, Direction, Level
from registry.selection import declared_direction, is_measured_alike
from registry.united import without_copies
from registry.workspace import Progress, Workspace, silent

if TYPE_CHECKING:
    from registry.merge.compare import Side

_FIELDS = ("format", "method", "rank", "alpha", "scaling", "targets", "dtype", "parameters", "tensors")
# What the files say in fields of their own, and is compared under the names above; litgpt's flags of modules are its targets.
_SAID_ABOVE = re.compile(
    r"peft_type|r|init_r|lora_r|lora_alpha|target_modules|use_dora|base_model_name_or_path|checkpoint_dir"
    r"|lora_(query|key|value|projection|mlp|head)"
)
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def place_of(name: str) -> tuple[int | None, str]:
    """The number of a weight's layer, None where it is in none, and what its module is called there: `self_attn.q_proj`."""
    found = _LAYER.search(name)
    module = (name[found.end() :] if found else name).removesuffix(".weight")
    return (int(found[1]) if found else None), module


@dataclass(frozen=True, slots=True, kw_only=True)
class OfWeight:
    """What is said of one weight of a model, by its name."""

    name: str

    @property
    def layer(self) -> int | None:
        """The number of its layer, if it is in one."""
        return place_of(self.name)[0]

    @property
    def module(self) -> str:
        """What it is called in its layer: `self_attn.q_proj`."""
        return place_of(self.name)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A fact that is not the same on both sides."""

    name: str
    one: Any
    other: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPair:
    """A metric's last value on either side, None where there is none. `direction` is the better one, None where nobody says. `is_like` is False
    where they were measured on different data: neither is better then.
    """

    name: str
    one: float | None
    other: float | None
    direction: Direction | None
    is_like: bool = True

    @property
    def is_better(self) -> bool | None:
        """Whether the other is better than the one; None where that is not known, or neither is."""
        if not self.is_like or self.one is None or self.other is None:
            return None
        if self.direction is None or self.one == self.other:
            return None
        if math.isnan(self.one) or math.isnan(self.other):
            return None
        return (self.other < self.one) == (self.direction == "lower")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPair(OfWeight):
    """What the two do to one weight: `norms` ‖D‖ of each, `distance` ‖D_1 - D_2‖, `cosine` (None where one is zero), and `ranks`, the effective
    rank of each (None where a change is not low-rank). `problem` tells why a weight could not be compared; then the numbers are 0.
    """

    norms: tuple[float, float] = (0.0, 0.0)
    distance: float = 0.0
    cosine: float | None = None
    ranks: tuple[float | None, float | None] = (None, None)
    problem: str = ""

    @property
    def relative(self) -> float:
        """The distance as a share of the larger norm."""
        return self.distance / max(self.norms) if max(self.norms) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two checkpoints compared; weights in the order of the base, those that neither touches left out.

    `unmerged` tells of each checkpoint what it does that is no change of weights and is not compared; empty text where there is nothing.
    """

    one: Checkpoint
    other: Checkpoint
    fields: tuple[Field, ...]
    metrics: tuple[MetricPair, ...]
    weights: tuple[WeightPair, ...]
    unmerged: tuple[str, str]


def compare(workspace: Workspace, one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> Difference:
    """Compare two checkpoints of one base model, weight by weight. The base itself is read only where a change is not low-rank.

    Raises:
        Conflict: they are on different bases.
        Changed: the base is to be read, and its files are others now.
        PathNotFound, DamagedBlob: the base or a checkpoint's file is not there any more.
    """
    if one.base != other.base:
        reason = (
            f"{one.base_name} ({one.base.short}) and {other.base_name} ({other.base.short}) are different base models"
        )
        raise Conflict(f"{one.ref} and {other.ref}", reason)
    with workspace.reading() as catalog:
        base = catalog.bases.find(one.base.hex)
    with closing(workspace.folder_of(one)) as first, closing(workspace.folder_of(other)) as second:
        folders = first, second
        adapters = read_adapter(first), read_adapter(second)
        found = [resolution_of(each, base, folder) for each, folder in zip(adapters, folders, strict=True)]
        if _needs_base(found):
            base = unchanged_base(workspace, base, progress)
            found = [resolution_of(each, base, folder) for each, folder in zip(adapters, folders, strict=True)]
            with closing(open_base(workspace, base)) as place:
                weights = tuple(_weights(base, place, folders, found, progress))
        else:
            weights = tuple(_weights(base, None, folders, found, progress))
    return Difference(
        one=one, other=other, fields=tuple(_fields((one, other), adapters, found)),
        metrics=tuple(_metrics(one, other)), weights=weights, unmerged=(_beside(found[0]), _beside(found[1])),
    )  # fmt: skip


def resolution_of(adapter: Adapter, base: BaseModel, folder: Location) -> Resolution:
    """An adapter, whose folder that is, matched with a base model."""
    return without_copies(resolve(adapter, base), folder, base)


def changes_of(found: Resolution) -> dict[str, Change]:
    """What an adapter changes, by the names of the weights; nothing where it is refused, since then not all of it is known."""
    if any(finding.level is Level.REFUSED for finding in found.findings):
        return {}
    return {change.target.name: change for change in found.changes if not change.is_copy}


def _needs_base(found: Sequence[Resolution]) -> bool:
    from registry.merge.compare import is_low_rank  # noqa: PLC0415 - numpy, which other commands need not wait for

    return not all(is_low_rank(change) for each in found for change in changes_of(each).values())


def unchanged_base(workspace: Workspace, base: BaseModel, progress: Progress = silent) -> BaseModel:
    """A base model as it lies there now, to be read.

    Raises:
        Changed: its files are others now.
        PathNotFound: it is not there any more.
    """
    base, changed = current_base(workspace, base, progress)
    if changed:
        raise Changed(f"{base.url}/{changed[0]}", "the file that was recorded", "another one")
    return base


def _beside(found: Resolution) -> str:
    refused = next((finding for finding in found.findings if finding.level is Level.REFUSED), None)
    if refused is not None:
        return f"{refused.code}: {refused.found}"
    if found.omitted:
        return "; ".join(f"{each.finding.code}: {each.finding.found}" for each in found.omitted)
    return "" if found.changes else "nothing that it does is a change of weights"


def facts_of(checkpoint: Checkpoint, adapter: Adapter | None) -> dict[str, Any]:
    """What a checkpoint is, by names: of its manifest, where it belongs, and, of an adapter that could be read, its own configuration."""
    known = {name: getattr(checkpoint.manifest, name) for name in _FIELDS}
    return {**known, **(_said(adapter.config) if adapter else {}), **_place(checkpoint)}


def _fields(
    checkpoints: tuple[Checkpoint, Checkpoint], adapters: tuple[Adapter, Adapter], found: Sequence[Resolution]
) -> Iterator[Field]:
    one, other = ({name: getattr(each.manifest, name) for name in _FIELDS} for each in checkpoints)
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(one, other)]
    if adapters[0].format is adapters[1].format:
        pairs.append((_said(adapters[0].config), _said(adapters[1].config)))
    pairs.append(
        ({f"model {k}": v for k, v in found[0].config.items()}, {f"model {k}": v for k, v in found[1].config.items()})
    )
    pairs.append((_place(checkpoints[0]), _place(checkpoints[1])))
    for mine, theirs in pairs:
        for name in dict.fromkeys((*mine, *theirs)):
            if mine.get(name) != theirs.get(name):
                yield Field(name=name, one=mine.get(name), other=theirs.get(name))


def _place(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "adapter": str(checkpoint.adapter),
        "run": checkpoint.run,
        "step": checkpoint.step,
        "arch_version": checkpoint.arch_version,
    }


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter's own configuration, those of sections by `section.field`. Lists of names are sets that were written down."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _SAID_ABOVE.fullmatch(key):
            continue
        inside = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        found |= {name: _in_order(item) for name, item in inside.items()}
    return found


def _in_order(value: Any) -> Any:
    is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(value) if is_names else value


def _metrics(one: Checkpoint, other: Checkpoint) -> list[MetricPair]:
    names = dict.fromkeys(metric.name for checkpoint in (one, other) for metric in checkpoint.metrics)
    return [
        MetricPair(
            name=name,
            one=one.metric(name),
            other=other.metric(name),
            direction=declared_direction(name, (one, other)),
            is_like=is_measured_alike(name, (one, other)),
        )
        for name in names
    ]


def _weights(
    base: BaseModel,
    place: Location | None,
    folders: tuple[Location, Location],
    found: Sequence[Resolution],
    progress: Progress,
) -> Iterator[WeightPair]:
    from registry.merge.compare import Side  # noqa: PLC0415 - as above
    from registry.merge.sums import FactorReader  # noqa: PLC0415 - as above

    changes, readers = [changes_of(each) for each in found], [FactorReader(folder) for folder in folders]
    order = {tensor.spec.name: number for number, tensor in enumerate(base.tensors)}
    names = sorted({*changes[0], *changes[1]}, key=lambda name: (order.get(name, len(order)), name))
    sizes = {name: each.target.size_bytes for changed in changes for name, each in changed.items()}
    for name in names:
        one, other = (Side(changes[i].get(name), folders[i], readers[i]) for i in (0, 1))
        yield _pair(name, one, other, place)
        progress("comparing", sizes[name], sum(sizes.values()))


def _pair(name: str, one: Side, other: Side, place: Location | None) -> WeightPair:
    from registry.merge.compare import angle  # noqa: PLC0415 - as above

    if problem := problem_of([one.change, other.change]):
        return WeightPair(name=name, problem=problem)
    found = angle(one, other, place)
    if not math.isfinite(found.distance):
        return WeightPair(name=name, problem="NaN or infinity")
    return WeightPair(name=name, norms=found.norms, distance=found.distance, cosine=found.cosine, ranks=found.ranks)


def problem_of(sides: Sequence[Change | None]) -> str:
    """Why two changes cannot be compared; empty text when they can."""
    shapes = {change.target.shape for change in sides if change is not None}
    if len(shapes) > 1:
        return " and ".join(str(list(shape)) for shape in sorted(shapes))
    if len({change.columns for change in sides if change is not None and change.steps}) > 1:
        return "seen as matrices of different shapes"
    if any(
        change is not None and change.source and change.source.spec.shape != change.target.shape for change in sides
    ):
        return "another shape than in the base"
    return ""
