"""What tests with a browser share: signing in, pictures for people, and what axe-core says."""

from __future__ import annotations

import os
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page
from visiting import Site

PICTURES = Path(os.environ.get("CKPT_PICTURES", Path(__file__).parents[1] / "build" / "pictures"))
WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}


def sign_in(page: Page, site: Site, name: str = "admin") -> None:
    page.goto("/sign-in")
    page.get_by_label("Your token").fill(site.secrets[name])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/")


def picture(page: Page, name: str) -> None:
    """Write down how a page looks, for people."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def faults(page: Page) -> list[str]:
    """What axe-core finds wrong with a page, by the rules of WCAG 2 A and AA and by good practice."""
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": rules}).response["violations"]
    return [f"{each['id']}: {each['help']}\n" + "\n".join(map(_place, each["nodes"][:4])) for each in found]


def _place(node: dict[str, str]) -> str:
    return f"    {node['html'][:200]}\n    {node['failureSummary']}"
