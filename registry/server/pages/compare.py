"""The page that compares two to five checkpoints: what differs, what was measured, how it went, and how alike they change the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, final
from urllib.parse import urlencode

from registry.comparing import WeightPair, facts_of
from registry.errors import InvalidInput, RegistryError, UnknownMetric
from registry.formats import read_adapter
from registry.manifest import Checkpoint
from registry.remembered import Remembered
from registry.selection import declared_direction, is_measured_alike
from registry.server.pages.drawing import metric
from registry.server.pages.heat import Map, Measured, heat_map
from registry.server.pages.plotted import Curve, Mark, curves_of, plotted
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.server.scope import Scope
from registry.teamwork import Role

pages = Pages("compare")

MOST = 5
_KEPT_WEIGHTS = 200_000
_TABLE_WEIGHTS = 2000
_SUGGESTED = 30

# Of content alone, which never changes: whoever asks, in whichever registry, gets the same.
_kept: Remembered[tuple[WeightPair, ...]] = Remembered(_KEPT_WEIGHTS)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A fact of each checkpoint, as text; empty where it has none."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether they are not all the same."""
        return len(set(self.values)) > 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """A metric of each checkpoint, None where it was not measured. `best` are the numbers of the best, none where nobody says what is better;
    `deltas` are to the first, with whether they are better, None where that is not known. Of values on different data (`is_like` is False),
    there are neither.
    """

    name: str
    direction: str
    is_like: bool
    values: tuple[float | None, ...]
    best: frozenset[int]
    deltas: tuple[tuple[float, bool | None] | None, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """How alike two checkpoints change all weights together: the cosine (None where one changes nothing, or nothing can be compared), and the
    distance as a share of the larger norm.
    """

    cosine: float | None
    relative: float


# -- look


@pages.page("GET", "/compare", Role.READER)
def show_compare(visit: Visit) -> Shown | Moved:
    """Checkpoints side by side; those that are asked for twice once. Adding and dropping one lead to another address."""
    texts, dropped = visit.query.all("ref"), visit.query.all("drop")
    if dropped:
        return Moved(_url(visit, [text for text in texts if text not in dropped]))
    found = _found(visit.scope, texts)
    names = list(dict.fromkeys(each.name for one in found for each in one.metrics))
    shown = visit.query.one("metric") or next(iter(names), "")
    curves, marks, numbers = _curves(visit.scope, found, shown)
    return Shown(
        "compare.html",
        texts=texts,
        found=found,
        numbers=numbers if len(found) == len(texts) else [None] * len(texts),
        rows=_rows(visit.scope, found),
        is_whole=visit.query.has("all"),
        metrics=[_metric_row(name, found) for name in names],
        metric_names=names,
        metric_name=shown,
        data=plotted(curves, shown, marks=marks) if curves else None,
        most=MOST,
        suggested=_suggested(visit.scope),
        is_one_base=len({each.base for each in found}) == 1,
        with_query=lambda **said: _url(visit, texts, **said),
        cosine_url=f"/compare/cosine?{urlencode([('ref', each.ref) for each in found])}",
    )


def _url(visit: Visit, texts: Sequence[str], **said: str) -> str:
    kept = {name: visit.query.one(name) for name in ("metric", "all")} | said
    return f"/compare?{urlencode([*(('ref', text) for text in texts), *((k, v) for k, v in kept.items() if v)])}"


def _found(scope: Scope, texts: Sequence[str]) -> list[Checkpoint]:
    if len(texts) > MOST:
        raise InvalidInput("ref", f"{len(texts)} checkpoints", f"at most {MOST} are compared at once")
    return list({found.ref: found for found in map(scope.checkpoint, texts)}.values())


def _suggested(scope: Scope) -> list[str]:
    """What one may want to add: adapters, and the newest checkpoints."""
    newest = scope.registry.page(limit=_SUGGESTED, namespaces=scope.namespaces).items
    names = dict.fromkeys(str(each.adapter) for each in newest)
    return [*(f"{name}@best" for name in names), *(each.ref for each in newest)]


# -- facts


def _rows(scope: Scope, found: Sequence[Checkpoint]) -> list[Row]:
    facts = [_facts(scope, each) for each in found]
    names = list(dict.fromkeys(name for each in facts for name in each))
    return [Row(name=name, values=tuple(_text(each.get(name)) for each in facts)) for name in names]


def _facts(scope: Scope, checkpoint: Checkpoint) -> Mapping[str, Any]:
    try:
        adapter = read_adapter(scope.registry.workspace.folder_of(checkpoint))
    except RegistryError:
        adapter = None  # its page tells why; what is recorded of it can be compared all the same
    tags = {f"tag {key}": value for key, value in sorted(checkpoint.tags.items())}
    return {"base model": checkpoint.base_name, **facts_of(checkpoint, adapter), "author": checkpoint.author, **tags}


def _text(value: Any) -> str:
    if value is None or value in ((), [], {}, ""):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return metric(value) if isinstance(value, float) else str(value)


# -- metrics


def _metric_row(name: str, found: Sequence[Checkpoint]) -> MetricRow:
    values, is_like = tuple(each.metric(name) for each in found), is_measured_alike(name, found)
    finite = [value for value in values if is_like and value is not None and math.isfinite(value)]
    direction = declared_direction(name, found) or ""
    top = (min if direction == "lower" else max)(finite) if direction and len(finite) > 1 else None
    return MetricRow(
        name=name,
        direction=direction,
        is_like=is_like,
        values=values,
        best=frozenset(at for at, value in enumerate(values) if top is not None and value == top),
        deltas=tuple(
            _delta(values[0], value, direction) if at and is_like else None for at, value in enumerate(values)
        ),
    )


def _delta(first: float | None, value: float | None, direction: str) -> tuple[float, bool | None] | None:
    if first is None or value is None or not math.isfinite(value - first):
        return None
    better = None if not direction or value == first else (value < first) == (direction == "lower")
    return value - first, better


def _curves(scope: Scope, found: Sequence[Checkpoint], name: str) -> tuple[list[Curve], list[Mark], list[int | None]]:
    """The runs that they are of, each once, where they sit, and the number of each one's curve, None where it has none."""
    curves: dict[str, Curve] = {}
    marks: list[Mark] = []
    numbers: list[int | None] = []
    several = len({each.adapter for each in found}) > 1
    for each in found:
        own = _run(scope, each, name)
        label = f"{each.adapter} {each.run}".strip() if several else each.run or str(each.adapter)
        if own is not None:
            curves.setdefault(label, Curve(name=label, points=own.points))
            marks += [Mark(x=point.x, label=each.ref, kind="chosen") for point in own.points if point.ref == each.ref]
        numbers.append(list(curves).index(label) if own else None)
    return list(curves.values()), marks, numbers


def _run(scope: Scope, checkpoint: Checkpoint, name: str) -> Curve | None:
    try:
        points = scope.registry.series(str(checkpoint.adapter), name) if name else []
    except UnknownMetric:
        return None
    run = checkpoint.run or str(checkpoint.adapter)
    return next((curve for curve in curves_of(points) if curve.name == run), None)


# -- weights


@pages.page("GET", "/compare/cosine", Role.READER, is_slow=True)
def show_cosine(visit: Visit) -> Shown:
    """How alike they change the weights: each two of them over all weights, and one pair weight by weight."""
    found = _found(visit.scope, visit.query.all("ref"))
    if len(found) < 2:
        raise InvalidInput("ref", ", ".join(each.ref for each in found), "expected two to compare")
    pairs = {(one, other): _weights(visit.scope, found[one], found[other]) for one, other in _pairs(found)}
    chosen = list(pairs)[visit.query.number("pair", 0, range(len(pairs)))]
    weights = pairs[chosen]
    return Shown(
        "_cosine.html",
        found=found,
        alike={pair: _alike(each) for pair, each in pairs.items()},
        pairs=list(pairs),
        chosen=chosen,
        weights=weights[:_TABLE_WEIGHTS],
        left_out=len(weights[_TABLE_WEIGHTS:]),
        map=_map(weights),
        url=f"/compare/cosine?{urlencode([('ref', each.ref) for each in found])}",
        shade_of=_shade_of,
    )


def _pairs(found: Sequence[Checkpoint]) -> list[tuple[int, int]]:
    return list(combinations(range(len(found)), 2))


def _weights(scope: Scope, one: Checkpoint, other: Checkpoint) -> tuple[WeightPair, ...]:
    return _kept.get(
        (one.digest, other.digest, one.base),
        lambda: scope.registry.diff(one, other).weights,
        one.manifest.tensors + other.manifest.tensors,
    )


def _alike(weights: Sequence[WeightPair]) -> Alike:
    norms = [math.sqrt(math.fsum(each.norms[side] ** 2 for each in weights)) for side in (0, 1)]
    product = math.fsum((each.cosine or 0.0) * each.norms[0] * each.norms[1] for each in weights)
    distance = math.sqrt(math.fsum(each.distance**2 for each in weights))
    size = norms[0] * norms[1]
    cosine = max(-1.0, min(1.0, product / size)) if size else None
    return Alike(cosine=cosine, relative=distance / max(norms) if max(norms) else 0.0)


def _map(weights: Sequence[WeightPair]) -> Map:
    return heat_map(
        [Measured(layer=each.layer, module=each.module, value=each.cosine, says=_says(each)) for each in weights],
        (-1.0, 1.0),
    )


def _says(pair: WeightPair) -> str:
    if pair.problem:
        return f"{pair.name}: {pair.problem}"
    cosine = "only one changes it" if pair.cosine is None else f"cosine {pair.cosine:.3f}"
    return (
        f"{pair.name}: {cosine}, ‖Δ‖ {metric(pair.norms[0])} and {metric(pair.norms[1])}, apart {metric(pair.distance)}"
    )


def _shade_of(cosine: float | None) -> str:
    """The class of a cell with a cosine."""
    return "none" if cosine is None else f"d{min(8, int((cosine + 1) / 2 * 9))}"
