"""What the catalog records and finds again."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from factories import NOON, checkpoint, digest
from sqlalchemy import Engine, event, select

from registry.db.catalog import Catalog
from registry.db.schema import reading, writing
from registry.db.tables import MergedRow
from registry.errors import (
    Ambiguous,
    Conflict,
    InUse,
    NameTaken,
    NotFound,
    UnknownAdapter,
    UnknownBase,
    UnknownCheckpoint,
    UnknownEnvironment,
    UnknownMerged,
)
from registry.manifest import (
    BaseModel,
    Checkpoint,
    FileEntry,
    Merged,
    Metric,
    Note,
    Origin,
    Recipe,
    RecipeInput,
    Shipment,
    digest_of,
)
from registry.refs import AdapterName, CheckpointRef, Digest
from registry.results import EnvironmentLine
from registry.tensors import DType

BOT = AdapterName("", "support-bot")
HOUR = timedelta(hours=1)
BaseMaker = Callable[..., BaseModel]


def add(catalog: Catalog, count: int = 1, **changes: object) -> list[Checkpoint]:
    """Add checkpoints of different content."""
    known = catalog.checkpoints.count()
    return [
        catalog.checkpoints.add(checkpoint(digest=digest(f"content {i}"), **changes))
        for i in range(known, known + count)
    ]


def resolve(catalog: Catalog, text: str) -> str:
    return catalog.checkpoints.resolve(CheckpointRef.parse(text)).ref


def merged(*inputs: Checkpoint, content: str = "merged", **changes: object) -> Merged:
    recipe = Recipe(
        base=inputs[0].base,
        inputs=tuple(RecipeInput(checkpoint=each.digest, weight=0.5) for each in inputs),
        dtype=DType.BF16,
    )
    made = Merged(
        digest=digest(content),
        recipe=recipe,
        base_name="meta/base",
        checkpoints=tuple(each.ref for each in inputs),
        files=(entry("model.safetensors"),),
        locations=("/out",),
        note="for the demo",
        created_at=NOON,
        author="ada",
    )
    return replace(made, **changes)


def entry(text: str, sha256: str = "") -> FileEntry:
    return FileEntry(path=text, size_bytes=10, digest=digest(text), sha256=sha256)


class TestCheckpoints:
    def test_everything_comes_back(self, catalog: Catalog) -> None:
        given = checkpoint(
            version=99,
            adapter="team/bot",
            step=None,
            metrics=[
                Metric(name="loss", value=math.inf, step=5, split="eval", direction="lower"),
                Metric(name="loss", value=0.1),
                Metric(name="loss", value=-math.inf),
            ],
            notes=(Note(text="grüße", author="bob", created_at=NOON + HOUR),),
            tags={"b": "2", "a": ""},
            alpha=None,
            arch_version="v2",
        )
        added = catalog.checkpoints.add(given)
        assert added == replace(given, version=1, tags={"a": "", "b": "2"})
        assert catalog.checkpoints.all() == [added]
        assert catalog.checkpoints.find(given.adapter, given.digest) == added
        assert catalog.checkpoints.find(BOT, given.digest) is None
        assert catalog.checkpoints.count() == 1

    def test_nan_survives(self, engine: Engine) -> None:
        with writing(engine) as session:
            Catalog(session).checkpoints.add(checkpoint(metrics={"loss": math.nan}))
        with reading(engine) as session:
            (metric,) = Catalog(session).checkpoints.all()[0].metrics
        assert math.isnan(metric.value)

    def test_its_base_must_be_known(self, catalog: Catalog) -> None:
        with pytest.raises(UnknownBase):
            add(catalog, base=digest("another"))

    def test_adapters_may_share_content(self, catalog: Catalog) -> None:
        add(catalog)
        other = catalog.checkpoints.add(checkpoint(adapter="other", digest=digest("content 0")))
        assert other.ref == "other@v1"

    def test_order_is_by_name_and_version(self, catalog: Catalog) -> None:
        for name in ("b", "team/a", "B", "a", "b", "a-b"):
            add(catalog, adapter=name)
        assert [each.ref for each in catalog.checkpoints.all()] == [
            "B@v1", "a@v1", "a-b@v1", "b@v1", "b@v2", "team/a@v1",
        ]  # fmt: skip
        assert list(map(str, catalog.checkpoints.adapters())) == ["B", "a", "a-b", "b", "team/a"]
        assert [each.ref for each in catalog.checkpoints.all(AdapterName("", "b"))] == ["b@v1", "b@v2"]

    def test_versions_are_never_given_twice(self, catalog: Catalog) -> None:
        first, second = add(catalog, 2)
        catalog.checkpoints.remove(second)
        catalog.checkpoints.remove(first)
        assert catalog.checkpoints.adapters() == []
        with pytest.raises(UnknownAdapter):
            catalog.checkpoints.all(BOT)
        with pytest.raises(UnknownCheckpoint):
            catalog.checkpoints.remove(first)
        assert add(catalog)[0].version == 3

    def test_the_number_of_queries_is_fixed(self, engine: Engine) -> None:
        asked: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
        counts = []
        for _ in range(2):
            with writing(engine) as session:
                for _ in range(10):
                    (made,) = add(Catalog(session), metrics={"a": 1, "b": 2}, tags={"k": "v"})
                    Catalog(session).checkpoints.set_alias(made, f"alias-{made.version}")
                asked.clear()
                Catalog(session).checkpoints.all()
                counts.append(len(asked))
        assert counts == [8, 8]

    def test_processes_that_add_at_once_lose_nothing(self, url: str, engine: Engine) -> None:
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from factories import checkpoint, digest\n"
            "from registry.db.catalog import Catalog; from registry.db.schema import open_engine, writing\n"
            "engine = open_engine(sys.argv[2])\n"
            "for i in range(25):\n"
            "    with writing(engine) as session:\n"
            "        catalog = Catalog(session)\n"
            "        new = catalog.checkpoints.add(checkpoint(digest=digest(f'{sys.argv[3]} {i}')))\n"
            "        catalog.events.append('ada', new.created_at, 'register', new.ref, {})\n"
            "engine.dispose()\n"
        )
        command = [
            sys.executable,
            "-W",
            "error",
            "-c",
            program,
            str(Path(__file__).parents[1]),
            url,
        ]
        processes = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
        assert [process.communicate()[1] for process in processes] == ["", ""]
        with reading(engine) as session:
            found = Catalog(session)
            assert [each.version for each in found.checkpoints.all()] == list(range(1, 51))
            assert found.events.verify().count == 50


class TestOrigins:
    def test_what_a_checkpoint_was_made_of_comes_back_in_order(self, catalog: Catalog) -> None:
        one, two = add(catalog, 2)
        origin = Origin(action="combine", parents=(two.ref, one.ref), detail={"method": "cat", "weights": [0.5, 0.5]})
        (made,) = add(catalog, adapter="mix", origin=origin)
        assert made.origin == origin
        assert catalog.checkpoints.all()[-1].origin is None
        assert (catalog.checkpoints.children(one), catalog.checkpoints.children(made)) == ([made.ref], [])

    def test_a_parent_stays_as_long_as_its_children(self, catalog: Catalog) -> None:
        (one,) = add(catalog)
        (made,) = add(catalog, adapter="mix", origin=Origin(action="combine", parents=(one.ref,)))
        with pytest.raises(InUse, match=f"{made.ref}, which was made of it"):
            catalog.checkpoints.remove(one)
        catalog.checkpoints.remove(made)
        catalog.checkpoints.remove(one)
        assert catalog.checkpoints.count() == 0

    def test_parents_must_be_there(self, catalog: Catalog) -> None:
        (one,) = add(catalog)
        catalog.checkpoints.remove(one)
        with pytest.raises(UnknownAdapter):
            add(catalog, adapter="mix", origin=Origin(action="combine", parents=(one.ref,)))


class TestResolving:
    def test_newest_version_and_step(self, catalog: Catalog) -> None:
        for step in (10, 20, 10, 30):
            add(catalog, step=step)
        assert resolve(catalog, "support-bot") == "support-bot@v4"
        assert resolve(catalog, "support-bot@v2") == "support-bot@v2"
        assert resolve(catalog, "support-bot@step:10") == "support-bot@v3"

    def test_a_run_is_meant_by_name_or_else_by_number(self, catalog: Catalog) -> None:
        for run in ("first", "2", "third", "first"):
            add(catalog, run=run)
        assert resolve(catalog, "support-bot@run:first") == "support-bot@v4"
        assert resolve(catalog, "support-bot@run:1") == "support-bot@v4"
        assert resolve(catalog, "support-bot@run:2") == "support-bot@v2"
        assert resolve(catalog, "support-bot@run:3") == "support-bot@v3"
        for missing in ("run:4", "run:thrid"):
            with pytest.raises(UnknownCheckpoint) as caught:
                resolve(catalog, f"support-bot@{missing}")
        assert "support-bot@run:third" in caught.value.near

    def test_the_trail_of_a_checkpoint_is_its_run_so_far(self, catalog: Catalog) -> None:
        for step in (20, 10, None, 30):
            add(catalog, step=step)
        add(catalog, step=15, run="other")
        trail = {each.version: catalog.checkpoints.trail(each) for each in catalog.checkpoints.all()}
        assert [each.version for each in trail[4]] == [2, 1, 4]
        assert [each.version for each in trail[3]] == [2, 1, 4, 3]
        assert [each.version for each in trail[2]] == [2]
        assert [each.version for each in trail[5]] == [5]

    def test_a_label_is_an_alias_and_else_an_environment(self, catalog: Catalog) -> None:
        first, second, third = add(catalog, 3)
        (other,) = add(catalog, adapter="other")
        for each in (first, second, other):
            catalog.shipments.add("production", each, note="", author="ada", at=NOON)
        assert resolve(catalog, "support-bot@production") == second.ref
        assert catalog.checkpoints.resolve(CheckpointRef.parse(second.ref)).environments == ("production",)
        assert catalog.checkpoints.resolve(CheckpointRef.parse(first.ref)).environments == ()
        catalog.checkpoints.set_alias(third, "production")
        assert resolve(catalog, "support-bot@production") == third.ref

    def test_a_digest_prefix(self, catalog: Catalog) -> None:
        texts = {"a": "abcdef1" + "0" * 57, "b": "abcdef2" + "0" * 57, "c": "abcdee" + "f" * 58}
        for name, text in texts.items():
            catalog.checkpoints.add(checkpoint(adapter=name, digest=Digest(text)))
        assert resolve(catalog, "abcdef2") == "b@v1"
        assert resolve(catalog, texts["c"]) == "c@v1"
        with pytest.raises(Ambiguous) as caught:
            resolve(catalog, "abcdef")
        assert caught.value.matches == ("a@v1 abcdef100000", "b@v1 abcdef200000")
        with pytest.raises(UnknownCheckpoint):
            resolve(catalog, "abcdefa")

    def test_the_same_content_in_two_adapters_is_ambiguous(self, catalog: Catalog) -> None:
        for name in ("a", "b"):
            catalog.checkpoints.add(checkpoint(adapter=name, digest=digest("same")))
        with pytest.raises(Ambiguous):
            resolve(catalog, digest("same").hex)

    def test_unknown_names_come_with_similar_ones(self, catalog: Catalog) -> None:
        (only,) = add(catalog)
        catalog.checkpoints.set_alias(only, "candidate")
        with pytest.raises(UnknownAdapter) as adapter:
            resolve(catalog, "suport-bot@v1")
        assert adapter.value.near == ("support-bot",)
        for wrong, meant in (("canddiate", "candidate"), ("v7", "v1"), ("step:101", "step:100")):
            with pytest.raises(UnknownCheckpoint) as caught:
                resolve(catalog, f"support-bot@{wrong}")
            assert caught.value.near[0] == f"support-bot@{meant}"

    def test_choosing_the_best_is_the_callers(self, catalog: Catalog) -> None:
        add(catalog)
        with pytest.raises(ValueError, match="best"):
            resolve(catalog, "support-bot@best:loss")


class TestAnnotations:
    def test_metrics_and_notes_are_appended(self, catalog: Catalog) -> None:
        (made,) = add(catalog, metrics={"loss": 2.0})
        catalog.checkpoints.add_metric(made, Metric(name="loss", value=1.0, split="eval"), "bob", NOON)
        for text in ("one", "two"):
            catalog.checkpoints.add_note(made, Note(text=text, author="bob", created_at=NOON))
        (found,) = catalog.checkpoints.all()
        assert [metric.value for metric in found.metrics] == [2.0, 1.0]
        assert [note.text for note in found.notes] == ["one", "two"]

    def test_tags_are_replaced_and_removed(self, catalog: Catalog) -> None:
        (made,) = add(catalog)
        for key, value in (("stage", "draft"), ("team", "nlp"), ("stage", "final")):
            catalog.checkpoints.set_tag(made, key, value)
        assert catalog.checkpoints.all()[0].tags == {"stage": "final", "team": "nlp"}
        catalog.checkpoints.remove_tag(made, "stage")
        assert catalog.checkpoints.all()[0].tags == {"team": "nlp"}
        with pytest.raises(NotFound) as caught:
            catalog.checkpoints.remove_tag(made, "taem")
        assert caught.value.near == ("team",)

    def test_an_alias_moves(self, catalog: Catalog) -> None:
        first, second = add(catalog, 2)
        assert catalog.checkpoints.set_alias(first, "candidate") is None
        before = catalog.checkpoints.set_alias(second, "candidate")
        assert before is not None
        assert before.ref == first.ref
        assert [each.aliases for each in catalog.checkpoints.all()] == [(), ("candidate",)]
        assert catalog.checkpoints.remove_alias(BOT, "candidate").ref == second.ref
        with pytest.raises(UnknownCheckpoint):
            catalog.checkpoints.remove_alias(BOT, "candidate")

    def test_adapters_have_aliases_of_their_own(self, catalog: Catalog) -> None:
        for name in ("a", "b"):
            catalog.checkpoints.set_alias(*add(catalog, adapter=name), "candidate")
        assert [each.aliases for each in catalog.checkpoints.all()] == [("candidate",), ("candidate",)]

    def test_what_is_gone_cannot_be_annotated(self, catalog: Catalog) -> None:
        (gone,) = add(catalog, metrics={"loss": 1.0}, tags={"a": "b"})
        catalog.checkpoints.remove(gone)
        with pytest.raises(UnknownCheckpoint):
            catalog.checkpoints.set_tag(gone, "a", "b")
        with pytest.raises(UnknownCheckpoint):
            catalog.checkpoints.set_alias(gone, "candidate")

    def test_what_is_in_use_stays(self, catalog: Catalog) -> None:
        used, other = add(catalog, 2)
        for name in ("b", "a"):
            catalog.checkpoints.set_alias(used, name)
        catalog.shipments.add("production", used, note="", author="ada", at=NOON)
        catalog.shipments.add("production", other, note="", author="ada", at=NOON)
        made = catalog.merged.add(merged(used, other))
        with pytest.raises(InUse) as caught:
            catalog.checkpoints.remove(used)
        assert caught.value.reason == (f"alias a, alias b, shipment 1 to production, merged model {made.digest.short}")
        assert catalog.checkpoints.count() == 2


class TestBases:
    def test_everything_comes_back(self, catalog: Catalog, base: BaseMaker) -> None:
        assert catalog.bases.all() == [base()]
        other = base("another", "other", arch_version="v2")
        assert catalog.bases.add(other) == other
        assert catalog.bases.all() == [other, base()]
        assert catalog.bases.by_weights(digest("other")) == other
        assert catalog.bases.by_weights(digest("none")) is None

    @pytest.mark.parametrize("text", ["meta/base", str(digest("base")), digest("base").hex, digest("base").hex[:6]])
    def test_found_by_name_or_digest(self, catalog: Catalog, base: BaseMaker, text: str) -> None:
        assert catalog.bases.find(text) == base()

    def test_not_found(self, catalog: Catalog) -> None:
        with pytest.raises(UnknownBase) as caught:
            catalog.bases.find("meta/bse")
        assert caught.value.near == ("meta/base",)
        with pytest.raises(UnknownBase):
            catalog.bases.find(digest("base").hex[:5])

    def test_an_ambiguous_prefix(self, catalog: Catalog, base: BaseMaker) -> None:
        for i in (2, 1):
            fingerprint = replace(base().fingerprint, weights=Digest(f"abcdef{i}".ljust(64, "0")))
            catalog.bases.add(base(f"base-{i}", fingerprint=fingerprint))
        with pytest.raises(Ambiguous) as caught:
            catalog.bases.find("abcdef")
        assert caught.value.matches == ("base-1 abcdef100000", "base-2 abcdef200000")

    def test_a_name_belongs_to_one(self, catalog: Catalog, base: BaseMaker) -> None:
        with pytest.raises(NameTaken):
            catalog.bases.add(base("meta/base", "other weights"))

    def test_it_can_move(self, catalog: Catalog, base: BaseMaker) -> None:
        moved = base(url="", in_store=True, arch_version="v2", config={"model_type": "llama", "n": 1})
        assert catalog.bases.update(moved, [entry("shard")]) == moved
        assert catalog.bases.find("meta/base") == moved
        assert list(catalog.needs.unneeded()) == []
        catalog.bases.update(base())
        assert list(catalog.needs.unneeded()) == [digest("shard")]
        with pytest.raises(UnknownBase):
            catalog.bases.update(base(weights="other"))


class TestMerged:
    def test_everything_comes_back(self, catalog: Catalog) -> None:
        first, second = add(catalog, 2)
        made = merged(second, first, locations=("", "/out"))
        assert catalog.merged.find(made.recipe.digest) is None
        assert catalog.merged.add(made) == made
        assert catalog.merged.find(made.recipe.digest) == made
        assert catalog.merged.all() == catalog.merged.of(first) == [made]
        assert catalog.merged.resolve(made.digest.hex[:6]) == made
        (third,) = add(catalog)
        assert catalog.merged.of(third) == []

    def test_what_goes_in_must_be_known(self, catalog: Catalog) -> None:
        (known,) = add(catalog)
        with pytest.raises(UnknownCheckpoint):
            catalog.merged.add(merged(replace(known, version=2)))
        with pytest.raises(UnknownCheckpoint):
            catalog.merged.add(merged(replace(known, digest=digest("other content")), content="other"))
        with pytest.raises(UnknownBase):
            catalog.merged.add(merged(replace(known, base=digest("other base"))))

    def test_options_of_a_recipe_come_back(self, catalog: Catalog) -> None:
        one, two = add(catalog, 2)
        recipe = replace(
            merged(one, two).recipe, method="dare_ties", options={"density": 0.5, "seed": 7, "normalize": True}
        )
        made = catalog.merged.add(replace(merged(one, two), recipe=recipe))
        assert made.recipe == recipe

    def test_a_recipe_from_before_there_were_options_is_found_by_its_digest(self, catalog: Catalog) -> None:
        (one,) = add(catalog)
        old = replace(merged(one), recipe=replace(merged(one).recipe, formula=1))
        catalog.merged.add(old)
        (row,) = catalog.merged._session.scalars(select(MergedRow))
        row.recipe = {key: value for key, value in row.recipe.items() if key != "options"}
        catalog.merged._session.flush()
        assert catalog.merged.find(old.recipe.digest) == old
        assert old.recipe.digest == digest_of(row.recipe)

    def test_a_recipe_has_one_result(self, engine: Engine) -> None:
        with writing(engine) as session:
            made = Catalog(session).merged.add(merged(*add(Catalog(session))))
        with pytest.raises(NameTaken), writing(engine) as session:
            Catalog(session).merged.add(replace(made, digest=digest("other bytes")))

    def test_resolving(self, catalog: Catalog) -> None:
        first, second, third = add(catalog, 3)
        same = Digest("abcdef1".ljust(64, "0"))
        older = catalog.merged.add(merged(first, digest=same))
        catalog.merged.add(merged(second, digest=same))
        assert catalog.merged.resolve("abcdef") == older
        catalog.merged.add(merged(third, digest=Digest("abcdef2".ljust(64, "0"))))
        with pytest.raises(Ambiguous):
            catalog.merged.resolve("abcdef")
        for wrong in ("abcde0", "abc", "support-bot"):
            with pytest.raises(UnknownMerged):
                catalog.merged.resolve(wrong)

    def test_the_store_keeps_what_lies_in_it_and_what_it_is_told_to(self, catalog: Catalog) -> None:
        made, kept = merged(*add(catalog)), FileEntry(path="merge.json", size_bytes=1, digest=digest("merge.json"))
        made = catalog.merged.add(made, [kept])
        assert {digest("merge.json")} <= catalog.needs.sizes().keys()
        assert digest("model.safetensors") not in catalog.needs.sizes()
        for url in ("", "/copy", "/copy"):
            made = catalog.merged.add_location(made, url)
        assert made.locations == ("/out", "", "/copy")
        assert {digest("model.safetensors")} <= catalog.needs.sizes().keys()
        with pytest.raises(UnknownMerged):
            catalog.merged.add_location(replace(made, recipe=replace(made.recipe, formula=1)), "")


class TestShipments:
    @staticmethod
    def ship(catalog: Catalog, each: Checkpoint, hour: int, restores: int | None = None) -> Shipment:
        at = NOON + hour * HOUR
        return catalog.shipments.add("production", each, note="n", author="ada", at=at, restores=restores)

    def test_history_and_what_is_live(self, catalog: Catalog) -> None:
        first, second = add(catalog, 2)
        (other,) = add(catalog, adapter="other")
        one, two, three = (self.ship(catalog, each, hour) for hour, each in enumerate((first, other, second)))
        made = catalog.merged.add(merged(second))
        four = catalog.shipments.add("staging", second, made, note="", author="bob", at=NOON)
        assert (one.checkpoint, one.base_name, one.merged, one.until) == (first.ref, "meta/base", None, None)
        assert (four.merged, four.checkpoint_digest) == (made.digest, second.digest)
        ended = replace(one, until=NOON + 2 * HOUR)
        assert catalog.shipments.all() == [ended, two, three, four]
        assert catalog.shipments.all("production") == [ended, two, three]
        assert catalog.shipments.environments() == ["production", "staging"]
        assert catalog.shipments.live() == [two, three, four]
        assert catalog.shipments.live("production", NOON + 1.5 * HOUR) == [two, ended]
        assert catalog.shipments.live("production", NOON - HOUR) == []

    def test_what_went_live_last_in_each_environment(self, catalog: Catalog) -> None:
        first, second = add(catalog, 2)
        (other,), (third,) = add(catalog, adapter="team/other"), add(catalog, adapter="team/third")
        _, two, three, four = (
            self.ship(catalog, each, hour) for hour, each in enumerate((first, other, second, third))
        )
        five = catalog.shipments.add("canary", first, note="", author="bob", at=NOON)
        of_canary = EnvironmentLine(name="canary", newest=(five,), others=0)
        production = EnvironmentLine(name="production", newest=(four, three), others=1)
        assert catalog.shipments.newest(2) == [of_canary, production]
        assert catalog.shipments.newest(9)[1].newest == (four, three, two)
        assert catalog.shipments.newest(1, ["team"]) == [replace(production, newest=(four,))]
        assert catalog.shipments.newest(1, ["none"]) == []

    def test_rollbacks_walk_back_and_not_to_and_fro(self, catalog: Catalog) -> None:
        for number, each in enumerate(add(catalog, 3), 1):
            self.ship(catalog, each, number)
        for number, (live, back_to) in enumerate([(3, 2), (4, 1)], 4):
            current, target = catalog.shipments.rollback_target("production", BOT)
            assert (current.number, target.number) == (live, back_to)
            back = catalog.checkpoints.resolve(CheckpointRef.parse(target.checkpoint))
            assert self.ship(catalog, back, number, restores=target.number).number == number
        with pytest.raises(Conflict):
            catalog.shipments.rollback_target("production", BOT)

    def test_a_rollback_skips_what_was_rolled_back_before(self, catalog: Catalog) -> None:
        good, bad, new = add(catalog, 3)
        self.ship(catalog, good, 1)
        self.ship(catalog, bad, 2)
        self.ship(catalog, good, 3, restores=1)
        self.ship(catalog, new, 4)
        current, target = catalog.shipments.rollback_target("production", BOT)
        assert (current.number, target.number) == (4, 1)

    def test_nothing_to_roll_back_to(self, catalog: Catalog) -> None:
        (only,) = add(catalog)
        with pytest.raises(UnknownEnvironment):
            catalog.shipments.rollback_target("production", BOT)
        self.ship(catalog, only, 1)
        for adapter in (BOT, AdapterName("", "other")):
            with pytest.raises(Conflict):
                catalog.shipments.rollback_target("production", adapter)
        with pytest.raises(UnknownEnvironment) as caught:
            catalog.shipments.rollback_target("prodution", BOT)
        assert caught.value.near == ("production",)

    def test_only_a_shipment_of_the_same_line_can_be_restored(self, catalog: Catalog) -> None:
        (mine,), (other,) = add(catalog), add(catalog, adapter="other")
        self.ship(catalog, other, 1)
        with pytest.raises(Conflict):
            self.ship(catalog, mine, 2, restores=1)


class TestBlobs:
    def test_what_nothing_needs_can_be_forgotten(self, catalog: Catalog) -> None:
        (made,) = add(catalog, files=(entry("kept"), entry("also")))
        catalog.blobs.add([entry("loose"), entry("loose"), entry("kept", sha256="0" * 64)])
        assert list(catalog.needs.unneeded()) == [digest("loose")]
        with pytest.raises(InUse):
            catalog.blobs.forget([digest("loose"), digest("kept")])
        catalog.blobs.forget([digest("loose"), digest("never seen")])
        assert list(catalog.needs.unneeded()) == []
        catalog.checkpoints.remove(made)
        assert set(catalog.needs.unneeded()) == {digest("kept"), digest("also")}
