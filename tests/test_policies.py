"""Policies: what they say, which checkpoint they choose and why, and when training may stop."""

from __future__ import annotations

import math

import pytest
from factories import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidInput, InvalidReference, MixedData, UnknownMetric
from registry.manifest import Metric
from registry.policies import Condition, Policy, failures, parse_policy, select


def test_every_clause_is_read() -> None:
    found = parse_policy(
        ' eval_loss min , accuracy >= 0.8, "odd, name" < -1e-3, patience 3, gate production, gate staging '
    )
    assert found == Policy(
        metric="eval_loss",
        direction="lower",
        conditions=(
            Condition(metric="accuracy", test=">=", number=0.8),
            Condition(metric="odd, name", test="<", number=-1e-3),
        ),
        patience=3,
        gates=("production", "staging"),
    )
    assert str(found.conditions[0]) == "accuracy >= 0.8"


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("", ""),
        ("accuracy >= 0.8", "accuracy >= 0.8"),
        ("a min, b max", "a min, b max"),
        ("eval_loss least", "eval_loss least"),
        ("eval_loss min, accuracy => 1", "accuracy => 1"),
        ("eval_loss min, accuracy >=", "accuracy >="),
        ("eval_loss min, patience 0", "patience 0"),
        ("eval_loss min, patience 1, patience 2", "eval_loss min, patience 1, patience 2"),
        ("eval_loss min, a < 1e999", "a < 1e999"),
        ('eval_loss min, "unfinished > 1', '"unfinished > 1'),
    ],
)
def test_what_is_no_policy_is_refused_by_the_clause(text: str, clause: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_policy(text)
    assert refused.value.value == clause


def test_a_gate_is_an_environment() -> None:
    with pytest.raises(InvalidReference):
        parse_policy("loss min, gate v3")


@given(st.text(max_size=60))
def test_nothing_else_comes_out_of_any_text(text: str) -> None:
    try:
        parse_policy(text)
    except (InvalidInput, InvalidReference):
        return


def test_the_best_that_meets_every_condition_is_chosen() -> None:
    candidates = [
        checkpoint(version=1, step=10, metrics={"loss": 0.5, "accuracy": 0.90}),
        checkpoint(version=2, step=20, metrics={"loss": 0.3, "accuracy": 0.70}),
        checkpoint(version=3, step=30, metrics={"loss": 0.4, "accuracy": 0.85}),
        checkpoint(version=4, step=40, metrics={"loss": math.nan, "accuracy": 0.99}),
        checkpoint(version=5, step=50, metrics={"loss": 0.1}),
    ]
    found = select(parse_policy("loss min, accuracy >= 0.8"), candidates)
    assert found.chosen is not None
    assert found.chosen.checkpoint.version == 3
    assert [(each.checkpoint.version, each.failures[0].found) for each in found.passed_over] == [(5, None), (2, 0.7)]
    assert [each.checkpoint.version for each in found.judged] == [5, 2, 3, 1, 4]


def test_nothing_is_chosen_where_nothing_is_good() -> None:
    found = select(parse_policy("loss max, loss > 9"), [checkpoint(metrics={"loss": 1.0}), checkpoint(version=2)])
    assert found.chosen is None
    assert len(found.passed_over) == 2


def test_of_equal_ones_the_earlier_is_chosen() -> None:
    candidates = [
        checkpoint(version=2, step=20, metrics={"loss": 1.0}),
        checkpoint(version=1, step=30, metrics={"loss": 1.0}),
    ]
    chosen = select(parse_policy("loss max"), candidates).chosen
    assert chosen is not None
    assert chosen.checkpoint.version == 2


@pytest.mark.parametrize(("test", "passes"), [("<", False), ("<=", True), (">", False), (">=", True)])
def test_conditions_compare(test: str, passes: bool) -> None:
    policy = parse_policy(f"loss min, accuracy {test} 0.5")
    assert (not failures(policy, checkpoint(metrics={"accuracy": 0.5}))) == passes


def test_a_run_may_stop_when_patience_is_over() -> None:
    values = {10: 0.9, 20: 0.5, 30: 0.6, 40: 0.7, 50: 0.55}
    candidates = [
        checkpoint(version=number, step=step, run="a", metrics={"loss": value})
        for number, (step, value) in enumerate(values.items(), 1)
    ]
    candidates += [
        checkpoint(version=9, step=10, run="b", metrics={"loss": 0.4}),
        checkpoint(version=10, step=20, run="b"),
    ]
    first, second = select(parse_policy("loss min, patience 3"), candidates).advice
    assert (first.run, first.best, first.since, first.may_stop) == ("a", "support-bot@v2", 3, True)
    assert (second.run, second.since, second.may_stop) == ("b", 0, False)
    assert select(parse_policy("loss min, patience 4"), candidates).advice[0].may_stop is False
    assert select(parse_policy("loss min"), candidates).advice == ()


def test_values_of_different_data_are_not_compared() -> None:
    found = [
        checkpoint(version=number, metrics=(Metric(name="loss", value=0.5, data=data),))
        for number, data in ((1, "a" * 64), (2, "b" * 64))
    ]
    with pytest.raises(MixedData):
        select(parse_policy("loss min"), found)
    assert select(parse_policy("loss min"), found[:1]).chosen is not None


def test_a_metric_that_nobody_has_is_said_with_those_that_sound_alike() -> None:
    candidates = [checkpoint(version=1, metrics={"eval_loss": 0.5}), checkpoint(version=2, metrics={"eval_loss": 0.4})]
    with pytest.raises(UnknownMetric) as unknown:
        select(parse_policy("evall_loss min"), candidates)
    assert (unknown.value.name, unknown.value.near) == ("evall_loss", ("eval_loss",))
