"""A real Chromium, which looks at a populated server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import WIDE
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from populated import populate
from running import serving, settings_of
from visiting import Site

from registry.service import Registry
from registry.teamwork import Role

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")  # no longer: while it is there, nobody else in this process may run an event loop
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    settings = settings_of(tmp_path / "home")
    with Registry(settings) as registry:
        populate(registry, tmp_path)
        secrets = {role.value: registry.create_token(role.value, role).secret for role in Role}
    with serving(settings) as server:
        yield Site(server, secrets)


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    made = browser.new_context(base_url=site.url, viewport=WIDE)  # type: ignore[arg-type]
    made.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    made.set_default_timeout(15_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page in which nothing may go wrong unseen: what the browser complains of fails the test."""
    made = context.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    yield made
    assert not complaints
