"""The verbs of the registry that are not about files: annotate, point, remove, look back, ship and roll back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry.errors import (
    Ambiguous,
    Conflict,
    DamagedBlob,
    InUse,
    InvalidInput,
    InvalidReference,
    NotFound,
    RegistryError,
    UnknownAdapter,
    UnknownCheckpoint,
    UnknownEnvironment,
    UnknownMetric,
)
from registry.filters import parse_filter
from registry.manifest import Checkpoint, Level, Metric, Shipment, utc_now
from registry.registering import Registration
from registry.service import Registry

Maker = Callable[..., Checkpoint]


@pytest.fixture
def make(ckpt: Registry, tmp_path: Path) -> Maker:
    """Registers a new checkpoint on one base; `bot` unless told otherwise."""
    base, seeds = tiny.write_base(tmp_path / "base"), itertools.count(1)

    def register(adapter: str = "bot", **said: Any) -> Checkpoint:
        seed = next(seeds)
        place = tiny.write_adapter(tmp_path / f"adapter-{seed}", base=base, seed=seed)
        return ckpt.register(str(place), Registration(adapter=adapter, **said)).registered[0].checkpoint

    return register


def actions(ckpt: Registry, subject: str = "") -> list[str]:
    return [event.action for event in ckpt.history(subject)]


def unchanged(ckpt: Registry, act: Callable[[], object], error: type[RegistryError]) -> None:
    """An act that fails changes nothing."""
    before = ckpt.checkpoints(), ckpt.history()
    with pytest.raises(error):
        act()
    assert (ckpt.checkpoints(), ckpt.history()) == before


# -- references


def test_every_form_of_a_reference(ckpt: Registry, make: Maker) -> None:
    one = make(step=5, metrics=(Metric(name="eval_loss", value=0.5),))
    two = make(step=5, metrics=(Metric(name="eval_loss", value=0.9),))
    three = make("other", step=7)
    ckpt.set_alias(one, "candidate")
    ckpt.ship(one, "production")
    meant = {
        "bot": two,
        "bot@latest": two,
        "bot@v1": one,
        "bot@candidate": one,
        "bot@production": one,
        "bot@step:5": two,
        "bot@best": one,
        "bot@best:eval_loss": one,
        "other@v1": three,
        three.digest.hex: three,
        three.digest.hex[:8]: three,
        str(three.digest): three,
    }
    assert {text: ckpt.resolve(text).ref for text in meant} == {text: found.ref for text, found in meant.items()}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nobody", UnknownAdapter), ("bot@v9", UnknownCheckpoint), ("bot@step:6", UnknownCheckpoint), ("bot@staging", UnknownCheckpoint),
        ("bot@best:bleu", UnknownMetric), ("0" * 64, UnknownCheckpoint), ("bot@", InvalidReference), ("nobody@best", UnknownAdapter),
    ],
)  # fmt: skip
def test_references_that_nothing_answers_to(ckpt: Registry, make: Maker, text: str, error: type[RegistryError]) -> None:
    make(metrics=(Metric(name="eval_loss", value=0.5),))
    for look in (ckpt.resolve, ckpt.subject):
        with pytest.raises(error):
            look(text)


def test_a_prefix_that_fits_two_lists_both(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make()
    ckpt.register(one.source, Registration(adapter="twin"))
    with pytest.raises(Ambiguous) as caught:
        ckpt.resolve(one.digest.hex[:6])
    assert sorted(match.split()[0] for match in caught.value.matches) == ["bot@v1", "twin@v1"]


def test_a_subject_is_a_checkpoint_or_a_merged_model(ckpt: Registry, make: Maker) -> None:
    one = make()
    merged = ckpt.merge(ckpt.plan(one)).merged
    assert ckpt.subject(merged.digest.hex[:10]) == merged
    assert ckpt.subject(one.digest.hex[:10]) == ckpt.subject("bot") == one


def test_listing_by_adapter_and_filter(ckpt: Registry, make: Maker) -> None:
    one, two = make(step=1), make("team/other", step=2)
    assert ckpt.checkpoints() == [one, two]
    assert ckpt.checkpoints("team/other") == [two]
    assert ckpt.checkpoints(where=parse_filter("step < 2")) == [one]
    with pytest.raises(UnknownAdapter):
        ckpt.checkpoints("team/nobody")


# -- annotate


def test_notes_tags_and_metrics_are_added_and_signed(ckpt: Registry, make: Maker) -> None:
    one = make(tags={"keep": "1", "drop": "2"})
    ckpt.note(one, "first")
    ckpt.note(one, "second")
    ckpt.tag(one, {"keep": "3", "new": ""}, remove=["drop"])
    ckpt.add_metrics(one, [Metric(name="acc", value=0.5), Metric(name="acc", value=0.75, direction="higher")])
    found = ckpt.resolve("bot")
    assert [(note.text, note.author) for note in found.notes] == [("first", "ada"), ("second", "ada")]
    assert found.tags == {"keep": "3", "new": ""}
    assert found.metric("acc") == 0.75
    assert actions(ckpt, "bot@v1") == ["register", "note", "note", "tag", "metric"]


@pytest.mark.parametrize("name", ["subject", "action", "self", "at"])
def test_a_metric_may_have_any_name(ckpt: Registry, make: Maker, name: str) -> None:
    ckpt.add_metrics(make(), [Metric(name=name, value=float("nan"))])
    assert name in ckpt.history("bot")[-1].detail


def test_annotations_that_make_no_sense_change_nothing(ckpt: Registry, make: Maker) -> None:
    one = make(tags={"a": "1"})
    unchanged(ckpt, lambda: ckpt.note(one, " \n"), InvalidInput)
    unchanged(ckpt, lambda: ckpt.tag(one, {"b": "2"}, remove=["nothing"]), NotFound)
    unchanged(ckpt, lambda: ckpt.tag(one, {"b": "2", "no name": "3"}), InvalidReference)
    for label in ("v3", "best", "a b"):
        unchanged(ckpt, partial(ckpt.set_alias, one, label), InvalidReference)
        unchanged(ckpt, partial(ckpt.ship, one, label), InvalidReference)


def test_an_alias_moves_and_goes(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    assert ckpt.set_alias(one, "candidate") is None
    before = ckpt.set_alias(two, "candidate")
    assert before is not None
    assert before.ref == one.ref
    assert ckpt.resolve("bot@candidate").ref == two.ref
    assert ckpt.remove_alias("bot", "candidate").ref == two.ref
    unchanged(ckpt, lambda: ckpt.remove_alias("bot", "candidate"), UnknownCheckpoint)
    unchanged(ckpt, lambda: ckpt.resolve("bot@candidate"), UnknownCheckpoint)


def test_an_alias_goes_before_an_environment(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    ckpt.ship(one, "production")
    ckpt.set_alias(two, "production")
    assert ckpt.resolve("bot@production").ref == two.ref
    ckpt.remove_alias("bot", "production")
    assert ckpt.resolve("bot@production").ref == one.ref


# -- remove


def test_what_is_pointed_at_stays(ckpt: Registry, make: Maker) -> None:
    one = make()
    ckpt.set_alias(one, "candidate")
    ckpt.ship(one, "production")
    merged = ckpt.merge(ckpt.plan(one)).merged
    unchanged(ckpt, lambda: ckpt.remove(one), InUse)
    with pytest.raises(InUse) as caught:
        ckpt.remove(one)
    for use in ("alias candidate", "shipment 1 to production", f"merged model {merged.digest.short}"):
        assert use in caught.value.reason


def test_a_version_is_never_given_twice(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    ckpt.remove(two)
    again = ckpt.register(two.source, Registration(adapter="bot")).registered[0]
    assert (again.created, again.checkpoint.ref, again.checkpoint.digest) == (True, "bot@v3", two.digest)
    ckpt.remove(one)
    ckpt.remove(again.checkpoint)
    assert make().ref == "bot@v4"
    unchanged(ckpt, lambda: ckpt.remove(two), UnknownCheckpoint)
    unchanged(ckpt, lambda: ckpt.note(two, "too late"), UnknownCheckpoint)


# -- look back


def test_history_is_of_everything_or_of_one_subject(ckpt: Registry, make: Maker) -> None:
    one = make()
    make("bot-2")
    ckpt.note(one, "x")
    assert actions(ckpt) == ["base.add", "register", "register", "note"]
    assert actions(ckpt, "bot") == actions(ckpt, "bot@v1") == ["register", "note"]
    assert actions(ckpt, "base") == ["base.add"]
    assert actions(ckpt, "nobody") == []
    assert [event.action for event in ckpt.history("bot", limit=1)] == ["note"]
    assert all(event.author == "ada" for event in ckpt.history())


def test_details_tell_where_it_comes_from_and_what_came_of_it(ckpt: Registry, make: Maker) -> None:
    one, two, other = make(run="a"), make(run="a"), make(run="b")
    merged = ckpt.merge(ckpt.plan(two)).merged
    shipment = ckpt.ship(merged, "production")
    found = ckpt.details(two)
    assert (found.previous, found.following) == (one.ref, "")
    assert (found.base.name, found.merged, found.shipments, found.problem) == ("base", (merged,), (shipment,), None)
    assert found.report is not None
    assert found.report.verdict is Level.PASS
    assert (ckpt.details(one).following, ckpt.details(other).previous) == (two.ref, "")


def test_details_of_a_damaged_checkpoint_say_what_is_wrong(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make()
    for blob in tiny.stored_blobs(tmp_path / "home"):
        blob.unlink()
    found = ckpt.details(one)
    assert found.report is None
    assert isinstance(found.problem, DamagedBlob)


def test_details_need_no_base_at_its_place(ckpt: Registry, make: Maker, tmp_path: Path) -> None:
    one = make()
    (tmp_path / "base").rename(tmp_path / "gone")
    assert ckpt.details(one).report is not None


# -- ship


def live(ckpt: Registry, environment: str | None = None, at: datetime | None = None) -> list[tuple[str, str]]:
    return [(each.environment, each.checkpoint) for each in ckpt.shipped(environment, at)]


def test_the_last_shipment_of_each_adapter_is_live(ckpt: Registry, make: Maker) -> None:
    one, two, other = make(), make(), make("other")
    ckpt.ship(one, "production", note="first")
    ckpt.ship(other, "production")
    ckpt.ship(two, "staging")
    ckpt.ship(two, "production")
    assert live(ckpt) == [("production", "bot@v2"), ("production", "other@v1"), ("staging", "bot@v2")]
    assert live(ckpt, "staging") == [("staging", "bot@v2")]
    shipments = ckpt.shipments("production")
    assert [(each.number, each.checkpoint, each.note, each.author) for each in shipments] == [
        (1, "bot@v1", "first", "ada"), (2, "other@v1", "", "ada"), (4, "bot@v2", "", "ada"),
    ]  # fmt: skip
    assert [each.until for each in shipments] == [shipments[2].shipped_at, None, None]
    assert ckpt.resolve("bot@v2").environments == ("production", "staging")
    assert ckpt.resolve("bot@v1").environments == ()


def test_what_was_live_at_a_time(ckpt: Registry, make: Maker) -> None:
    one, two = make(), make()
    before = utc_now()
    first = ckpt.ship(one, "production")
    time.sleep(0.002)
    between = utc_now()
    ckpt.ship(two, "production")
    assert live(ckpt, at=before) == []
    assert live(ckpt, at=first.shipped_at) == live(ckpt, at=between) == [("production", "bot@v1")]
    assert live(ckpt, at=datetime(2100, 1, 1, tzinfo=UTC)) == [("production", "bot@v2")]


def test_a_merged_model_ships_as_the_checkpoint_it_was_made_of(ckpt: Registry, make: Maker) -> None:
    one = make()
    merged = ckpt.merge(ckpt.plan(one)).merged
    shipment = ckpt.ship(merged, "production")
    assert (shipment.checkpoint, shipment.merged, shipment.base_name) == ("bot@v1", merged.digest, "base")
    assert ckpt.resolve("bot@production").ref == "bot@v1"


def test_rolling_back_walks_further_back_each_time(ckpt: Registry, make: Maker) -> None:
    made = [make() for _ in range(3)]
    merged = ckpt.merge(ckpt.plan(made[0])).merged
    ckpt.ship(merged, "production")
    for checkpoint in made[1:]:
        ckpt.ship(checkpoint, "production")
    before = ckpt.shipments()
    steps = [ckpt.rollback("production", note="alarm") for _ in range(2)]
    assert [(was.checkpoint, now.checkpoint, now.restores) for was, now in steps] == [
        ("bot@v3", "bot@v2", 2), ("bot@v2", "bot@v1", 1),
    ]  # fmt: skip
    assert (steps[1][1].merged, steps[1][1].note) == (merged.digest, "alarm")
    unchanged(ckpt, lambda: ckpt.rollback("production"), Conflict)

    def told(shipments: list[Shipment]) -> list[tuple[int, str, datetime]]:
        return [(each.number, each.checkpoint, each.shipped_at) for each in shipments]

    assert told(ckpt.shipments())[:3] == told(before)
    ckpt.ship(make(), "production")
    assert ckpt.rollback("production")[1].checkpoint == "bot@v1"


def test_rolling_back_one_of_several_adapters_needs_its_name(ckpt: Registry, make: Maker) -> None:
    for adapter in ("bot", "other", "bot", "other"):
        ckpt.ship(make(adapter), "production")
    with pytest.raises(Ambiguous) as caught:
        ckpt.rollback("production")
    assert caught.value.matches == ("bot", "other")
    assert ckpt.rollback("production", "other")[1].checkpoint == "other@v1"
    assert live(ckpt) == [("production", "bot@v2"), ("production", "other@v1")]
    unchanged(ckpt, lambda: ckpt.rollback("production", "nobody"), Conflict)


def test_nothing_is_known_of_an_environment_that_nothing_went_to(ckpt: Registry, make: Maker) -> None:
    ckpt.ship(make(), "production")
    for look in (ckpt.shipped, ckpt.shipments, ckpt.rollback):
        with pytest.raises(UnknownEnvironment) as caught:
            look("prodution")
        assert caught.value.near == ("production",)


def test_a_registry_that_nobody_asked_anything_leaves_no_trace(tmp_path: Path) -> None:
    with tiny.open_registry(tmp_path / "home"):
        pass
    assert not (tmp_path / "home").exists()
