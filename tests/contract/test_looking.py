"""Adapters as a whole, in all three ways to run a registry."""

from __future__ import annotations

import math

import pytest
from sites import Maker, Site

from registry.errors import InvalidInput, UnknownAdapter, UnknownMetric
from registry.manifest import Metric
from registry.service import Registry


@pytest.fixture
def measured(ckpt: Registry, make: Maker) -> Registry:
    """`bot` with two runs and a checkpoint that diverged; `team/helper` came last."""
    for run, step, value in (("slow", 20, 0.5), ("fast", 10, 0.4), ("slow", 10, 0.7), ("slow", 30, math.nan)):
        make("bot", run=run, step=step, metrics=(Metric(name="loss", value=value), Metric(name="acc", value=1 - value)))
    make("team/helper", metrics=(Metric(name="loss", value=0.1),))
    return ckpt


def test_adapters_come_with_their_newest_checkpoint(measured: Registry) -> None:
    first, second = measured.adapters()
    assert (str(first.name), first.checkpoints, first.newest.ref) == ("team/helper", 1, "team/helper@v1")
    assert (str(second.name), second.checkpoints, second.metrics) == ("bot", 4, ("acc", "loss"))
    assert second.newest == measured.resolve("bot")
    assert [str(each.name) for each in measured.adapters("HELP")] == ["team/helper"]
    assert measured.adapters("%") == []
    assert [str(each.name) for each in measured.adapters(limit=1)] == ["team/helper"]
    with pytest.raises(InvalidInput):
        measured.adapters(limit=0)


def test_a_series_is_sorted_by_run_and_step(measured: Registry) -> None:
    points = measured.series("bot", "loss")
    assert [(each.run, each.x, each.value, each.ref) for each in points] == [
        ("slow", 10, 0.7, "bot@v3"),
        ("slow", 20, 0.5, "bot@v1"),
        ("fast", 10, 0.4, "bot@v2"),
    ]
    (alone,) = measured.series("team/helper", "loss")
    assert (alone.x, alone.value, alone.ref) == (1, 0.1, "team/helper@v1")
    with pytest.raises(UnknownMetric) as unknown:
        measured.series("bot", "los")
    assert unknown.value.near == ("loss",)
    with pytest.raises(UnknownAdapter):
        measured.series("nobody", "loss")


def test_metrics_have_names(measured: Registry) -> None:
    assert measured.metric_names() == ["loss", "acc"]
    assert measured.metric_names("team/helper") == ["loss"]
    with pytest.raises(UnknownAdapter):
        measured.metric_names("nobody")


def test_who_sees_what_is_the_servers_business(server: Site) -> None:
    ada = server.connect("ada")
    for look in (ada.adapters, ada.metric_names):
        with pytest.raises(InvalidInput, match="those of the token"):
            look(namespaces=["team"])
