"""Policies: which checkpoints of an adapter are good enough, which of those is the best, and when training may stop. Pure.

    policy = clause { "," clause }
    clause = metric ( "min" | "max" )            the objective: exactly one
           | metric ( "<" | "<=" | ">" | ">=" ) number     a condition; any number of them
           | "patience" number                   advise to stop a run after so many checkpoints that were no better
           | "gate" environment                  what fails a condition does not go there; any number of them
    metric = letters, digits and . _ / - | any characters in double quotes

For example `eval_loss min, accuracy >= 0.8, patience 3, gate production`. A checkpoint without a metric, or with one that is NaN or infinite,
fails every condition on it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import final

from registry.errors import InvalidInput
from registry.manifest import Checkpoint, Direction
from registry.refs import AdapterName, check_label
from registry.selection import choose, tallies

MAX_CHARACTERS = 2000
_METRIC = r'(?P<metric>"[^"]{1,200}"|[A-Za-z0-9][A-Za-z0-9._/-]{0,199})'
_NUMBER = r"(?P<number>-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
_OBJECTIVE = re.compile(rf"{_METRIC}\s+(?P<way>min|max)")
_CONDITION = re.compile(rf"{_METRIC}\s*(?P<test><=|>=|<|>)\s*{_NUMBER}")
_PATIENCE = re.compile(r"patience\s+(?P<count>[1-9][0-9]{0,5})")
_GATE = re.compile(r"gate\s+(?P<environment>\S+)")
_CLAUSE = re.compile(r'(?:[^,"]|"[^"]*"?)+')
_TESTS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_DIRECTIONS: Mapping[str, Direction] = {"min": "lower", "max": "higher"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a metric must be: `test` is one of `<`, `<=`, `>`, `>=`."""

    metric: str
    test: str
    number: float

    def __str__(self) -> str:
        return f"{self.metric} {self.test} {self.number:g}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy as parsed. `patience` is None where nothing is said of stopping; `gates` are environments."""

    metric: str
    direction: Direction
    conditions: tuple[Condition, ...] = ()
    patience: int | None = None
    gates: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPolicy:
    """An adapter's policy as it was written, by whom and when."""

    adapter: AdapterName
    text: str
    author: str
    set_at: datetime


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A condition that a checkpoint does not meet. `found` is what it has instead; None where it was not measured."""

    condition: Condition
    found: float | None

    def __str__(self) -> str:
        measures = ": `ckpt try` measures it" if self.condition.metric.startswith("try/") else ""
        found = f"was not measured{measures}" if self.found is None else f"is {self.found:g}"
        return f"{self.condition} is wanted, {self.condition.metric} {found}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A checkpoint, its value of the objective (None: it cannot be ranked), and the conditions that it fails."""

    checkpoint: Checkpoint
    value: float | None
    failures: tuple[Failure, ...]

    @property
    def is_good(self) -> bool:
        """Whether it may be chosen."""
        return self.value is not None and not self.failures


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Whether a run may stop: its best checkpoint is `best`, and `since` checkpoints that came later were no better."""

    run: str
    best: str
    since: int
    may_stop: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a policy chooses. `judged` are all candidates, the best first; the first of them that is good is `chosen`."""

    policy: Policy
    judged: tuple[Judged, ...]
    advice: tuple[Advice, ...]

    @property
    def chosen(self) -> Judged | None:
        """The best of those that meet every condition."""
        return next((each for each in self.judged if each.is_good), None)

    @property
    def passed_over(self) -> tuple[Judged, ...]:
        """Those that rank before the chosen one and fail a condition."""
        chosen = self.chosen
        return self.judged if chosen is None else self.judged[: self.judged.index(chosen)]


def parse_policy(text: str) -> Policy:
    """Read a policy.

    Raises:
        InvalidInput: it is none; says which clause.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidInput("policy", text[:80], f"more than {MAX_CHARACTERS} characters")
    objectives: list[tuple[str, Direction]] = []
    conditions: list[Condition] = []
    patience: list[int] = []
    gates: list[str] = []
    for clause in (found.strip() for found in _CLAUSE.findall(text) if found.strip()):
        if match := _PATIENCE.fullmatch(clause):
            patience.append(int(match["count"]))
        elif match := _GATE.fullmatch(clause):
            gates.append(check_label(match["environment"]))
        elif match := _OBJECTIVE.fullmatch(clause):
            objectives.append((match["metric"].strip('"'), _DIRECTIONS[match["way"]]))
        elif match := _CONDITION.fullmatch(clause):
            conditions.append(_condition(match))
        else:
            expected = "METRIC min, METRIC max, METRIC >= NUMBER, patience N, or gate ENVIRONMENT"
            raise InvalidInput("policy", clause, f"expected {expected}")
    if len(objectives) != 1:
        raise InvalidInput("policy", text, "say what is best exactly once, such as `eval_loss min`")
    if len(patience) > 1:
        raise InvalidInput("policy", text, "say patience once")
    (metric, direction) = objectives[0]
    return Policy(
        metric=metric,
        direction=direction,
        conditions=tuple(conditions),
        patience=patience[0] if patience else None,
        gates=tuple(dict.fromkeys(gates)),
    )


def _condition(match: re.Match[str]) -> Condition:
    number = float(match["number"])
    if not math.isfinite(number):
        raise InvalidInput("policy", match[0], "the number is too large")
    return Condition(metric=match["metric"].strip('"'), test=match["test"], number=number)


def failures(policy: Policy, checkpoint: Checkpoint) -> tuple[Failure, ...]:
    """The conditions that a checkpoint fails, in the policy's order."""
    found = [(condition, _finite(checkpoint, condition.metric)) for condition in policy.conditions]
    return tuple(
        Failure(condition=condition, found=value)
        for condition, value in found
        if value is None or not _TESTS[condition.test](value, condition.number)
    )


def select(policy: Policy, checkpoints: Sequence[Checkpoint]) -> Selection:
    """Judge the checkpoints of an adapter. Of equal values the earlier step comes first, then the lower version, as in `registry.selection`.

    Raises:
        MixedData: the objective was measured on different data.
        UnknownMetric: no checkpoint has a finite value of it.
    """
    choose(tallies(checkpoints), len(checkpoints), metric=policy.metric, direction=policy.direction, top=1)
    judged = [
        Judged(checkpoint=each, value=_finite(each, policy.metric), failures=failures(policy, each))
        for each in checkpoints
    ]
    runs: dict[str, list[Judged]] = {}
    for each in judged:
        runs.setdefault(each.checkpoint.run, []).append(each)
    return Selection(
        policy=policy,
        judged=tuple(sorted(judged, key=lambda each: _place(policy, each))),
        advice=tuple(filter(None, (_advise(policy, run, found) for run, found in sorted(runs.items())))),
    )


def _place(policy: Policy, judged: Judged) -> tuple[float, float, int]:
    step = judged.checkpoint.step
    return _signed(policy, judged), math.inf if step is None else step, judged.checkpoint.version


def _signed(policy: Policy, judged: Judged) -> float:
    """What is smaller where the checkpoint is better."""
    if judged.value is None:
        return math.inf
    return judged.value if policy.direction == "lower" else -judged.value


def _advise(policy: Policy, run: str, judged: Sequence[Judged]) -> Advice | None:
    """Of a run: how many checkpoints with a value have come since its best one."""
    measured = [each for each in judged if each.value is not None]
    if policy.patience is None or not measured:
        return None
    in_time = sorted(measured, key=lambda each: (each.checkpoint.step or 0, each.checkpoint.version))
    best = min(in_time, key=lambda each: _signed(policy, each))
    since = len(in_time) - 1 - in_time.index(best)
    return Advice(run=run, best=best.checkpoint.ref, since=since, may_stop=since >= policy.patience)


def _finite(checkpoint: Checkpoint, metric: str) -> float | None:
    found = checkpoint.metric(metric)
    return found if found is not None and math.isfinite(found) else None
