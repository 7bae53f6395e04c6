"""A server whose registry has something of everything, and visitors who have signed in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from populated import fill_home
from running import serving, settings_of
from visiting import Site


@pytest.fixture(scope="session")
def filled_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return fill_home(tmp_path_factory.mktemp("populated"))


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
