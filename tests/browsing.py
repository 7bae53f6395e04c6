"""What tests with a browser share: signing in, pictures for people, and what axe-core says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect
from visiting import Site

PICTURES = Path(os.environ.get("CKPT_PICTURES", Path(__file__).parents[1] / "build" / "pictures"))
WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}
_MOST_MS = 120_000  # for what is never slow: only against waiting for ever
expect.set_options(timeout=_MOST_MS)


@contextmanager
def visiting(browser: Browser, site: Site, **options: Any) -> Iterator[BrowserContext]:
    """A visitor of a site, of whom the browser remembers nothing."""
    made = browser.new_context(base_url=site.url, **options)
    made.set_default_timeout(_MOST_MS)
    try:
        yield made
    finally:
        made.close()


def sign_in(page: Page, site: Site, name: str = "admin") -> None:
    page.goto("/sign-in")
    page.get_by_label("Your token").fill(site.secrets[name])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/")


def drawn(page: Page) -> None:
    """Return when all that is there has been drawn, curves too, and what a page asks for afterwards has come."""
    coming = ".htmx-request, [hx-trigger=load] > .busy, [data-curves]:not(:has(canvas))"
    expect(page.locator(coming)).to_have_count(0)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def picture(page: Page, name: str) -> None:
    """Write down how a page looks, for people."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def faults(page: Page) -> list[str]:
    """What axe-core finds wrong with a page, by the rules of WCAG 2 A and AA and by good practice."""
    page.wait_for_load_state()
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    page.evaluate(Axe().axe_script)
    # What it finds right is most of what it finds, and takes as long to get here as to be found.
    wrong = "(rules) => axe.run({runOnly: rules, resultTypes: ['violations']}).then((found) => found.violations)"
    found = page.evaluate(wrong, rules)
    return [f"{each['id']}: {each['help']}\n" + "\n".join(map(_place, each["nodes"][:4])) for each in found]


def _place(node: dict[str, str]) -> str:
    return f"    {node['html'][:200]}\n    {node['failureSummary']}"
