"""Which checkpoints are worth keeping: what a rule says, and what it comes to in a registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from factories import checkpoint

from registry.errors import InvalidInput, UnknownAdapter, UnknownMetric
from registry.manifest import Metric
from registry.registering import Registration
from registry.retention import Best, Rule, judge, parse_rule
from registry.service import Registry

LOSSES = {100: 0.9, 200: 0.5, 300: 0.4, 400: 0.6, 500: 0.7}


def test_every_clause_is_read() -> None:
    assert parse_rule("best 3, best 2 accuracy max, last 2, every 1000 steps, shipped, tagged team") == Rule(
        best=(Best(count=3), Best(count=2, metric="accuracy", direction="higher")),
        last=2,
        every=1000,
        shipped=True,
        tagged=("team",),
    )


@pytest.mark.parametrize("text", ["", "best", "best 0", "last -1", "every steps", "best 3 loss least", "all", ","])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_rule(text)


def test_each_checkpoint_is_kept_for_its_reasons() -> None:
    found = [
        checkpoint(version=number, step=step, metrics={"eval_loss": loss}, tags={"team": "nlu"} if step == 100 else {})
        for number, (step, loss) in enumerate(LOSSES.items(), 1)
    ]
    judged = judge(parse_rule("best 2, last 1, every 200 steps, tagged team, shipped"), found, ["support-bot@v4"])
    assert [each.reasons for each in judged] == [
        ("tagged team",),
        ("best 2 by eval_loss", "step 200"),
        ("best 1 by eval_loss",),
        ("step 400", "shipped"),
        ("among the last 1",),
    ]


def test_the_last_ones_are_those_of_each_run() -> None:
    found = [checkpoint(version=number, step=number, run=run) for number, run in enumerate("aabb", 1)]
    assert [bool(each.reasons) for each in judge(parse_rule("last 1"), found)] == [False, True, False, True]


def test_nothing_is_guessed_where_the_best_cannot_be_told() -> None:
    with pytest.raises(UnknownMetric):
        judge(parse_rule("best 1"), [checkpoint()])


@pytest.fixture
def run(ckpt: Registry, tmp_path: Path, base: Path) -> Registry:
    """Five checkpoints; one has an alias, one is shipped, two are made into a third adapter."""
    for step, loss in LOSSES.items():
        place = tiny.write_adapter(tmp_path / f"bot/checkpoint-{step}", base=base, seed=step)
        said = Registration(adapter="bot", step=step, metrics=(Metric(name="eval_loss", value=loss),))
        ckpt.register(str(place), said)
    return ckpt


def test_a_dry_run_changes_nothing_and_then_the_rest_goes(run: Registry) -> None:
    run.set_alias(run.resolve("bot@v1"), "first")
    run.ship(run.resolve("bot@v5"), "staging")
    dry = run.keep("bot", "best 1")
    assert [each.ref for each in dry.removed] == ["bot@v2", "bot@v4"]
    assert {each.checkpoint.ref: each.reasons for each in dry.kept} == {
        "bot@v1": ("alias first",),
        "bot@v3": ("best 1 by eval_loss",),
        "bot@v5": ("shipment 1 to staging",),
    }
    assert len(run.checkpoints("bot")) == 5
    done = run.keep("bot", "best 1", dry_run=False)
    assert done.is_done
    assert [each.ref for each in run.checkpoints("bot")] == ["bot@v1", "bot@v3", "bot@v5"]
    event = run.history()[-1]
    assert (event.action, event.detail["removed"]) == ("keep", ["bot@v2", "bot@v4"])
    assert run.keep("bot", "best 1", dry_run=False).removed == ()
    assert run.history()[-1].number == event.number


@pytest.mark.parametrize("rule", ["tagged golden", "every 7 steps", "shipped"])
def test_a_rule_that_would_keep_nothing_is_refused(run: Registry, rule: str) -> None:
    run.set_alias(run.resolve("bot@v1"), "first")
    for dry_run in (True, False):
        with pytest.raises(InvalidInput, match="keeps none of the 5 checkpoints of bot"):
            run.keep("bot", rule, dry_run=dry_run)
    assert len(run.checkpoints("bot")) == 5


def test_the_files_go_with_the_sweep(run: Registry) -> None:
    from datetime import timedelta

    run.keep("bot", "best 1", dry_run=False)
    run.sweep(grace=timedelta(0))
    swept = run.sweep(grace=timedelta(0))
    assert swept
    assert len(tiny.stored_blobs(run.settings.home)) == 2


def test_of_nothing_nothing_is_kept(ckpt: Registry) -> None:
    with pytest.raises(UnknownAdapter):
        ckpt.keep("nobody", "last 1")
