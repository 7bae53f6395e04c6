"""Metrics over steps: which points there are, and how they look in characters."""

from __future__ import annotations

import math

import factories
import pytest

from cli.charts import draw
from registry.curves import chart
from registry.errors import UnknownMetric
from registry.manifest import Checkpoint


def checkpoint(version: int, step: int | None, value: float | None, run: str = "a") -> Checkpoint:
    metrics = factories.metrics({} if value is None else {"eval_loss": value})
    return factories.checkpoint(version=version, step=step, run=run, metrics=metrics)


RUN = [checkpoint(1, 10, 2.0), checkpoint(2, 20, 1.0), checkpoint(3, 30, 1.5)]


def test_points_are_ordered_by_run_and_step_and_the_best_is_known() -> None:
    found = chart([*reversed(RUN), checkpoint(4, 5, 0.5, run="b")])
    assert (found.metric, found.axis, found.left_out) == ("eval_loss", "step", 0)
    assert {run: [point.x for point in points] for run, points in found.runs.items()} == {"a": [10, 20, 30], "b": [5]}
    assert found.best is not None
    assert (found.best.x, found.best.value, found.best.run) == (5, 0.5, "b")


def test_without_steps_versions_are_counted() -> None:
    found = chart([*RUN, checkpoint(7, None, 0.9)])
    assert found.axis == "version"
    assert [point.x for point in found.points] == [1, 2, 3, 7]


def test_diverged_and_missing_values_are_left_out() -> None:
    found = chart([*RUN, checkpoint(4, 40, math.nan), checkpoint(5, 50, None)], "eval_loss")
    assert (len(found.points), found.left_out) == (3, 2)


def test_a_metric_of_unknown_direction_is_drawn_without_a_best() -> None:
    found = chart([factories.checkpoint(metrics=factories.metrics({"oddity": 3.0}), step=1)], "oddity")
    assert found.best is None
    assert not any("★" in line for line in draw(found, 60))


def test_an_unknown_metric() -> None:
    with pytest.raises(UnknownMetric):
        chart(RUN, "nothing")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_fit_the_width(width: int) -> None:
    assert max(map(len, draw(chart(RUN), width))) <= width


def test_the_picture() -> None:
    """Falling from the top left to the bottom in the middle, then half way up again."""
    lines = draw(chart(RUN), 40, height=4)
    assert lines[0] == "eval_loss"
    assert lines[1].startswith(" 2┤●")
    assert "★" in lines[4]
    assert lines[4].startswith(" 1┤")
    assert lines[3].rstrip().endswith("●")
    assert lines[6].split() == ["10", "step", "30"]
    assert lines[-1].split() == ["★", RUN[1].ref, "step", "20", "1"]


def test_runs_have_signs_of_their_own() -> None:
    lines = draw(chart([*RUN, checkpoint(4, 10, 1.2, run="b"), checkpoint(5, 30, 1.1, run="b")]), 60)
    assert "● a  ■ b" in lines
    assert sum(line.count("■") for line in lines) == 3


def test_long_names_of_runs_are_put_on_several_lines() -> None:
    found = chart([checkpoint(number, number, 1.0, run=f"learning-rate-{number}e-4-rank-16") for number in range(1, 8)])
    lines = draw(found, 80)
    assert max(map(len, lines)) <= 80
    assert all(any(f"learning-rate-{number}e-4-rank-16" in line for line in lines) for number in range(1, 8))


def test_many_runs_have_signs_of_their_own() -> None:
    found = chart([checkpoint(number, number, 1.0, run=f"r{number}") for number in range(1, 31)])
    signs = " ".join(draw(found, 80)[-4:-1]).split()[::2]
    assert len(signs) == len(set(signs)) == 30


@pytest.mark.parametrize("checkpoints", [RUN[:1], [checkpoint(1, 10, 1.0), checkpoint(2, 20, 1.0)]])
def test_a_single_point_and_equal_values(checkpoints: list[Checkpoint]) -> None:
    lines = draw(chart(checkpoints), 50)
    assert any("★" in line for line in lines)


def test_values_far_apart() -> None:
    lines = draw(chart([checkpoint(1, 1, 1e-12), checkpoint(2, 10**9, 1e12)]), 80)
    assert any("1e+12" in line for line in lines)
    assert max(map(len, lines)) <= 80
