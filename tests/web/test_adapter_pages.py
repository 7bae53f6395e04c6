"""An adapter as a page: curves, runs, and what is shipped where; base and merged models."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import httpx
import tiny
from visiting import Site

from registry.curves import Point
from registry.manifest import Checkpoint, Metric
from registry.mixing import Mixture
from registry.refs import Digest
from registry.server.pages.plotted import Curve, curves_of, plotted


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" data-curves-data>(.*?)</script>', page, re.DOTALL)
    assert found
    read: dict[str, Any] = json.loads(found[1])
    return read


def test_curves_are_those_of_the_ranking_metric_unless_asked_otherwise(site: Site) -> None:
    client = site.visitor("reader")
    page = client.get("/adapters/support-bot").text
    data = data_of(page)
    assert (data["metric"], data["axis"]) == ("eval_loss", "step")
    assert [curve["name"] for curve in data["curves"]] == ["lr-1e-4", "lr-3e-4"]
    assert data["curves"][1]["x"] == [50, 100, 150, 200, 250, 300]
    assert data["best"]["ref"] == "support-bot@v9"
    assert {(mark["label"], mark["kind"]) for mark in data["marks"]} >= {
        ("production v9", "live"),
        ("production v5", "past"),
    }
    assert page.count('<tr class="best">') == 2  # in the table of values, and its run
    other = data_of(client.get("/adapters/support-bot?metric=accuracy").text)
    assert other["metric"] == "accuracy"


def test_runs_are_chosen_in_the_address(site: Site) -> None:
    client = site.visitor("reader")
    page = client.get("/adapters/support-bot?run=lr-1e-4").text
    data = data_of(page)
    assert [curve["name"] for curve in data["curves"]] == ["lr-1e-4"]
    assert data["best"] is None
    assert "which is not shown" in page
    assert client.get("/adapters/support-bot?run=none").status_code == 404
    assert client.get("/adapters/support-bot?metric=none").status_code == 404
    assert client.get("/adapters/none").status_code == 404


def test_of_many_runs_the_newest_and_the_best_are_drawn(site: Site) -> None:
    found = site.direct.resolve("support-bot@v9")
    with site.direct.workspace.writing() as change:
        change.catalog.checkpoints.add_many([of_run(found, number) for number in range(50)])
    client = site.visitor("reader")
    page = client.get("/adapters/support-bot").text
    drawn = [curve["name"] for curve in data_of(page)["curves"]]
    assert drawn == ["lr-3e-4", *(f"more-{number}" for number in range(42, 50))]
    assert page.count('name="run"') == 41
    assert data_of(client.get("/adapters/support-bot?run=more-3").text)["curves"][0]["name"] == "more-3"


def of_run(like: Checkpoint, number: int) -> Checkpoint:
    digest = Digest(f"{number:064x}")
    metrics = tuple(replace(metric, value=2.0 if metric.name != "accuracy" else 0.1) for metric in like.metrics)
    return replace(
        like, digest=digest, run=f"more-{number}", metrics=metrics, notes=(), tags={}, aliases=(), environments=()
    )


def test_a_metric_that_nobody_knows_the_direction_of_has_no_best(site: Site) -> None:
    found = site.direct.resolve("support-bot@v1")
    site.direct.add_metrics(found, [Metric(name="oddity", value=0.5, step=50)])
    page = site.visitor("reader").get("/adapters/support-bot?metric=oddity").text
    assert data_of(page)["best"] is None
    assert "is better" not in page


def test_an_adapter_without_metrics_says_how_to_measure(site: Site) -> None:
    folder = tiny.write_adapter(site.server.home / "bare", base="tiny-llama", seed=123)
    site.direct.register(str(folder))
    assert "ckpt metric add bare" in site.visitor("reader").get("/adapters/bare").text


def test_many_points_are_thinned_to_what_can_be_seen() -> None:
    points = [Point(x=step, value=1 / (1 + step), ref=f"a@v{step + 1}", run="r") for step in range(100_000)]
    points[51_234] = Point(x=51_234, value=9.0, ref="a@v51235", run="r")
    curve = plotted(curves_of(points), "loss")["curves"][0]
    assert len(curve["x"]) <= 20_000
    assert max(curve["y"]) == 9.0  # what stands out is kept
    assert curve["x"] == sorted(curve["x"])
    assert len(Curve(name="r", points=tuple(points)).sketch) <= 242


def test_versions_stand_in_for_steps() -> None:
    points = [Point(x=version, value=0.5, ref=f"a@v{version}", run="r") for version in (1, 2)]
    assert plotted(curves_of(points), "loss")["axis"] == "version"


# -- whole models


def test_a_base_model_shows_its_identity_and_what_was_trained_on_it(site: Site) -> None:
    client = site.visitor("reader")
    base = site.direct.base("tiny-llama")
    assert "/bases/tiny-llama" in client.get("/bases").text
    page = client.get("/bases/tiny-llama").text
    for expected in (
        str(base.digest),
        "model-00001-of-00002.safetensors",
        "/adapters/nlu/intent",
        "/adapters/support-mix",
    ):
        assert expected in page
    assert client.get(f"/bases/{base.digest.hex[:12]}").status_code == 200
    assert client.get("/bases/none").status_code == 404


def test_a_merged_model_shows_its_recipe_and_what_merging_did(site: Site) -> None:
    client, (merged,) = site.visitor("reader"), site.direct.merged()
    for digest in (merged.digest.hex, merged.digest.short, merged.recipe.digest.hex):
        page = client.get(f"/merged/{digest}").text
        for expected in (
            "support-bot@v9",
            "for the load test",
            "model.layers.0.self_attn.q_proj.weight",
            "in the store",
            "production",
        ):
            assert expected in page.replace("%40", "@"), expected
    assert client.get("/merged/ffffffffffff").status_code == 404
    assert client.get("/merged/nothing").status_code == 404


def test_a_recipe_that_was_only_saved_leads_to_its_page(site: Site) -> None:
    planned = site.direct.plan(site.direct.resolve("support-bot@v1"), site.direct.resolve("support-bot@v7"))
    site.direct.save_recipe(planned)
    recipe = planned.plan.recipe.digest.hex
    found = site.visitor("reader").get(f"/merged/{recipe}")
    assert found.headers["location"] == f"/merge/saved/{recipe}"
    assert site.visitor("nlu").get(f"/merged/{recipe}").status_code == 404


def test_merging_again_starts_from_the_same_recipe(site: Site) -> None:
    one, other = site.direct.resolve("support-bot@v1"), site.direct.resolve("support-bot@v7")
    mixture = Mixture(method="ties", weights=(1.0, 0.25), options={"density": 0.3})
    merged = site.direct.merge(site.direct.plan(one, other, mixture=mixture)).merged
    page = site.visitor("writer").get(f"/merged/{merged.digest.hex}").text
    link = re.search(r'href="(/merge\?[^"]*)"', page)
    assert link
    asked = httpx.URL(link[1].replace("&amp;", "&")).params
    assert asked.get_list("ref") == ["support-bot@v1", "support-bot@v7"]
    assert (asked["method"], asked["weight.support-bot@v7"], asked["option.density"]) == ("ties", "0.25", "0.3")


def test_files_of_a_merged_model_are_sent(site: Site) -> None:
    client, (merged,) = site.visitor("reader"), site.direct.merged()
    entry = next(each for each in merged.files if each.path == "config.json")
    assert len(client.get(f"/merged/{merged.digest.hex}/files/config.json").content) == entry.size_bytes
    assert client.get(f"/merged/{merged.digest.hex}/files/none").status_code == 404


def test_a_merged_model_is_seen_by_those_who_see_all_of_it(site: Site) -> None:
    (merged,) = site.direct.merged()
    for digest in (merged.digest.hex, merged.recipe.digest.hex):
        assert site.visitor("nlu").get(f"/merged/{digest}").status_code == 404


def test_empty_pages_help_to_start(empty_site: Site) -> None:
    client = empty_site.visitor("")
    assert "ckpt base add" in client.get("/bases").text
    assert "ckpt diff" in client.get("/compare").text
