"""Which checkpoints of an adapter are worth keeping. Pure.

    rule   = clause { "," clause }
    clause = "best" N [ metric [ "min" | "max" ] ]    the N best; without a metric by the one that all share
           | "last" N                                 the N newest of each run
           | "every" N "steps"                        those whose step is a multiple of N
           | "shipped"                                those that ever were live anywhere
           | "tagged" key                             those with a tag of this key

For example `best 3, last 2, every 1000 steps, shipped`. What any clause keeps is kept. What something else needs (an alias, a shipment, a merge,
a checkpoint made of it) is kept whatever the rule says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from registry.errors import InvalidInput
from registry.manifest import Checkpoint, Direction
from registry.selection import best

MAX_CHARACTERS = 2000
_COUNT = r"(?P<count>[1-9][0-9]{0,8})"
_BEST = re.compile(rf"best\s+{_COUNT}(?:\s+(?P<metric>\S+)(?:\s+(?P<way>min|max))?)?")
_LAST = re.compile(rf"last\s+{_COUNT}")
_EVERY = re.compile(rf"every\s+{_COUNT}\s+steps?")
_TAGGED = re.compile(r"tagged\s+(?P<key>\S+)")
_DIRECTIONS: Mapping[str | None, Direction | None] = {None: None, "min": "lower", "max": "higher"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The `count` best by a metric; None for the one that all share."""

    count: int
    metric: str | None = None
    direction: Direction | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule as parsed. `last` and `every` are 0 where nothing is said."""

    best: tuple[Best, ...] = ()
    last: int = 0
    every: int = 0
    shipped: bool = False
    tagged: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint and why it is kept; without `reasons` it is not."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What a rule does to an adapter: `kept` and `removed`, each by version. `is_done`: the latter are gone; else nothing was changed."""

    kept: tuple[Kept, ...]
    removed: tuple[Checkpoint, ...]
    is_done: bool


def parse_rule(text: str) -> Rule:
    """Read a rule.

    Raises:
        InvalidInput: it is none; says which clause. A rule that keeps nothing is none, either.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidInput("rule", text[:80], f"more than {MAX_CHARACTERS} characters")
    bests: list[Best] = []
    last, every, shipped, tagged = 0, 0, False, []
    for clause in (part.strip() for part in text.split(",") if part.strip()):
        if match := _BEST.fullmatch(clause):
            bests.append(Best(count=int(match["count"]), metric=match["metric"], direction=_DIRECTIONS[match["way"]]))
        elif match := _LAST.fullmatch(clause):
            last = int(match["count"])
        elif match := _EVERY.fullmatch(clause):
            every = int(match["count"])
        elif match := _TAGGED.fullmatch(clause):
            tagged.append(match["key"])
        elif clause == "shipped":
            shipped = True
        else:
            raise InvalidInput(
                "rule", clause, "expected best N [METRIC], last N, every N steps, shipped, or tagged KEY"
            )
    rule = Rule(best=tuple(bests), last=last, every=every, shipped=shipped, tagged=tuple(tagged))
    if rule == Rule():
        raise InvalidInput("rule", text, "it would keep nothing")
    return rule


def judge(rule: Rule, checkpoints: Sequence[Checkpoint], shipped: Iterable[str] = ()) -> tuple[Kept, ...]:
    """Say of each checkpoint of an adapter why it is kept.

    Args:
        rule: what is worth keeping.
        checkpoints: all of the adapter's.
        shipped: references of those that ever were live.

    Returns:
        Each with its reasons, by version.

    Raises:
        UnknownMetric, DirectionUnknown, MixedData: the best cannot be told; nothing is guessed.
    """
    reasons: dict[str, list[str]] = {each.ref: [] for each in checkpoints}
    for wanted in rule.best:
        ranking = best(checkpoints, metric=wanted.metric, direction=wanted.direction, top=wanted.count)
        for place, each in enumerate(ranking.groups[0].checkpoints, 1):
            reasons[each.ref].append(f"best {place} by {ranking.metric}")
    for ref, reason in (*_last(rule, checkpoints), *_every(rule, checkpoints), *_tagged(rule, checkpoints)):
        reasons[ref].append(reason)
    if rule.shipped:
        for ref in reasons.keys() & set(shipped):
            reasons[ref].append("shipped")
    return tuple(
        Kept(checkpoint=each, reasons=tuple(reasons[each.ref]))
        for each in sorted(checkpoints, key=lambda each: each.version)
    )


def _last(rule: Rule, checkpoints: Sequence[Checkpoint]) -> Iterable[tuple[str, str]]:
    runs: dict[str, list[Checkpoint]] = {}
    for each in sorted(checkpoints, key=lambda each: (each.step or 0, each.version), reverse=True):
        runs.setdefault(each.run, []).append(each)
    for run, found in runs.items():
        for each in found[: rule.last]:
            yield each.ref, f"among the last {rule.last}" + (f" of {run}" if run and len(runs) > 1 else "")


def _every(rule: Rule, checkpoints: Sequence[Checkpoint]) -> Iterable[tuple[str, str]]:
    for each in checkpoints:
        if rule.every and each.step is not None and each.step % rule.every == 0:
            yield each.ref, f"step {each.step}"


def _tagged(rule: Rule, checkpoints: Sequence[Checkpoint]) -> Iterable[tuple[str, str]]:
    for each in checkpoints:
        for key in rule.tagged:
            if key in each.tags:
                yield each.ref, f"tagged {key}"
