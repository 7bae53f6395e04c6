"""One registry, in each of the three ways to run it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sites
import tiny
from sites import Maker, Site

from registry.manifest import BaseModel, Checkpoint
from registry.registering import Registration
from registry.service import Registry


@pytest.fixture(params=["embedded", "team", "remote"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param == "embedded":
        opened = sites.embedded(tmp_path)
    elif request.param == "team":
        database, store = request.getfixturevalue("postgres_url"), request.getfixturevalue("s3_url")
        opened = sites.team(tmp_path, database, f"{store}/store")
    else:
        opened = sites.remote(tmp_path)
    with opened as found:
        yield found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Site]:
    """A server only, for what there is no other way to see."""
    with sites.remote(tmp_path) as found:
        yield found


@pytest.fixture
def ckpt(site: Site) -> Registry:
    """The registry as Ada sees it."""
    return site.connect("ada")


@pytest.fixture
def working(site: Site) -> Iterator[None]:
    """Background work is done while the test runs."""
    with site.working():
        yield


@pytest.fixture
def base(ckpt: Registry, tmp_path: Path) -> BaseModel:
    """A base model `base` that every machine can read."""
    return ckpt.add_base(str(tiny.write_base(tmp_path / "base", shards=2)), name="base", copy=True).base


@pytest.fixture
def make(ckpt: Registry, base: BaseModel, tmp_path: Path) -> Maker:
    """Registers a new checkpoint on the base; `bot` unless told otherwise."""
    seeds = itertools.count(1)

    def register(adapter: str = "bot", **said: Any) -> Checkpoint:
        seed = next(seeds)
        place = tiny.write_adapter(tmp_path / f"adapter-{seed}", base="base", seed=seed)
        return ckpt.register(str(place), Registration(adapter=adapter, base="base", **said)).registered[0].checkpoint

    return register
