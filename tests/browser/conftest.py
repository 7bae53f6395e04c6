"""A real Chromium, which looks at a populated server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import WIDE, visiting
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from populated import fill_home
from running import serving, settings_of
from visiting import Site

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")  # no longer: while it is there, nobody else in this process may run an event loop
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=300_000)
        yield found
        found.close()


@pytest.fixture(scope="module")
def filled_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return fill_home(tmp_path_factory.mktemp("populated"))


@pytest.fixture
def site(tmp_path: Path, filled_home: tuple[Path, dict[str, str]]) -> Iterator[Site]:
    template, secrets = filled_home
    shutil.copytree(template, tmp_path / "home")
    with serving(settings_of(tmp_path / "home")) as server:
        yield Site(server, secrets)


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    with visiting(browser, site, viewport=WIDE) as made:
        made.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
        yield made


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page in which nothing may go wrong unseen: what the browser complains of fails the test."""
    made = context.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    yield made
    assert not complaints
