"""A whole registry moves to another database and store, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
import tiny

from registry import connect
from registry.copying import Copied, Place, copy
from registry.errors import Conflict, DamagedBlob, InvalidInput, PathNotFound
from registry.manifest import Metric
from registry.registering import Registration
from registry.service import Registry
from registry.settings import Settings
from registry.store import Store


def everything(registry: Registry) -> dict[str, Any]:
    """What a registry tells of what it has."""
    return {
        "checkpoints": [repr(each) for each in registry.checkpoints()],
        "bases": registry.bases(),
        "merged": registry.merged(),
        "shipments": registry.shipments(),
        "history": registry.history(),
        "best": repr(registry.rank(metric="eval_loss")),
    }


def place(registry: Registry) -> Place:
    return Place(database_url=registry.settings.database_url, store_url=registry.settings.store_url)


@pytest.fixture
def mine(tmp_path: Path, base: Path) -> Iterator[Registry]:
    """A registry with something of every kind, and with gaps in its ids."""
    with tiny.open_registry(tmp_path / "mine") as registry:
        registry.add_base(str(base), name="meta/base", copy=True)
        registry.add_base(str(tiny.write_base(tmp_path / "other", seed=3)), name="meta/other")
        registry.register(
            str(tiny.write_run(tmp_path / "run", base=base)), Registration(adapter="bot", tags={"a": "ä"})
        )
        first, second, third, _ = registry.checkpoints("bot")
        registry.remove(second)
        registry.note(first, "grüße")
        registry.add_metrics(first, [Metric(name="acc", value=math.nan), Metric(name="acc", value=math.inf)])
        registry.set_alias(third, "candidate")
        registry.ship(first, "production")
        registry.ship(third, "production")
        registry.rollback("production")
        registry.merge(registry.plan(third), note="for the demo")
        yield registry


@pytest.fixture
def team(postgres_url: str, s3: servers.Server, s3_url: str, tmp_path: Path) -> Iterator[Registry]:
    settings = {"CKPT_HOME": str(tmp_path / "team"), "CKPT_USER": "bob"}
    urls = {"CKPT_DATABASE_URL": postgres_url, "CKPT_STORE": f"{s3_url}/store"}
    with connect(Settings.from_environment({**settings, **urls})) as registry:
        yield registry


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry of the same kind."""
    with tiny.open_registry(tmp_path / "copy") as registry:
        yield registry


def carry(source: Registry, target: Registry) -> Copied:
    return copy(place(source), place(target), target.settings.home / "backups")


def test_to_the_team_and_back(mine: Registry, team: Registry, other: Registry, tmp_path: Path) -> None:
    before = everything(mine)
    copied = carry(mine, team)
    assert copied.written == copied.blobs > 5
    assert (copied.rows["checkpoints"], copied.rows["shipments"]) == (3, 3)
    assert list(copied.elsewhere) == ["meta/other"]
    assert everything(team) == before == everything(mine)
    team.pull(team.resolve("bot@candidate"), tmp_path / "pulled")
    team.pull(team.merged()[0], tmp_path / "merged")
    added = team.register(str(tiny.write_adapter(tmp_path / "new", base=tmp_path / "base", seed=9)))
    assert added.registered[0].checkpoint.ref == "new@v1"
    team.ship(added.registered[0].checkpoint, "production")
    again = team.register(str(tmp_path / "run" / "checkpoint-50"), Registration(adapter="bot"))
    assert again.registered[0].checkpoint.ref == "bot@v5"
    carry(team, other)
    assert everything(other) == everything(team)
    other.note(other.resolve("new"), "at home")
    assert len(other.history()) == len(team.history()) + 1


def test_again_it_goes_on(mine: Registry, other: Registry) -> None:
    copied = carry(mine, other)
    assert carry(mine, other).written == 0
    for digest, _ in list(Store(other.settings.store_url).blobs())[:2]:
        Store(other.settings.store_url).delete(digest)
    again = carry(mine, other)
    assert (again.written, again.rows) == (2, copied.rows)
    mine.note(mine.resolve("bot"), "later")
    assert carry(mine, other).rows["notes"] == copied.rows["notes"] + 1
    assert everything(other) == everything(mine)


def test_what_has_a_life_of_its_own_is_not_overwritten(mine: Registry, other: Registry) -> None:
    carry(mine, other)
    mine.note(mine.resolve("bot"), "here")
    other.note(other.resolve("bot"), "there")
    kept = everything(other)
    with pytest.raises(Conflict, match="another registry"):
        carry(mine, other)
    with pytest.raises(InvalidInput):
        carry(mine, mine)
    assert everything(other) == kept


def test_a_file_that_is_not_what_was_recorded_ends_the_copy(mine: Registry, other: Registry) -> None:
    store = Store(mine.settings.store_url)
    digest, size_bytes = next(iter(store.blobs()))
    damaged = store.local_path(digest)
    assert damaged is not None
    damaged.chmod(0o600)
    damaged.write_bytes(b"x" * size_bytes)
    with pytest.raises(DamagedBlob):
        carry(mine, other)
    assert other.checkpoints() == []
    store.delete(digest)
    with pytest.raises(DamagedBlob, match="missing"):
        carry(mine, other)
    assert other.history() == []


def test_progress_ends_with_all_bytes_and_all_rows(mine: Registry, other: Registry) -> None:
    told: dict[str, int] = {}
    totals: dict[str, int] = {}

    def tell(what: str, done: int, total: int) -> None:
        told[what] = told.get(what, 0) + done
        totals[what] = total

    copied = copy(place(mine), place(other), other.settings.home / "backups", tell)
    files = told.pop("files")
    assert files == totals.pop("files") == copied.written_bytes
    assert sum(told.values()) == sum(copied.rows.values()) == max(totals.values())


def test_a_source_that_is_not_there_is_not_made(other: Registry, tmp_path: Path) -> None:
    missing = Place(database_url=f"sqlite:///{tmp_path}/mistyped.db", store_url=(tmp_path / "store").as_uri())
    with pytest.raises(PathNotFound):
        copy(missing, place(other), tmp_path / "backups")
    assert not (tmp_path / "mistyped.db").exists()
