"""`docker-compose.yml` and the `Dockerfile` are what the tools take, and what the documentation promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import compose
import jsonschema
import pytest
import yaml

OURS = ("migrate", "server", "worker-1", "worker-2")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(yaml.safe_load((compose.ROOT / "docker-compose.yml").read_text()))


def test_the_file_is_valid_by_the_published_schema(document: dict[str, object]) -> None:
    schema = json.loads((compose.ROOT / "tests/data/compose/compose-spec.json").read_text())
    assert not [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]
    broken = {**document, "services": {"server": {"comand": ["serve"]}}}
    assert list(jsonschema.Draft7Validator(schema).iter_errors(broken))


def test_it_holds_no_secret_and_insists_on_each() -> None:
    names = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "TORCH_INDEX_URL"}
    for name in names:
        with pytest.raises(KeyError, match=name):
            compose.read_compose(dict.fromkeys(names - {name}, "x"))
    listed = re.findall(r"^(\w+)=", (compose.ROOT / ".env.example").read_text(), re.MULTILINE)
    assert names < set(listed)


def test_every_service_that_stays_has_a_health_check_and_keeps_its_data() -> None:
    services = compose.read_compose(
        dict.fromkeys(("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "TORCH_INDEX_URL"), "x")
    )["services"]
    assert set(services) == {"postgres", "s3", *OURS}
    for name, service in services.items():
        if name != "migrate":
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["volumes"], name
    assert services["server"]["ports"] == ["127.0.0.1:8000:8000"]
    assert all(services[name]["depends_on"]["migrate"] for name in OURS if name != "migrate")


def test_the_image_is_made_here_and_never_looked_for_elsewhere(document: dict[str, Any]) -> None:
    services = document["services"]
    assert {services[name]["image"] for name in OURS} == {services["migrate"]["image"]}
    assert {services[name]["pull_policy"] for name in OURS} == {"never"}
    assert [name for name in OURS if "build" in services[name]] == ["migrate"]


def test_a_database_that_is_being_set_up_is_not_taken_for_one_that_is_ready(document: dict[str, Any]) -> None:
    """The image starts one on a socket, sets it up, and stops it again: only the last one listens on an address."""
    assert "--host=127.0.0.1" in document["services"]["postgres"]["healthcheck"]["test"]


def test_services_get_the_time_that_they_take_to_end(document: dict[str, Any]) -> None:
    """A server waits for streams and then for work of its own; a worker has its grace."""
    for name in ("server", "worker-1", "worker-2"):
        assert int(document["services"][name]["stop_grace_period"].removesuffix("s")) >= 40, name


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_of_the_command_line(name: str) -> None:
    words = compose.read_compose(
        dict.fromkeys(("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "TORCH_INDEX_URL"), "x")
    )["services"][name]["command"]
    command = [sys.executable, "-m", "cli", *words, "--help"]
    assert subprocess.run(command, capture_output=True, cwd=compose.ROOT, check=False).returncode == 0


def test_the_image_runs_without_rights_and_has_all_that_a_team_needs() -> None:
    lines = (compose.ROOT / "Dockerfile").read_text().splitlines()
    last = [line for line in lines if line.startswith("USER ")]
    assert last == ["USER ckpt"]
    assert lines.index("USER ckpt") > max(number for number, line in enumerate(lines) if line.startswith("RUN "))
    assert any('".[team]"' in line for line in lines)
    (torch,) = [line for line in lines if line.endswith(" torch")]
    assert "--no-deps" in torch  # PyTorch's own index has not the versions of everything else that are asked for
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    for path in copied:
        assert (compose.ROOT / path).exists(), path
        assert f"!{path}" in (compose.ROOT / ".dockerignore").read_text().splitlines(), path
