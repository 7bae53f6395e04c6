"""Finding, annotating, pointing, removing, looking back and shipping: what is only rows."""

from __future__ import annotations

import itertools
import math
import time
from datetime import timedelta

import pytest
from sites import Maker, Site

from registry.errors import (
    Ambiguous,
    Conflict,
    InUse,
    InvalidInput,
    InvalidReference,
    NotFound,
    RegistryError,
    UnknownAdapter,
    UnknownBase,
    UnknownCheckpoint,
    UnknownEnvironment,
    UnknownMetric,
)
from registry.filters import parse_filter
from registry.manifest import BaseModel, Checkpoint, Level, Metric
from registry.service import Registry


def refs(found: object) -> list[str]:
    return [each.ref for each in found]  # type: ignore[attr-defined]


def fields_of(error: type[RegistryError], act: object) -> dict[str, object]:
    with pytest.raises(error) as caught:
        act()  # type: ignore[operator]
    assert type(caught.value) is error
    return caught.value.fields


def test_references_mean_the_same_everywhere(ckpt: Registry, make: Maker) -> None:
    one = make(step=5, metrics=(Metric(name="eval_loss", value=0.5),))
    two = make(step=9, metrics=(Metric(name="eval_loss", value=0.75),))
    ckpt.set_alias(one, "candidate")
    for text, meant in (
        ("bot", two), ("bot@v1", one), ("bot@candidate", one), ("bot@step:9", two), ("bot@best:eval_loss", one),
        ("bot@best", one), (two.digest.hex[:12], two),
    ):  # fmt: skip
        assert ckpt.resolve(text).ref == meant.ref
        assert ckpt.subject(text) == ckpt.resolve(meant.ref)


def test_what_a_checkpoint_is_comes_back_whole(ckpt: Registry, make: Maker, base: BaseModel) -> None:
    made = make(
        "team/bot", run="first", step=3, note="good ✓", tags={"stage": "rc"}, arch_version="llama-3",
        metrics=(Metric(name="acc", value=0.1 + 0.2, split="eval", step=3, direction="higher"), Metric(name="odd", value=math.inf)),
    )  # fmt: skip
    found = ckpt.resolve("team/bot@v1")
    assert found == made
    assert (found.base, found.base_name, found.architecture) == (base.digest, "base", base.fingerprint.architecture)
    assert (found.metric("acc"), found.metric("odd"), found.author) == (0.1 + 0.2, math.inf, "ada")
    assert (found.run, found.step, found.arch_version, found.tags) == ("first", 3, "llama-3", {"stage": "rc"})
    assert [(note.text, note.author) for note in found.notes] == [("good ✓", "ada")]
    assert all(entry.sha256 for entry in found.manifest.files)
    assert found.created_at.tzinfo is not None


def test_lists_are_filtered_and_come_in_pages(ckpt: Registry, make: Maker) -> None:
    for step in range(5):
        make(step=step, metrics=(Metric(name="loss", value=1 / (step + 1)),))
    make("team/other")
    assert refs(ckpt.checkpoints()) == [*(f"bot@v{n}" for n in range(1, 6)), "team/other@v1"]
    keep = parse_filter("step >= 1 and metric.loss > 0.21")
    assert refs(ckpt.checkpoints("bot", keep)) == ["bot@v2", "bot@v3", "bot@v4"]
    seen, cursor = [], ""
    for _ in range(3):
        page = ckpt.page("bot", sort="-metric.loss", cursor=cursor, limit=2)
        seen += refs(page.items)
        cursor = page.cursor
    assert (seen, cursor) == ([f"bot@v{n}" for n in range(1, 6)], "")
    assert refs(ckpt.page("bot", keep, limit=1).items) == ["bot@v4"]
    assert ckpt.checkpoints(where=parse_filter("step > 100")) == []


def test_the_best_are_ranked(ckpt: Registry, make: Maker) -> None:
    for adapter, value in (("bot", 0.5), ("bot", 0.25), ("other", 0.75)):
        make(adapter, metrics=(Metric(name="eval_loss", value=value),))
    assert (ckpt.rank().metric, refs(ckpt.rank().groups[0].checkpoints)) == ("eval_loss", ["bot@v2"])
    make("other")
    found = ckpt.rank(metric="eval_loss")
    assert (found.direction, found.candidates, found.without) == ("lower", 4, 1)
    per = ckpt.rank(metric="eval_loss", direction="higher", per="adapter", top=2)
    assert [refs(group.checkpoints) for group in per.groups] == [["bot@v1", "bot@v2"], ["other@v1"]]
    assert fields_of(UnknownMetric, lambda: ckpt.rank("bot", metric="blue")) == {
        "kind": "metric", "name": "blue", "near": ()
    }  # fmt: skip


def test_nothing_is_found_in_an_empty_registry(ckpt: Registry) -> None:
    assert (ckpt.checkpoints(), ckpt.bases(), ckpt.merged(), ckpt.shipped(), ckpt.jobs()) == ([], [], [], [], [])
    assert ckpt.history("bot") == []
    assert ckpt.page().items == ()


def test_errors_are_the_same_everywhere(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    assert fields_of(UnknownAdapter, lambda: ckpt.resolve("bott")) == {
        "kind": "adapter", "name": "bott", "near": ("bot",)
    }  # fmt: skip
    assert fields_of(UnknownCheckpoint, lambda: ckpt.resolve("bot@v7"))["name"] == "bot@v7"
    assert fields_of(InvalidReference, lambda: ckpt.resolve("no name!"))["value"] == "no name!"
    assert fields_of(UnknownAdapter, lambda: ckpt.checkpoints("nobody"))["name"] == "nobody"
    assert fields_of(UnknownAdapter, lambda: ckpt.page("nobody"))["name"] == "nobody"
    assert fields_of(InvalidInput, lambda: ckpt.page(sort="nothing"))["value"] == "nothing"
    assert fields_of(InvalidInput, lambda: ckpt.page(cursor="odd"))
    assert fields_of(InvalidInput, lambda: ckpt.note(one, " \n"))["field"] == "note"
    assert fields_of(InvalidReference, lambda: ckpt.set_alias(one, "v3"))
    assert fields_of(UnknownCheckpoint, lambda: ckpt.remove_alias("bot", "candidate"))
    assert fields_of(NotFound, lambda: ckpt.tag(one, {"b": "2"}, remove=["nothing"]))
    assert fields_of(UnknownBase, lambda: ckpt.base("lama"))["name"] == "lama"
    assert fields_of(UnknownEnvironment, lambda: ckpt.shipped("nowhere"))["near"] == ()
    ckpt.ship(two, "production")
    assert fields_of(InUse, lambda: ckpt.remove(two))["subject"] == "bot@v2"
    assert fields_of(Conflict, lambda: ckpt.rollback("production"))
    assert ckpt.resolve("bot@v1").tags == {}


def test_notes_tags_and_metrics_are_added_and_signed(ckpt: Registry, make: Maker, site: Site) -> None:
    one = make(tags={"keep": "1", "drop": "2"})
    ckpt.note(one, "first")
    site.connect("bob").note(one, "second")
    ckpt.tag(one, {"keep": "3", "new": ""}, remove=["drop"])
    ckpt.add_metrics(one, [Metric(name="acc", value=0.5), Metric(name="acc", value=0.75, direction="higher")])
    ckpt.add_metrics(one, [Metric(name="spike", value=math.nan, step=4)])
    found = ckpt.resolve("bot")
    assert [(note.text, note.author) for note in found.notes] == [("first", "ada"), ("second", "bob")]
    assert found.tags == {"keep": "3", "new": ""}
    assert found.metric("acc") == 0.75
    assert math.isnan(found.metric("spike") or 0)
    events = ckpt.history("bot@v1")
    assert [(event.action, event.author) for event in events] == [
        ("register", "ada"), ("note", "ada"), ("note", "bob"), ("tag", "ada"), ("metric", "ada"), ("metric", "ada"),
    ]  # fmt: skip
    assert [event.action for event in ckpt.history("bot", 1)] == ["metric"]
    numbers = [event.number for event in ckpt.history()]
    assert numbers == sorted(numbers)
    last = ckpt.history_page("bot@v1", author="ada", limit=3)
    before = ckpt.history_page("bot@v1", author="ada", limit=3, cursor=last.cursor)
    assert [event.action for event in (*before.items, *last.items)] == ["register", "note", "tag", "metric", "metric"]
    assert before.cursor == ""
    for wrong in ({"cursor": "zork"}, {"limit": 0}):
        with pytest.raises(InvalidInput):
            ckpt.history_page(**wrong)


def test_aliases_move_and_go(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    assert ckpt.set_alias(one, "candidate") is None
    before = ckpt.set_alias(two, "candidate")
    assert before is not None
    assert before.ref == one.ref
    assert ckpt.resolve("bot@candidate").aliases == ("candidate",)
    assert ckpt.remove_alias("bot", "candidate").ref == two.ref


def test_what_is_removed_is_gone_and_its_version_never_comes_back(ckpt: Registry, make: Maker) -> None:
    _, two = make(), make()
    ckpt.remove(two)
    fields_of(UnknownCheckpoint, lambda: ckpt.resolve("bot@v2"))
    fields_of(UnknownCheckpoint, lambda: ckpt.note(two, "too late"))
    fields_of(UnknownCheckpoint, lambda: ckpt.remove(two))
    assert make().ref == "bot@v3"


def test_details_and_trail(ckpt: Registry, make: Maker) -> None:
    made = [make(run="a", step=step) for step in (1, 2, 3)]
    shipment = ckpt.ship(made[1], "production")
    found = ckpt.details(ckpt.resolve("bot@v2"))
    assert (found.previous, found.following, found.shipments) == ("bot@v1", "bot@v3", (shipment,))
    assert (found.checkpoint, found.base.name, found.problem) == (ckpt.resolve("bot@v2"), "base", None)
    assert found.report is not None
    assert found.report.verdict is Level.PASS
    assert refs(ckpt.trail(made[1])) == ["bot@v1", "bot@v2"]


def test_shipping_and_rolling_back(ckpt: Registry, make: Maker) -> None:
    one, two, other = make(), make(), make("team/other")
    first = ckpt.ship(one, "production", "why not")
    assert (first.environment, first.checkpoint, first.note, first.author) == ("production", "bot@v1", "why not", "ada")
    time.sleep(0.01)
    ckpt.ship(two, "production")
    ckpt.ship(other, "production")
    assert [each.checkpoint for each in ckpt.shipped("production")] == ["bot@v2", "team/other@v1"]
    assert [each.checkpoint for each in ckpt.shipped(at=first.shipped_at)] == ["bot@v1"]
    assert ckpt.shipped(at=first.shipped_at - timedelta(days=1)) == []
    assert [each.number for each in ckpt.shipments("production")] == [1, 2, 3]
    assert ckpt.resolve("bot@production").ref == "bot@v2"
    assert fields_of(Ambiguous, lambda: ckpt.rollback("production")) == {
        "value": "production", "matches": ("bot", "team/other")
    }  # fmt: skip
    before, now = ckpt.rollback("production", "bot", "alarm")
    assert (before.checkpoint, now.checkpoint, now.restores, now.note) == ("bot@v2", "bot@v1", 1, "alarm")
    assert ckpt.resolve("bot@production").environments == ("production",)


def test_two_see_what_each_other_does(ckpt: Registry, make: Maker, site: Site) -> None:
    one, bob = make(), site.connect("bob")
    bob.set_alias(bob.resolve("bot"), "candidate")
    assert ckpt.resolve("bot@candidate").ref == one.ref
    assert [event.author for event in ckpt.history()][-1] == "bob"


def test_an_earlier_state_is_not_written_back(ckpt: Registry, make: Maker) -> None:
    """Verbs take a checkpoint as it was when it was looked up; what others have added since stays."""
    one = make(tags={"a": "1"})
    ckpt.tag(one, {"b": "2"})
    ckpt.tag(one, {"c": "3"})
    assert ckpt.resolve("bot").tags == {"a": "1", "b": "2", "c": "3"}


def test_many_writers_at_once(site: Site, make: Maker) -> None:
    from concurrent.futures import ThreadPoolExecutor

    one = make()
    clients = [site.connect("ada"), site.connect("bob")]
    with ThreadPoolExecutor(4) as threads:
        for each in [
            threads.submit(client.note, one, f"{number}")
            for client, number in zip(itertools.cycle(clients), range(20), strict=False)
        ]:
            each.result()
    found = clients[0].resolve("bot")
    assert sorted(int(note.text) for note in found.notes) == list(range(20))
    assert isinstance(found, Checkpoint)
