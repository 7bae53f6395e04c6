"""A team's registry (PostgreSQL, and a store of files or on S3), and the embedded one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import servers
import tiny
from teams import inline, team, worker_thread
from throttle import Throttle, throttled

from registry.service import Registry


@pytest.fixture
def team_environment(tmp_path: Path, postgres_url: str) -> dict[str, str]:
    """What processes of the team need to know; the store is a folder."""
    return {
        "CKPT_HOME": str(tmp_path / "worker"),
        "CKPT_DATABASE_URL": postgres_url,
        "CKPT_STORE": (tmp_path / "store").as_uri(),
        "CKPT_USER": "worker",
    }


@pytest.fixture
def shared(tmp_path: Path, team_environment: dict[str, str]) -> Iterator[Registry]:
    """A team's registry with a store of files, empty."""
    with team(tmp_path / "home", team_environment["CKPT_DATABASE_URL"], team_environment["CKPT_STORE"]) as registry:
        yield registry


@pytest.fixture
def far(
    tmp_path: Path, postgres_url: str, s3: servers.Server, s3_url: str
) -> Iterator[tuple[Registry, Throttle, dict[str, str]]]:
    """A team's registry with a store on S3, a proxy that makes it slow for workers, and what those need to know."""
    with (
        team(tmp_path / "home", postgres_url, f"{s3_url}/store") as registry,
        throttled(s3.port) as throttle,
    ):
        yield (
            registry,
            throttle,
            {
                "CKPT_HOME": str(tmp_path / "worker"),
                "CKPT_DATABASE_URL": postgres_url,
                "CKPT_STORE": f"{s3_url}/store",
                "CKPT_USER": "worker",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{throttle.port}",
            },
        )


@pytest.fixture(params=["inline", "team"])
def both(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Registry, Callable[[], AbstractContextManager[object]]]]:
    """A registry of either kind, and a context manager in which its jobs are done."""
    if request.param == "inline":
        with tiny.open_registry(tmp_path / "home") as registry:
            yield registry, lambda: inline(registry)
    else:
        registry = request.getfixturevalue("shared")
        yield registry, lambda: worker_thread(registry)
