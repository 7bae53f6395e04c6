"""Adapters at a glance, on both databases: what SQL gives is what the checkpoints say."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import pytest
from factories import checkpoint
from sqlalchemy import Engine

from registry.curves import chart
from registry.db.catalog import Catalog
from registry.db.listing import Scope
from registry.db.schema import reading, writing
from registry.errors import InvalidInput, UnknownAdapter, UnknownMetric
from registry.filters import parse_filter
from registry.manifest import Checkpoint, Metric
from registry.refs import AdapterName
from registry.selection import best

BOT, HELPER = AdapterName("", "bot"), AdapterName("team", "helper")
FILTERS = ("metric.eval_loss > 0.5", "step >= 20 and run = 'b'", "run = 'a' or metric.acc < 0.2", "step > 1000")


def population() -> list[Checkpoint]:
    """Two adapters with two runs each; some values are missing, NaN or infinite."""
    chance = random.Random(3)
    odd = (None, math.nan, math.inf)
    found = []
    for number in range(80):
        loss = chance.choice(odd) if number % 9 == 0 else round(chance.random(), 2)
        metrics = {"acc": chance.random()} | ({} if loss is None else {"eval_loss": loss})
        adapter = ("bot", "team/helper")[number % 2]
        step = {"run": chance.choice("ab"), "step": 10 * (number // 4)}
        found.append(checkpoint(adapter=adapter, version=number // 2 + 1, metrics=metrics, **step))
    return found


@pytest.fixture
def checkpoints(engine: Engine) -> list[Checkpoint]:
    found = population()
    with writing(engine) as session:
        return [Catalog(session).checkpoints.add(each) for each in found]


def test_adapters_are_listed_by_their_newest(engine: Engine, checkpoints: list[Checkpoint]) -> None:
    with reading(engine) as session:
        overview = Catalog(session).overview
        first, second = overview.adapters()
        assert (first.name, first.checkpoints, first.newest) == (HELPER, 40, checkpoints[-1])
        assert (second.name, second.newest, second.metrics) == (BOT, checkpoints[-2], ("acc", "eval_loss"))
        assert [line.name for line in overview.adapters("elp")] == [HELPER]
        assert [line.name for line in overview.adapters(namespaces=["team"])] == [HELPER]
        assert overview.adapters("_ot") == overview.adapters(namespaces=["nobody"]) == []
        assert overview.names(10) == ["bot", "team/helper"]
        assert overview.names(10, ["team"]) == ["team/helper"]
        assert (overview.count(), overview.count(BOT), overview.count(namespaces=["nobody"])) == (80, 40, 0)
        with pytest.raises(InvalidInput):
            overview.adapters(limit=1001)


def test_leaders_are_the_best_by_what_tells(engine: Engine, checkpoints: list[Checkpoint]) -> None:
    with writing(engine) as session:
        catalog = Catalog(session)
        odd = [
            Metric(name="loss", value=1.0, data="old"),
            Metric(name="magic", value=1.0),
            Metric(name="top1_acc", value=0.5),
        ]
        catalog.checkpoints.add(checkpoint(adapter="odd", metrics=odd))
        catalog.checkpoints.add(checkpoint(adapter="odd", version=2, metrics=[replace(odd[0], data="new"), odd[1]]))
        catalog.checkpoints.add(checkpoint(adapter="team/none", metrics={"magic": 1.0}))
    with reading(engine) as session:
        overview = Catalog(session).overview
        found = {str(line.name): leader for line, leader in overview.leaders(10, 3)}
        assert list(found) == ["team/none", "odd", "team/helper", "bot"]
        assert found["team/none"] is None
        assert found["odd"] is not None
        assert (found["odd"].best.ref, found["odd"].metric, found["odd"].direction) == ("odd@v1", "top1_acc", "higher")
        for name in (BOT, HELPER):
            leader = found[str(name)]
            ranking = best([each for each in checkpoints if each.adapter == name])
            assert leader is not None
            assert (leader.best, leader.metric) == (ranking.groups[0].checkpoints[0], ranking.metric)
            assert list(leader.curve) == overview.values_of_run(name, leader.best.run, leader.metric, 3)
        assert [str(line.name) for line, _ in overview.leaders(2, 3, ["team"])] == ["team/none", "team/helper"]


def test_an_adapter_without_checkpoints_is_none(engine: Engine, checkpoints: list[Checkpoint]) -> None:
    with writing(engine) as session:
        catalog = Catalog(session)
        for each in checkpoints[::2]:
            catalog.checkpoints.remove(each)
        assert [line.name for line in catalog.overview.adapters()] == [HELPER]
        assert catalog.overview.names(10) == ["team/helper"]
        with pytest.raises(UnknownAdapter):
            catalog.overview.series(BOT, "acc")


def test_a_series_is_what_a_chart_shows(engine: Engine, checkpoints: list[Checkpoint]) -> None:
    of_bot = [each for each in checkpoints if each.adapter == BOT]
    with reading(engine) as session:
        overview = Catalog(session).overview
        assert tuple(overview.series(BOT, "eval_loss")) == chart(of_bot, "eval_loss").points
        in_run = [point.value for point in overview.series(BOT, "acc") if point.run == "a"]
        assert overview.values_of_run(BOT, "a", "acc", 100) == in_run
        assert overview.values_of_run(BOT, "a", "acc", 3) == in_run[-3:]
        with pytest.raises(UnknownMetric):
            overview.series(BOT, "loss")


def test_metric_names_are_those_that_may_be_seen(catalog: Catalog) -> None:
    catalog.checkpoints.add(checkpoint(adapter="bot", metrics={"loss": 1.0, "acc": 2.0}))
    catalog.checkpoints.add(checkpoint(adapter="team/helper", metrics={"loss": 1.0, "secret": 2.0}))
    overview = catalog.overview
    assert overview.metric_names() == ["loss", "acc", "secret"]
    assert overview.metric_names(BOT) == ["acc", "loss"]
    assert overview.metric_names(namespaces=["team"]) == ["loss", "secret"]
    with pytest.raises(UnknownAdapter) as unknown:
        overview.metric_names(BOT, ["team"])
    assert not unknown.value.near


def test_the_foremost_is_the_best(engine: Engine, checkpoints: list[Checkpoint]) -> None:
    with reading(engine) as session:
        overview = Catalog(session).overview
        for where, adapter, metric in product(["", *FILTERS], [None, BOT], ["eval_loss", "acc"]):
            passing = parse_filter(where) if where else None
            candidates = [each for each in checkpoints if adapter in (None, each.adapter)]
            candidates = [each for each in candidates if passing is None or passing.matches(each)]
            found = overview.foremost(Scope(adapter, passing), metric)
            wanted = best(candidates, metric=metric).groups[0].checkpoints[0] if candidates else None
            assert found == wanted, (where, adapter, metric)


def test_nobody_says_which_is_foremost(catalog: Catalog) -> None:
    measured = (Metric(name="magic", value=1.0), Metric(name="loss", value=1.0, data="old"))
    catalog.checkpoints.add(checkpoint(metrics=measured))
    catalog.checkpoints.add(checkpoint(version=2, metrics=(Metric(name="loss", value=0.5, data="new"),)))
    for metric in ("magic", "loss", "nothing"):
        assert catalog.overview.foremost(Scope(), metric) is None


def test_a_filter_that_lets_none_of_the_first_through_has_no_foremost(
    engine: Engine, checkpoints: list[Checkpoint]
) -> None:
    worst, good = parse_filter("not metric.eval_loss < 0.5"), parse_filter("not metric.eval_loss > 0.5")
    with reading(engine) as session:
        overview = Catalog(session).overview
        assert overview.foremost(Scope(where=worst), "eval_loss", front=5) is None
        for scope in (Scope(where=good), Scope(BOT, worst), Scope(where=parse_filter("metric.eval_loss > 0.5"))):
            assert overview.foremost(scope, "eval_loss", front=5) == overview.foremost(scope, "eval_loss") is not None
