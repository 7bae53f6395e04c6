"""Policies and retention, in all three ways to run a registry."""

from __future__ import annotations

import pytest
from sites import Maker

from registry.errors import BelowPolicy, InvalidInput, UnknownAdapter, UnknownPolicy
from registry.manifest import Metric
from registry.service import Registry

POLICY = "eval_loss min, accuracy >= 0.8, patience 1, gate production"


@pytest.fixture
def measured(ckpt: Registry, make: Maker) -> Registry:
    """Three checkpoints of `bot`: the best is not accurate enough."""
    values = {10: (0.5, 0.85), 20: (0.3, 0.7), 30: (0.6, 0.9)}
    for step, (loss, accuracy) in values.items():
        checkpoint = make("bot", step=step, run="first")
        ckpt.add_metrics(checkpoint, [Metric(name="eval_loss", value=loss), Metric(name="accuracy", value=accuracy)])
    return ckpt


def test_a_policy_chooses_and_says_why(measured: Registry) -> None:
    assert measured.set_policy("bot", POLICY) is None
    before = measured.set_policy("bot", POLICY)
    assert before is not None
    assert (str(before.adapter), before.text, before.author) == ("bot", POLICY, "ada")
    assert measured.policy("bot").text == POLICY
    found = measured.select("bot")
    assert found.chosen is not None
    assert found.chosen.checkpoint.ref == "bot@v1"
    (over,) = found.passed_over
    assert str(over.failures[0]) == "accuracy >= 0.8 is wanted, accuracy is 0.7"
    other = measured.select("bot", "accuracy max").chosen
    assert other is not None
    assert other.checkpoint.ref == "bot@v3"
    assert [each.text for each in measured.policies()] == [POLICY]


def test_a_gate_keeps_out_what_is_not_good_enough(measured: Registry) -> None:
    measured.set_policy("bot", POLICY)
    best = measured.resolve("bot@v2")
    with pytest.raises(BelowPolicy) as refused:
        measured.ship(best, "production")
    assert refused.value.failures == ("accuracy >= 0.8 is wanted, accuracy is 0.7",)
    with pytest.raises(BelowPolicy):
        measured.ship(best, "production", override="  ")
    measured.ship(best, "staging")
    measured.ship(measured.resolve("bot@v1"), "production")
    shipment = measured.ship(best, "production", "hotfix", override="the set is stale")
    assert shipment.note == "hotfix (against the policy: the set is stale)"
    event = measured.history()[-1]
    assert (event.action, event.detail["override"]) == ("ship", "the set is stale")


def test_a_policy_is_taken_away(measured: Registry) -> None:
    measured.set_policy("bot", POLICY)
    assert measured.remove_policy("bot").text == POLICY
    for look in (measured.policy, measured.remove_policy, measured.select):
        with pytest.raises(UnknownPolicy):
            look("bot")
    measured.ship(measured.resolve("bot@v2"), "production")


def test_what_makes_no_sense_is_refused(measured: Registry) -> None:
    with pytest.raises(InvalidInput):
        measured.set_policy("bot", "accuracy >= 0.8")
    with pytest.raises(UnknownAdapter):
        measured.set_policy("nobody", "loss min")
    with pytest.raises(UnknownAdapter):
        measured.select("nobody")
    with pytest.raises(InvalidInput):
        measured.keep("bot", "everything")


def test_what_is_not_worth_keeping_goes(measured: Registry) -> None:
    dry = measured.keep("bot", "best 1 eval_loss, last 1")
    assert ([each.checkpoint.ref for each in dry.kept], dry.is_done) == (["bot@v2", "bot@v3"], False)
    done = measured.keep("bot", "best 1 eval_loss, last 1", dry_run=False)
    assert ([each.ref for each in done.removed], done.is_done) == (["bot@v1"], True)
    assert [each.ref for each in measured.checkpoints("bot")] == ["bot@v2", "bot@v3"]
