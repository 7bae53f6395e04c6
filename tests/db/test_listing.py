"""Filters, pages and rankings in SQL give what the same filters and rankings give in Python, on both databases."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import servers
from factories import NOON, checkpoint, digest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, text

from registry.db.catalog import Catalog
from registry.db.listing import Scope
from registry.db.schema import open_engine, prepare, reading, writing
from registry.errors import DirectionUnknown, InvalidInput, MixedData, RegistryError, UnknownAdapter, UnknownMetric
from registry.filters import And, Comparison, Exists, Field, Filter, Node, Not, Or, parse_filter
from registry.manifest import BaseModel, Checkpoint, Format, Metric
from registry.refs import AdapterName
from registry.selection import Grouping, best, sort_checkpoints

LARGE = 2**53
WORDS = [
    "",
    "a",
    "A",
    "ä",
    "Ä",
    "ab",
    "b",
    "B_",
    "%",
    "a\\b",
    "s",
    "ſ",
    "K",
    "k",
    "𝕏",
    "z'\"",
    "10",
    "9",
    "nan",
    "x" * 100,
]
NUMBERS = [
    "0",
    "-0.0",
    "1",
    "1.",
    ".5",
    "-2",
    "1e999",
    "-1e999",
    "1e-999",
    "0x1",
    " 1",
    "1 ",
    "٣",
    "1_0",
    "",
    "5" * 400,
]
STEPS = [None, 0, 1, 2, 10, LARGE, LARGE + 1, 2**62 + 1]
VALUES = [0.5, 0.25, -1.0, 0.0, -0.0, 2.5, 1e300, math.nan, math.inf, -math.inf]
METRICS = ["eval_loss", "loss", "acc", "magic", "val/loss"]
ADAPTERS = ["bot", "Bot", "bot-2", "team/bot", "team/a", "other/bot"]


def population(count: int = 70) -> list[Checkpoint]:
    """Checkpoints that have, or do not have, every kind of odd value."""
    choice = random.Random(7).choice
    return [
        checkpoint(
            adapter=choice(ADAPTERS),
            digest=digest(f"content {i}"),
            base=digest(choice(["base", "base", "other"])),
            step=choice(STEPS),
            run=choice(WORDS),
            author=choice(WORDS[1:]),
            arch_version=choice(["", "v2", "ä"]),
            created_at=NOON + timedelta(seconds=choice(range(5)), microseconds=choice([0, 1, 999_999])),
            method=choice(["lora", "dora", "ia3"]),
            format=choice(list(Format)),
            dtype=choice(["", "float32"]),
            rank=choice([None, 4, 8, 16]),
            alpha=choice([None, 8.0, 0.1, math.inf]),
            parameters=choice([0, 10, LARGE + 1]),
            size_bytes=choice([0, 1, 1000]),
            metrics=[
                Metric(
                    name=choice(METRICS),
                    value=choice(VALUES),
                    split=choice(["", "eval", "test"]),
                    data=choice(["", "", "", "a1"]),
                    direction=choice([None, None, None, "lower", "higher"]),
                )
                for _ in range(choice(range(6)))
            ]
            + ([Metric(name="f1", value=choice(VALUES))] if choice([True, True, False]) else []),
            tags={key: choice([*WORDS, *NUMBERS]) for key in ("team", "n", "a b") if choice([True, False])},
        )
        for i in range(count)
    ]


class Everything(list[Checkpoint]):
    """All checkpoints, shown in a few words when an example fails."""

    def __repr__(self) -> str:
        return "…"


def fill(engine: Engine, base: Callable[..., BaseModel]) -> None:
    with writing(engine) as session:
        catalog = Catalog(session)
        catalog.bases.add(base())
        catalog.bases.add(base("Älter", "other"))
        added = catalog.checkpoints.add_many(population())
        for i, each in enumerate(added):
            if i % 5 == 0:
                catalog.checkpoints.set_alias(each, f"alias-{i % 3}")
            if i % 7 == 0:
                catalog.checkpoints.set_alias(each, "Best")
            if i % 4 == 0:
                catalog.checkpoints.add_metric(each, Metric(name="acc", value=VALUES[i % 10]), "ada", NOON)
            if i % 9 == 0:
                catalog.checkpoints.set_tag(each, "team", NUMBERS[i % len(NUMBERS)])
        for each in added[3::17]:
            gone = catalog.checkpoints.find(each.adapter, each.digest)
            assert gone is not None
            if not gone.aliases:
                catalog.checkpoints.remove(gone)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A database with the population."""
    folder: Path = tmp_path_factory.mktemp("listing")
    if request.param == "sqlite":
        engine = prepare(f"sqlite:///{folder / 'ckpt.db'}", folder)
    else:
        server = request.getfixturevalue("postgres")
        engine = open_engine(servers.create_database(server, request.getfixturevalue("postgres_template")))
    fill(engine, request.getfixturevalue("make_base"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def everything(filled: Engine) -> list[Checkpoint]:
    with reading(filled) as session:
        return Everything(Catalog(session).checkpoints.all())


texts = st.sampled_from(
    [*WORDS, *NUMBERS, "bot", "team/bot", "/bot", "lora", "alias-1", "Best", "meta/base", "a%", "%B%", "_"]
)
numbers = st.sampled_from(
    [0.0, 1.0, 2.5, -1.0, float(LARGE), LARGE + 2.0, 1e300, -1e300, 0.5, 0.1, 8.0, 2.0**63, -(2.0**63)]
)
times = st.sampled_from(
    [
        NOON,
        NOON + timedelta(seconds=2, microseconds=1),
        NOON.astimezone(UTC).replace(tzinfo=UTC) - timedelta(days=1),
        datetime.fromisoformat("2025-03-01T14:00:02+02:00"),
        datetime.fromisoformat("0001-01-01T00:00:00+14:00"),
        datetime.fromisoformat("9999-12-31T23:59:59-12:00"),
    ]
)
KEYED = [
    *(Field("metric", name) for name in [*METRICS, "f1", "none"]),
    *(Field("tag", key) for key in ("team", "n", "a b", "none")),
]
NAMES = [
    "step",
    "version",
    "rank",
    "alpha",
    "parameters",
    "size",
    "adapter",
    "run",
    "base",
    "method",
    "format",
    "dtype",
    "author",
]
fields = st.sampled_from([*KEYED, *map(Field, [*NAMES, "arch_version", "alias", "created"])])


@st.composite
def comparisons(draw: st.DrawFn) -> Node:
    field = draw(fields)
    values = {"number": numbers, "text": texts, "time": times, "tag": st.one_of(numbers, texts)}[field.kind]
    signs = ["=", "!=", "<", "<=", ">", ">=", "in", "null"] + (["like"] if field.kind in ("text", "tag") else [])
    sign = draw(st.sampled_from(signs))
    if sign == "null":
        return Exists(field)
    wanted: Any = texts if sign == "like" else values
    return Comparison(field, sign, tuple(draw(st.lists(wanted, min_size=1, max_size=3 if sign == "in" else 1))))


def both(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(several.map(And), several.map(Or), parts.map(Not))


filters = st.recursive(comparisons(), both, max_leaves=5).map(Filter)


def refs(found: Any) -> list[str]:
    return [each.ref for each in found]


@settings(max_examples=100)
@given(where=filters)
def test_a_filter_passes_the_same_in_sql(filled: Engine, everything: list[Checkpoint], where: Filter) -> None:
    with reading(filled) as session:
        found = Catalog(session).checkpoints.passing(Scope(where=where))
    assert refs(found) == refs(each for each in everything if where.matches(each))


def test_every_field_is_known_to_sql(filled: Engine, everything: list[Checkpoint]) -> None:
    names = ["metric.acc", "tag.n", *NAMES, "arch_version", "alias", "created"]
    with reading(filled) as session:
        for name in names:
            where = parse_filter(f"{name} is not null")
            found = Catalog(session).checkpoints.passing(Scope(where=where))
            assert refs(found) == refs(each for each in everything if where.matches(each)), name


SORTS = [
    "",
    "step",
    "created",
    "version",
    "adapter",
    "run",
    "rank",
    "size",
    "parameters",
    "metric.acc",
    "metric.f1",
    "metric.none",
]
sorts = st.builds(lambda key, minus: f"-{key}" if minus and key else key, st.sampled_from(SORTS), st.booleans())


def expected_order(found: list[Checkpoint], ids: dict[str, int], sort: str) -> list[str]:
    """Equal ones by the order of registration, which `-` turns round."""
    is_down = sort.startswith("-") or not sort
    by_id = sorted(found, key=lambda each: ids[each.ref], reverse=is_down)
    return refs(sort_checkpoints(by_id, sort) if sort else by_id)


@settings(max_examples=50)
@given(
    sort=sorts, limit=st.integers(1, 40), adapter=st.sampled_from([None, "bot", "team/bot"]), where=st.none() | filters
)
def test_pages_make_up_the_sorted_list(
    filled: Engine, everything: list[Checkpoint], sort: str, limit: int, adapter: str | None, where: Filter | None
) -> None:
    scope = Scope(AdapterName.parse(adapter) if adapter else None, where)
    found, cursor = [], ""
    with reading(filled) as session:
        rows = session.execute(text("SELECT checkpoints.id, digest, adapter_id FROM checkpoints"))
        by_digest = {hex_: row_id for row_id, hex_, _ in rows}
        while True:
            page = Catalog(session).checkpoints.page(scope, sort=sort, cursor=cursor, limit=limit)
            assert len(page.items) <= limit
            found += page.items
            cursor = page.cursor
            if not cursor:
                break
            assert len(page.items) == limit
    ids = {each.ref: by_digest[each.digest.hex] for each in everything}
    wanted = [
        each
        for each in everything
        if (adapter is None or str(each.adapter) == adapter) and (where is None or where.matches(each))
    ]
    assert refs(found) == expected_order(wanted, ids, sort)


def outcome(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (UnknownMetric, DirectionUnknown, MixedData) as error:
        return type(error), error.fields if isinstance(error, UnknownMetric) else ()


@settings(max_examples=70)
@given(
    metric=st.sampled_from([None, None, *METRICS, "f1", "none"]),
    direction=st.sampled_from([None, "lower", "higher"]),
    per=st.sampled_from([None, "adapter", "run", "base"]),
    top=st.integers(1, 4),
    adapter=st.sampled_from([None, "bot", "team/a"]),
    where=st.one_of(st.none(), st.just(parse_filter("metric.f1 is not null")), filters),
)
def test_ranking_in_sql_is_ranking_in_python(
    filled: Engine,
    everything: list[Checkpoint],
    metric: str | None,
    direction: Any,
    per: Grouping | None,
    top: int,
    adapter: str | None,
    where: Filter | None,
) -> None:
    scope = Scope(AdapterName.parse(adapter) if adapter else None, where)
    wanted = [
        each
        for each in everything
        if (adapter is None or str(each.adapter) == adapter) and (where is None or where.matches(each))
    ]
    asked: Any = {"metric": metric, "direction": direction, "per": per, "top": top}
    with reading(filled) as session:
        found = outcome(lambda: Catalog(session).checkpoints.rank(scope, **asked))
    expected = outcome(lambda: best(wanted, **asked))
    if isinstance(expected, tuple):
        assert found == expected
    else:
        shown = [(group.key, refs(group.checkpoints)) for group in found.groups]
        assert shown == [(group.key, refs(group.checkpoints)) for group in expected.groups]
        assert (found.metric, found.direction) == (expected.metric, expected.direction)
        assert (found.candidates, found.without) == (expected.candidates, expected.without)


def test_namespaces_limit_what_is_seen(filled: Engine, everything: list[Checkpoint]) -> None:
    with reading(filled) as session:
        checkpoints = Catalog(session).checkpoints
        seen = checkpoints.page(Scope(namespaces=("team",)), limit=1000).items
        assert sorted(refs(seen)) == sorted(refs(each for each in everything if each.adapter.namespace == "team"))
        ranking = checkpoints.rank(Scope(namespaces=("team", "other")), metric="f1")
        assert ranking.groups[0].checkpoints[0].adapter.namespace in ("team", "other")
        assert ranking.candidates == sum(each.adapter.namespace in ("team", "other") for each in everything)
        with pytest.raises(UnknownAdapter) as caught:
            checkpoints.page(Scope(AdapterName.parse("team/bot"), namespaces=("other",)))
        assert "team/bot" not in caught.value.near
        with pytest.raises(UnknownAdapter):
            checkpoints.rank(Scope(AdapterName.parse("nobody")))


def test_a_page_goes_on_where_the_last_one_ended_whatever_is_added(catalog: Catalog) -> None:
    for i in range(4):
        catalog.checkpoints.add(checkpoint(digest=digest(str(i)), step=i))
    first = catalog.checkpoints.page(Scope(), limit=2)
    by_step = catalog.checkpoints.page(Scope(), sort="step", limit=2)
    catalog.checkpoints.add(checkpoint(digest=digest("new"), step=0))
    assert [each.version for each in catalog.checkpoints.page(Scope(), limit=2, cursor=first.cursor).items] == [2, 1]
    assert refs(catalog.checkpoints.page(Scope(), sort="step", cursor=by_step.cursor).items) == [
        "support-bot@v3",
        "support-bot@v4",
    ]


def cursor_of(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "ä",
        "====",
        "[" * 5000,
        cursor_of(None),
        cursor_of([]),
        cursor_of(["", 1]),
        cursor_of(["step", 1, 1]),
        cursor_of(["", "1", 1]),
        cursor_of(["", 1, None]),
        cursor_of(["", 1, True]),
        cursor_of(["", 1, 2**70]),
        cursor_of([[], {}, {}]),
    ],
)
def test_a_wrong_cursor_is_refused(catalog: Catalog, cursor: str) -> None:
    with pytest.raises(InvalidInput):
        catalog.checkpoints.page(Scope(), cursor=cursor)


@pytest.mark.parametrize("value", [1, "2025-03-01T12:00:00", "x", 1.5, [1]])
def test_a_cursor_of_a_time_has_one(catalog: Catalog, value: Any) -> None:
    with pytest.raises(InvalidInput):
        catalog.checkpoints.page(Scope(), sort="created", cursor=cursor_of(["created", value, 1]))


def test_limits_and_orders_that_there_are_not(catalog: Catalog) -> None:
    for wrong in ({"limit": 0}, {"limit": 1001}, {"sort": "zork"}, {"sort": "metric."}):
        with pytest.raises(InvalidInput):
            catalog.checkpoints.page(Scope(), **wrong)  # type: ignore[arg-type]
    assert catalog.checkpoints.page(Scope()).items == ()


def test_counts_follow_every_change(catalog: Catalog) -> None:
    one, two = catalog.checkpoints.add_many(
        [checkpoint(digest=digest(str(i)), metrics={"loss": i, "acc": math.nan}) for i in range(2)]
    )
    assert (catalog.checkpoints.count(), catalog.checkpoints.rank(Scope()).candidates) == (2, 2)
    catalog.checkpoints.add_metric(one, Metric(name="acc", value=1.0, direction="higher"), "ada", NOON)
    assert catalog.checkpoints.rank(Scope(), metric="acc").without == 1
    catalog.checkpoints.add_metric(one, Metric(name="acc", value=math.inf), "ada", NOON)
    with pytest.raises(UnknownMetric):
        catalog.checkpoints.rank(Scope(), metric="acc")
    catalog.checkpoints.remove(two)
    ranking = catalog.checkpoints.rank(Scope())
    assert (ranking.metric, ranking.candidates, ranking.groups[0].checkpoints[0].ref) == ("loss", 1, one.ref)
    catalog.checkpoints.remove(one)
    with pytest.raises(UnknownMetric) as caught:
        catalog.checkpoints.rank(Scope())
    assert caught.value.near == ()


def test_what_no_database_can_hold_is_refused(engine: Engine) -> None:
    for wrong in (
        {"author": "a\0b"},
        {"tags": {"k": "\0"}},
        {"step": 2**63},
        {"rank": 2**70},
        {"source": "\udc80"},
    ):
        with pytest.raises((InvalidInput, OverflowError, UnicodeEncodeError)), writing(engine) as session:
            Catalog(session).checkpoints.add(checkpoint(**wrong))
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 0


def test_a_batch_is_recorded_in_order_and_all_or_nothing(engine: Engine) -> None:
    batch = [checkpoint(digest=digest(str(i)), adapter=name) for i, name in enumerate(["a", "b", "a"])]
    with writing(engine) as session:
        added = Catalog(session).checkpoints.add_many(batch)
    assert refs(added) == ["a@v1", "b@v1", "a@v2"]
    with reading(engine) as session:
        assert sorted(refs(Catalog(session).checkpoints.all())) == ["a@v1", "a@v2", "b@v1"]
        assert Catalog(session).checkpoints.all() == [added[0], added[2], added[1]]
    with pytest.raises(RegistryError), writing(engine) as session:
        Catalog(session).checkpoints.add_many([replace(batch[0], adapter=AdapterName("", "c")), batch[1]])
    with reading(engine) as session:
        assert Catalog(session).checkpoints.count() == 3


def plans(engine: Engine, ask: Callable[[Catalog], object]) -> str:
    """How SQLite goes about what is asked."""
    asked: list[tuple[str, Any]] = []

    def listen(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", listen)
    with reading(engine) as session:
        ask(Catalog(session))
    event.remove(engine, "before_cursor_execute", listen)
    with engine.connect() as connection:
        rows = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}", values).all() for each, values in asked]
    return "\n".join(str(row[-1]) for found in rows for row in found)


def test_the_best_and_the_few_are_found_by_an_index(sqlite: Engine) -> None:
    with writing(sqlite) as session:
        Catalog(session).checkpoints.add_many(
            [checkpoint(digest=digest(str(i)), metrics={"loss": i}, tags={"n": str(i)}) for i in range(100)]
        )
    asked: dict[str, Callable[[Catalog], object]] = {
        "ix_metrics_name_value_checkpoint_id": lambda catalog: catalog.checkpoints.rank(Scope()),
        "ix_tags_key_beginning_checkpoint_id": lambda catalog: catalog.checkpoints.page(
            Scope(where=parse_filter("tag.n = '5'"))
        ),
        "ix_tags_key_number_checkpoint_id": lambda catalog: catalog.checkpoints.page(
            Scope(where=parse_filter("tag.n < 5"))
        ),
        "ix_shipments_environment_adapter_id_id": lambda catalog: catalog.shipments.live("production"),
        "ix_events_about_number": lambda catalog: catalog.events.all("support-bot", limit=10),
    }
    for index, ask in asked.items():
        found = plans(sqlite, ask)
        assert index in found
        assert not re.search(r"SCAN (metrics|tags|events|shipments)$", found, re.MULTILINE), found


@pytest.mark.parametrize(
    ("sort", "index"), [("step", "step_id"), ("-step", "step_id"), ("rank", "rank_id"), ("-size", "size_bytes_id")]
)
def test_all_checkpoints_are_sorted_by_an_index(sqlite: Engine, sort: str, index: str) -> None:
    found = plans(sqlite, lambda catalog: catalog.checkpoints.page(Scope(), sort=sort))
    assert f"ix_checkpoints_{index}" in found
    assert "ORDER BY" not in found


def test_an_adapters_checkpoints_of_a_rank_are_found_by_the_adapter(sqlite: Engine) -> None:
    with writing(sqlite) as session:
        Catalog(session).checkpoints.add(checkpoint())
    of_rank = Scope(AdapterName("", "support-bot"), parse_filter("rank = 8"))
    found = plans(sqlite, lambda catalog: catalog.checkpoints.page(of_rank))
    assert "ix_checkpoints_rank_id" not in found


def test_who_passes_by_a_short_tag_is_read_from_the_index_alone(sqlite: Engine) -> None:
    found = plans(sqlite, lambda catalog: catalog.checkpoints.page(Scope(where=parse_filter("tag.team = 'nlu'"))))
    assert "USING COVERING INDEX ix_tags_key_beginning_checkpoint_id" in found


def test_what_somebody_holds_is_found_by_an_index(sqlite: Engine) -> None:
    asked: list[Callable[[Catalog], object]] = [
        lambda catalog: catalog.leases.of("ada", NOON),
        lambda catalog: catalog.leases.parts("ada ", NOON),
        lambda catalog: catalog.leases.release("ada"),
    ]
    for ask in asked:
        assert "ix_leases_holder" in plans(sqlite, ask)
