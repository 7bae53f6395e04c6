"""What most tests of the library start from: an empty registry, a tiny base model, and an adapter that fits it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
import tiny
from hypothesis import HealthCheck, settings
from merging import Bench

from registry.db.schema import upgrade
from registry.service import Registry

# How long an example takes is the machine's affair. Where a change is judged, everybody must get the same examples; elsewhere, new ones.
settings.register_profile(
    "ckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("ckpt")


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[Registry]:
    with tiny.open_registry(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """LoRA of rank 4 on query and value of both layers."""
    return tiny.write_adapter(tmp_path / "bot", base=base)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[servers.Server]:
    """A PostgreSQL, this test process's own."""
    with servers.postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres: servers.Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a database with the registry's tables, to be copied."""
    url = servers.create_database(postgres)
    upgrade(url, tmp_path_factory.mktemp("backups"))
    return url.rpartition("/")[2]


@pytest.fixture
def postgres_url(postgres: servers.Server, postgres_template: str) -> Iterator[str]:
    """A database of PostgreSQL with the registry's tables, empty."""
    url = servers.create_database(postgres, postgres_template)
    yield url
    servers.drop_database(url)


@pytest.fixture(scope="session")
def s3() -> Iterator[servers.Server]:
    """An S3 server, this test process's own; the environment says how to reach it."""
    with servers.s3_server() as server, pytest.MonkeyPatch.context() as environment:
        for name, value in servers.s3_environment(server.port).items():
            environment.setenv(name, value)
        yield server


@pytest.fixture
def s3_url(s3: servers.Server) -> Iterator[str]:
    """A bucket of its own, gone afterwards: each takes room that the server has only so much of."""
    url = servers.create_bucket(s3)
    yield url
    servers.drop_bucket(s3, url)
