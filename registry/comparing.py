"""What differs between two checkpoints: configuration, metrics, and what each does to every weight of the base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from registry.base_models import current_base, open_base
from registry.changes import Change, Resolution
from registry.errors import Conflict
from registry.formats import read_adapter, resolve
from registry.locations import Location
from registry.manifest import BaseModel, Checkpoint, Level
from registry.workspace import Progress, Workspace, silent

_FIELDS = ("format", "method", "rank", "alpha", "scaling", "targets", "dtype", "parameters", "tensors")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A fact that is not the same on both sides."""

    name: str
    one: Any
    other: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricPair:
    """A metric's last value on either side, None where there is none."""

    name: str
    one: float | None
    other: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPair:
    """What the two do to one weight: `norms` ‖D‖ of each, `distance` ‖D_1 - D_2‖, `cosine` (None where one is zero), and `ranks`, the effective
    rank of each (None where a change is not low-rank). `problem` tells why a weight could not be compared; then the numbers are 0.
    """

    name: str
    norms: tuple[float, float] = (0.0, 0.0)
    distance: float = 0.0
    cosine: float | None = None
    ranks: tuple[float | None, float | None] = (None, None)
    problem: str = ""

    @property
    def layer(self) -> int | None:
        """The number of its layer, if it is in one."""
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str:
        """What it is called in its layer: `self_attn.q_proj`."""
        found = _LAYER.search(self.name)
        return (self.name[found.end() :] if found else self.name).removesuffix(".weight")

    @property
    def relative(self) -> float:
        """The distance as a share of the larger norm."""
        return self.distance / max(self.norms) if max(self.norms) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two checkpoints compared; weights in the order of the base, those that neither touches left out.

    `unmerged` tells of each checkpoint that changes no weight why that is so; empty text for others.
    """

    one: Checkpoint
    other: Checkpoint
    fields: tuple[Field, ...]
    metrics: tuple[MetricPair, ...]
    weights: tuple[WeightPair, ...]
    unmerged: tuple[str, str]


def compare(workspace: Workspace, one: Checkpoint, other: Checkpoint, progress: Progress = silent) -> Difference:
    """Compare two checkpoints of one base model, weight by weight.

    Raises:
        Conflict: they are on different bases.
        PathNotFound, DamagedBlob: the base or a checkpoint's file is not there any more.
    """
    if one.base != other.base:
        reason = (
            f"{one.base_name} ({one.base.short}) and {other.base_name} ({other.base.short}) are different base models"
        )
        raise Conflict(f"{one.ref} and {other.ref}", reason)
    with workspace.reading() as catalog:
        base = catalog.bases.find(one.base.hex)
    base, _ = current_base(workspace, base, progress)
    with (
        closing(open_base(workspace, base)) as place,
        closing(workspace.folder_of(one)) as first,
        closing(workspace.folder_of(other)) as second,
    ):
        found = [resolve(read_adapter(folder), base) for folder in (first, second)]
        weights = tuple(_weights(base, place, (first, second), found))
    return Difference(
        one=one, other=other, fields=tuple(_fields(one, other)), metrics=tuple(_metrics(one, other)), weights=weights,
        unmerged=(_why_unmerged(found[0]), _why_unmerged(found[1])),
    )  # fmt: skip


def _why_unmerged(found: Resolution) -> str:
    if found.changes:
        return ""
    refused = next((finding for finding in found.findings if finding.level is Level.REFUSED), None)
    return f"{refused.code}: {refused.found}" if refused else "nothing that it does is a change of weights"


def _fields(one: Checkpoint, other: Checkpoint) -> list[Field]:
    pairs = [(name, getattr(one.manifest, name), getattr(other.manifest, name)) for name in _FIELDS]
    pairs += [
        ("adapter", str(one.adapter), str(other.adapter)),
        ("run", one.run, other.run),
        ("step", one.step, other.step),
    ]
    return [Field(name=name, one=mine, other=theirs) for name, mine, theirs in pairs if mine != theirs]


def _metrics(one: Checkpoint, other: Checkpoint) -> list[MetricPair]:
    names = dict.fromkeys(metric.name for checkpoint in (one, other) for metric in checkpoint.metrics)
    return [MetricPair(name=name, one=one.metric(name), other=other.metric(name)) for name in names]


def _weights(
    base: BaseModel, place: Location, folders: tuple[Location, Location], found: Sequence[Resolution]
) -> list[WeightPair]:
    from registry.merge.compare import Side, angle  # noqa: PLC0415 - numpy, which other commands need not wait for

    changes = [{change.target.name: change for change in each.changes if not change.is_copy} for each in found]
    order = {tensor.spec.name: number for number, tensor in enumerate(base.tensors)}
    names = sorted({*changes[0], *changes[1]}, key=lambda name: (order.get(name, len(order)), name))
    pairs = []
    for name in names:
        sides = [changed.get(name) for changed in changes]
        if problem := _problem(sides):
            pairs.append(WeightPair(name=name, problem=problem))
            continue
        one = angle(Side(sides[0], folders[0]), Side(sides[1], folders[1]), place)
        pairs.append(WeightPair(name=name, norms=one.norms, distance=one.distance, cosine=one.cosine, ranks=one.ranks))
    return pairs


def _problem(sides: list[Change | None]) -> str:
    """Why two changes cannot be compared; empty text when they can."""
    shapes = {change.target.shape for change in sides if change is not None}
    if len(shapes) > 1:
        return " and ".join(str(list(shape)) for shape in sorted(shapes))
    if any(
        change is not None and change.source and change.source.spec.shape != change.target.shape for change in sides
    ):
        return "another shape than in the base"
    return ""
