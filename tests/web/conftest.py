"""A server whose registry has something of everything, and visitors who have signed in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from populated import populate
from running import serving, settings_of
from visiting import Site

from registry.service import Registry
from registry.teamwork import Role


@pytest.fixture(scope="session")
def filled_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A registry to be copied, and the tokens in it."""
    folder = tmp_path_factory.mktemp("populated")
    with Registry(settings_of(folder / "home")) as registry:
        populate(registry, folder)
        secrets = {role.value: registry.create_token(role.value, role).secret for role in Role}
        secrets["nlu"] = registry.create_token("nlu", Role.WRITER, ["nlu"]).secret
    return folder / "home", secrets


@pytest.fixture
def site(tmp_path: Path, filled_home: tuple[Path, dict[str, str]]) -> Iterator[Site]:
    template, secrets = filled_home
    shutil.copytree(template, tmp_path / "home")
    with serving(settings_of(tmp_path / "home")) as server:
        yield Site(server, dict(secrets))


@pytest.fixture
def empty_site(tmp_path: Path) -> Iterator[Site]:
    """A server with nothing in it, which asks nobody for a token."""
    with serving(settings_of(tmp_path / "empty")) as server:
        yield Site(server, {})
