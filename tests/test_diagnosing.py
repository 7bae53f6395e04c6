"""Each thing that can be wrong with a team's set-up, in turn: the doctor names it, and says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import servers
from s3_proxy import spoiling

from registry import connect
from registry.diagnosing import Diagnosis, Verdict
from registry.errors import StorageFailed
from registry.settings import Settings
from registry.wording import explain


def wrong(home: Path, database_url: str, store_url: str) -> dict[str, Diagnosis]:
    """What is not as it should be, by name."""
    environment = {"CKPT_HOME": str(home), "CKPT_DATABASE_URL": database_url, "CKPT_STORE": store_url}
    with connect(Settings.from_environment(environment)) as registry:
        return {each.name: each for each in registry.diagnose() if each.verdict is not Verdict.OK}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have clients of S3 that are made in the block find these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_all_is_well(tmp_path: Path, postgres_url: str, s3_url: str) -> None:
    assert wrong(tmp_path, postgres_url, s3_url) == {}


def test_no_such_database(tmp_path: Path, postgres: servers.Server, s3_url: str) -> None:
    found = wrong(tmp_path, f"postgresql://postgres@127.0.0.1:{postgres.port}/nothing", s3_url)["database"]
    assert found.verdict is Verdict.PROBLEM
    assert found.advice == "create the database, or correct its name in CKPT_DATABASE_URL"


def test_no_such_user(tmp_path: Path, postgres: servers.Server, s3_url: str) -> None:
    found = wrong(tmp_path, f"postgresql://nobody:hunter2@127.0.0.1:{postgres.port}/postgres", s3_url)["database"]
    assert found.advice == "see user and password in CKPT_DATABASE_URL"
    assert "hunter2" not in found.found


def test_nobody_listens(tmp_path: Path, s3_url: str) -> None:
    (port,) = servers.free_ports(1)
    with environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}):
        found = wrong(tmp_path, f"postgresql://postgres@127.0.0.1:{port}/ckpt", s3_url)
    assert [found[name].verdict for name in ("database", "store")] == [Verdict.PROBLEM] * 2
    assert {found[name].advice for name in ("database", "store")} == {"is it running, and is its address right?"}


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_key_of_the_store_that_is_wrong(tmp_path: Path, postgres_url: str, s3_url: str, name: str) -> None:
    with environment({name: "wrong"}):
        (found,) = wrong(tmp_path, postgres_url, s3_url).values()
    assert (found.name, found.verdict) == ("store", Verdict.PROBLEM)
    assert "AWS_ACCESS_KEY_ID" in found.advice


def test_a_store_without_conditions(tmp_path: Path, postgres_url: str, s3: servers.Server, s3_url: str) -> None:
    with (
        spoiling(s3.port, lambda method, path: "careless" if method == "PUT" else "") as passed,
        environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{passed.port}"}),
    ):
        (found,) = wrong(tmp_path, postgres_url, s3_url).values()
    assert (found.name, found.verdict) == ("store", Verdict.PROBLEM)
    assert "ignores write conditions" in found.found
    assert "docs/storage.md" in found.advice


def test_a_clock_that_is_off(tmp_path: Path, postgres_url: str, s3: servers.Server, s3_url: str) -> None:
    with (
        spoiling(s3.port, lambda method, path: "late") as passed,
        environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{passed.port}"}),
    ):
        (found,) = wrong(tmp_path, postgres_url, s3_url).values()
    assert (found.name, found.verdict) == ("store", Verdict.WARNING)
    assert "behind this machine's" in found.found


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ('FATAL:  password authentication failed for user "ckpt"', "see user and password in CKPT_DATABASE_URL"),
        ("there is no such bucket", "create the bucket, or correct its name"),
        ("the difference between the request time and the server's is too skewed", "set this machine's clock by NTP"),
    ],
)
def test_what_only_other_servers_say(reason: str, hint: str) -> None:
    assert explain(StorageFailed("s3://bucket", reason)).hint == hint
