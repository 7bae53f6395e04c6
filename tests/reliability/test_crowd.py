"""Many at once: 32 processes on one registry, and two racers on everything that only one can have."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny

from registry.errors import Conflict, MergeRunning, NameTaken, NotFound, RegistryError
from registry.registering import Registration
from registry.service import Registry

sys.path.insert(0, str(Path(__file__).parent))
import rounds

CLIENTS = 32
Race = Callable[[Registry, int], Any]


@pytest.fixture(params=["embedded", pytest.param("team", marks=pytest.mark.xdist_group("servers"))])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> rounds.Place:
    if request.param == "embedded":
        return rounds.make_place(tmp_path)
    url = request.getfixturevalue("postgres_url")
    return rounds.make_place(tmp_path, CKPT_DATABASE_URL=url, CKPT_STORE=(tmp_path / "store").as_uri())


def test_32_processes_on_one_registry(place: rounds.Place) -> None:
    merging = "1" if "CKPT_DATABASE_URL" not in place.environment else "0"
    program = str(Path(__file__).with_name("crowd.py"))
    done = subprocess.run(
        [sys.executable, program, str(place.folder), str(CLIENTS), merging],
        env={**os.environ, **place.environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with place.open() as registry:
        own = [each for each in registry.checkpoints() if each.adapter.name != "shared"]
        assert {each.adapter.name for each in own} == {f"own-{number}" for number in range(CLIENTS)}
        for each in own:
            number = each.adapter.name.removeprefix("own-")
            assert [note.text for note in each.notes] == [f"by {number}", f"second by {number}"]
        shared = registry.checkpoints("shared")
        assert [each.version for each in shared] == list(range(1, rounds.ADAPTERS + 1))
        assert len({each.digest for each in shared}) == rounds.ADAPTERS
        assert registry.resolve("shared@live") in shared
        assert len(registry.shipments("production")) == CLIENTS
        assert len(registry.shipped("production")) == CLIENTS
        assert registry.verify(read_data=True).is_sound
        registry.verify_chain()


def race(place: rounds.Place, run: Race) -> tuple[list[Any], list[RegistryError]]:
    """Two clients start the same thing at the same moment: what they got, and what they were told instead."""
    together = threading.Barrier(2, timeout=120)

    def one(number: int) -> Any:
        with place.open() as registry:
            registry.bases()  # whatever has to be opened is open
            together.wait()
            try:
                return run(registry, number)
            except RegistryError as error:
                return error

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(one, range(2)))
    return (
        [each for each in results if not isinstance(each, RegistryError)],
        [each for each in results if isinstance(each, RegistryError)],
    )


def register(place: rounds.Place, seed: int, adapter: str) -> Callable[[Registry], Any]:
    said = Registration(base="base", adapter=adapter)
    return lambda registry: registry.register(str(place.folder / f"adapter-{seed}"), said).registered[0]


def test_two_contents_of_one_name_get_two_versions(place: rounds.Place) -> None:
    got, told = race(place, lambda registry, number: register(place, number, "bot")(registry))
    assert not told
    assert {each.checkpoint.version for each in got} == {1, 2}


def test_one_content_is_registered_once(place: rounds.Place) -> None:
    got, told = race(place, lambda registry, number: register(place, 0, "bot")(registry))
    assert not told
    assert {each.checkpoint.ref for each in got} == {"bot@v1"}
    assert sorted(each.created for each in got) == [False, True]


def test_one_name_for_two_base_models(place: rounds.Place, tmp_path: Path) -> None:
    bases = [str(tiny.write_base(tmp_path / f"base-{seed}", seed=seed)) for seed in (8, 9)]
    got, told = race(place, lambda registry, number: registry.add_base(bases[number], name="llama"))
    assert len(got) == 1
    assert [type(each) for each in told] == [NameTaken]


def test_an_alias_is_moved_by_both_and_removed_by_one(place: rounds.Place) -> None:
    with place.open() as registry:
        both = [register(place, seed, "bot")(registry).checkpoint for seed in (0, 1)]
    got, told = race(place, lambda registry, number: registry.set_alias(both[number], "live"))
    assert not told
    assert sorted(before is None for before in got) == [False, True]  # the second one is told what the first had set
    got, told = race(place, lambda registry, number: registry.remove_alias("bot", "live"))
    assert len(got) == 1
    assert isinstance(told[0], NotFound)


def test_a_checkpoint_is_removed_by_one(place: rounds.Place) -> None:
    with place.open() as registry:
        bot = register(place, 0, "bot")(registry).checkpoint
    got, told = race(place, lambda registry, number: registry.remove(bot))
    assert len(got) == 1
    assert isinstance(told[0], NotFound)


def test_one_recipe_is_merged_once(tmp_path: Path) -> None:
    place = rounds.make_place(tmp_path)
    with place.open() as registry:
        bot = register(place, 0, "bot")(registry).checkpoint
    got, told = race(place, lambda registry, number: registry.merge(registry.plan(bot)))
    assert all(isinstance(each, MergeRunning) for each in told)
    assert sum(each.created for each in got) == 1
    with place.open() as registry:
        assert len(registry.merged()) == 1
        assert registry.verify(read_data=True).is_sound


def test_shipping_and_removing_one_checkpoint(place: rounds.Place) -> None:
    for attempt in range(3):
        with place.open() as registry:
            bot = register(place, 0, f"bot-{attempt}")(registry).checkpoint
        race(place, lambda registry, number, bot=bot: registry.remove(bot) if number else registry.ship(bot, "live"))  # type: ignore[misc]
        with place.open() as registry:
            names = {each.checkpoint for each in registry.shipments("live")} if _shipped(registry) else set()
            there = {each.ref for each in registry.checkpoints()}
            assert (bot.ref in names) == (bot.ref in there)


def _shipped(registry: Registry) -> bool:
    return any(event.action == "ship" for event in registry.history())


def test_two_sweeps(place: rounds.Place) -> None:
    for seed in range(3):
        with place.open() as registry:
            registry.remove(register(place, seed, "bot")(registry).checkpoint)
        got, told = race(place, lambda registry, number: registry.sweep(grace=timedelta(0)))
        assert all(isinstance(each, Conflict) for each in told)
        assert sum(each.blobs for each in got) in (1, 2)
