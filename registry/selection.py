"""Which checkpoint is best: the direction of metrics, ranking, sorting. Pure: values in, values out.

A metric that is NaN or infinite counts as missing: a diverged checkpoint never wins.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, final

from registry.errors import DirectionUnknown, InvalidInput, MixedData, UnknownMetric
from registry.manifest import Checkpoint, Direction, Metric

Grouping = Literal["adapter", "run", "base"]

# Each pattern is searched in the words of a name, with one blank before, between and after them.
_KNOWN: Mapping[Direction, re.Pattern[str]] = {
    "lower": re.compile(
        r" (loss|losses|logloss|ppl|perplexity|wer|cer|error|err|nll|mae|mse|rmse|bpb|bpc|brier"
        r"|bits per (byte|char|character|token)|cross entropy|negative log likelihood) "
    ),
    "higher": re.compile(
        r" (acc|accuracy|accuracies|f1|(sacre)?bleu\d*|chrf|meteor|rouge\w*|bertscore|rewards?|margins?|em|exact match"
        r"|precision|recall|auc|auroc|mcc|matthews|pearsonr?|spearmanr?|r2|ndcg|mrr|pass( at)? (\d+|k|rate)|win ?rate|scores?) "
    ),
}
# With one of these the name speaks about a metric (its spread, its weight, a difference) and no longer is the metric.
_ABOUT = re.compile(
    r" (std|stdev|stddev|stderr|var|variance|ci|scale|scaling|scaler|weight|weights|coef|coeff|coefficient|threshold"
    r"|neg|minus|inverse|inv|delta|diff|difference|gap|drop|gain|change|improvement|reduction|chosen|rejected) "
)
_HELD_OUT = ("eval", "val", "valid", "validation", "dev", "test")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What was ranked together: the checkpoints, best first. There is at least one."""

    key: str
    checkpoints: tuple[Checkpoint, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best checkpoints by a metric: groups in the order of their keys, at least one.

    Of the `candidates`, `without` counts those that could not be ranked, because the metric is missing, NaN or infinite.
    """

    metric: str
    direction: Direction
    groups: tuple[Group, ...]
    candidates: int
    without: int


def direction_of(name: str) -> Direction | None:
    """Which way a metric is better, from its name alone: `eval_loss` is lower, `test/rouge1` higher.

    The name is cut into words at everything that is no letter or digit. None where no word is known, where they contradict each other
    (`wer_score`), and where the name is about a metric (`loss_scale`, `acc_stderr`): this never guesses.
    """
    spaced = f" {' '.join(_words(name))} "
    if _ABOUT.search(spaced):
        return None
    found: list[Direction] = [direction for direction, pattern in _KNOWN.items() if pattern.search(spaced)]
    return found[0] if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


@final
@dataclass(frozen=True, slots=True)
class Tally:
    """How many candidates have a metric of a name, split, declared direction and data, and how many of them a finite value of it."""

    name: str
    split: str
    direction: Direction | None
    data: str
    checkpoints: int
    finite: int


_Key = tuple[str, str, Direction | None, str]


def tallies(checkpoints: Iterable[Checkpoint]) -> list[Tally]:
    """Count the metrics of candidates; of one name the last of each counts."""
    present, finite = Counter[_Key](), Counter[_Key]()
    for checkpoint in checkpoints:
        for metric in _latest(checkpoint).values():
            key = metric.name, metric.split, metric.direction, metric.data
            present[key] += 1
            finite[key] += math.isfinite(metric.value)
    return [Tally(*key, count, finite[key]) for key, count in present.items()]


def _latest(checkpoint: Checkpoint) -> dict[str, Metric]:
    return {metric.name: metric for metric in checkpoint.metrics}


def shared_metric(checkpoints: Sequence[Checkpoint]) -> str:
    """The metric to rank by when nobody names one: all candidates have it, one at least a finite value, and its direction is known.

    A checkpoint whose loss is NaN has a loss: that it diverged must not make the others be ranked by something else.

    Preferred are the loss on eval, then on val, validation or test, then other metrics of those splits, then another loss, then the rest.

    Raises:
        UnknownMetric: there is none. Its name is empty, `near` holds the metrics that exist, the most common first.
    """
    return _shared(tallies(checkpoints), len(checkpoints))


def _shared(counted: Iterable[Tally], candidates: int) -> str:
    named: dict[str, list[Tally]] = {}
    for tally in counted:
        named.setdefault(tally.name, []).append(tally)
    counts = {name: sum(tally.checkpoints for tally in found) for name, found in named.items()}
    shared = [
        name
        for name, found in named.items()
        if counts[name] == candidates and any(tally.finite for tally in found) and known_direction(name, found)
    ]
    if not shared:
        raise UnknownMetric("", sorted(counts, key=lambda name: (-counts[name], name)))
    return min(shared, key=lambda name: _preference(name, named[name]))


def known_direction(name: str, counted: Iterable[Tally]) -> Direction | None:
    """Which way a metric is better: what was declared where it was recorded, else what its name says, else None."""
    declared = {tally.direction for tally in counted if tally.name == name} - {None}
    return declared.pop() if len(declared) == 1 else direction_of(name)


def declared_direction(name: str, checkpoints: Sequence[Checkpoint]) -> Direction | None:
    """The same, of checkpoints."""
    return known_direction(name, tallies(checkpoints))


def is_measured_alike(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the last values of a metric, where there are any, were measured on the same data: only then is one better than another."""
    last = [{metric.name: metric.data for metric in each.metrics} for each in checkpoints]
    return len({data[name] for data in last if name in data}) <= 1


def most_telling(names: Iterable[str]) -> list[str]:
    """Metrics by name, in the order in which `shared_metric` prefers them."""
    return sorted(names, key=lambda name: _preference(name, ()))


def _preference(name: str, counted: Iterable[Tally]) -> tuple[int, int, int, str]:
    """Sorts the more telling metric first; of two losses of one split the one with the shorter name (`eval_loss`, `eval_aux_loss`)."""
    words = _words(name)
    places = {*words, *(tally.split for tally in counted)}
    split = next((rank for rank, held_out in enumerate(_HELD_OUT) if held_out in places), len(_HELD_OUT))
    is_loss, is_held_out = "loss" in words, split < len(_HELD_OUT)
    tiers = (is_loss and split == 0, is_loss and is_held_out, is_held_out, is_loss, True)
    return tiers.index(True), split, len(words) if is_loss else 0, name


def best(
    checkpoints: Sequence[Checkpoint],
    *,
    metric: str | None = None,
    direction: Direction | None = None,
    per: Grouping | None = None,
    top: int = 1,
) -> Ranking:
    """Rank checkpoints by a metric. Of equal values the earlier step comes first, then the lower version.

    Args:
        checkpoints: the candidates, in any order.
        metric: its exact name; None takes the `shared_metric`.
        direction: which way is better; None asks what the metrics declare, then the metric's name.
        per: rank within each adapter (key: its name), run (`adapter run`) or base model (64 hex digits); None ranks all together (key: empty).
        top: the most checkpoints to keep in each group, at least 1.

    Raises:
        DirectionUnknown: neither the metrics nor the name tell which way is better.
        MixedData: it was measured on different data.
        InvalidInput: `top` is below 1.
        UnknownMetric: no candidate has a finite value of the metric, or none is shared by all.
    """
    basis = choose(tallies(checkpoints), len(checkpoints), metric=metric, direction=direction, top=top)
    name, way = basis.metric, basis.direction
    ranked = [(value, checkpoint) for checkpoint in checkpoints if (value := _finite(checkpoint, name)) is not None]
    groups: dict[str, list[Checkpoint]] = {}
    for _, checkpoint in sorted(ranked, key=lambda pair: _place(pair[0], pair[1], way)):
        groups.setdefault(group_key(checkpoint, per), []).append(checkpoint)
    return Ranking(
        metric=name,
        direction=way,
        groups=tuple(Group(key=key, checkpoints=tuple(found[:top])) for key, found in sorted(groups.items())),
        candidates=len(checkpoints),
        without=basis.without,
    )


@final
@dataclass(frozen=True, slots=True)
class Basis:
    """What is ranked by, which way, and how many candidates cannot be ranked."""

    metric: str
    direction: Direction
    without: int


def choose(
    counted: Sequence[Tally], candidates: int, *, metric: str | None, direction: Direction | None, top: int
) -> Basis:
    """What to rank candidates by, from the counts of their metrics; see `best`."""
    if top < 1:
        raise InvalidInput("top", top, "expected at least 1")
    name = _shared(counted, candidates) if metric is None else metric
    ranked = sum(tally.finite for tally in counted if tally.name == name)
    if not ranked:
        existing = sorted({tally.name for tally in counted} - {name})
        raise UnknownMetric(name, get_close_matches(name, existing))
    data = sorted({tally.data for tally in counted if tally.name == name and tally.finite})
    if len(data) > 1:
        raise MixedData(name, data)
    way = direction or known_direction(name, counted)
    if way is None:
        raise DirectionUnknown(name)
    return Basis(name, way, candidates - ranked)


def _finite(checkpoint: Checkpoint, metric: str) -> float | None:
    value = checkpoint.metric(metric)
    return value if value is not None and math.isfinite(value) else None


def _place(value: float, checkpoint: Checkpoint, direction: Direction) -> tuple[float, float, int, str, str]:
    signed = value if direction == "lower" else -value
    step = math.inf if checkpoint.step is None else checkpoint.step
    # adapter and digest settle ties between adapters, so that the order of the candidates never matters
    return signed, step, checkpoint.version, str(checkpoint.adapter), checkpoint.digest.hex


def group_key(checkpoint: Checkpoint, per: Grouping | None) -> str:
    """What a checkpoint is ranked within; see `best`."""
    match per:
        case None:
            return ""
        case "adapter":
            return str(checkpoint.adapter)
        case "run":
            return f"{checkpoint.adapter} {checkpoint.run}"
        case "base":
            return checkpoint.base.hex


_SORT_KEYS: Mapping[str, Callable[[Checkpoint], Any]] = {
    "step": lambda checkpoint: checkpoint.step,
    "created": lambda checkpoint: checkpoint.created_at,
    "version": lambda checkpoint: checkpoint.version,
    "adapter": lambda checkpoint: str(checkpoint.adapter),
    "run": lambda checkpoint: checkpoint.run or None,
    "rank": lambda checkpoint: checkpoint.manifest.rank,
    "size": lambda checkpoint: checkpoint.manifest.size_bytes,
    "parameters": lambda checkpoint: checkpoint.manifest.parameters,
}


def sort_checkpoints(checkpoints: Sequence[Checkpoint], key: str) -> list[Checkpoint]:
    """Sort by `step`, `created`, `version`, `adapter`, `run`, `rank`, `size`, `parameters` or `metric.NAME`; `-` in front for descending.

    Checkpoints without the value come last either way. Equal ones keep their order.

    Raises:
        InvalidInput: another key.
    """
    read = _sort_value(key)
    present = [checkpoint for checkpoint in checkpoints if read(checkpoint) is not None]
    missing = [checkpoint for checkpoint in checkpoints if read(checkpoint) is None]
    return sorted(present, key=read, reverse=key.startswith("-")) + missing


def sort_key(text: str) -> tuple[str, str]:
    """The attribute that a sort key means, and empty text; or `metric` and its name.

    Raises:
        InvalidInput: it is none.
    """
    name = text.removeprefix("-")
    metric = name.removeprefix("metric.")
    if metric and metric != name:
        return "metric", metric
    if name not in _SORT_KEYS:
        raise InvalidInput(
            "sort", text, f"expected {', '.join(_SORT_KEYS)} or metric.NAME, with - in front for descending"
        )
    return name, ""


def _sort_value(key: str) -> Callable[[Checkpoint], Any]:
    name, metric = sort_key(key)
    return (lambda checkpoint: _finite(checkpoint, metric)) if metric else _SORT_KEYS[name]
