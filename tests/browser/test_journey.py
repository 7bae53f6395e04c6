"""A day with the pages, in a real Chromium: sign in, filter, compare, merge and watch, ship, roll back, sign out. No page may have a fault that
axe-core finds, in light or dark, wide or on a phone; and pictures of all are left in a folder, for people to look at.
"""

from __future__ import annotations

import re

import pytest
from browsing import PHONE, WIDE, drawn, faults, picture, sign_in, visiting
from playwright.sync_api import Browser, Page, expect
from visiting import Site

pytestmark = pytest.mark.xdist_group("browser")

PAGES = {
    "overview": "/",
    "checkpoints": "/checkpoints",
    "checkpoints-filtered": "/checkpoints?where=metric.eval_loss+%3C+0.8&adapter=support-bot&sort=metric.eval_loss",
    "checkpoint": "/checkpoints/support-bot@v9",
    "checkpoint-dora": "/checkpoints/vision/caption@v2",
    "adapter": "/adapters/support-bot",
    "compare": "/compare?ref=support-bot@v5&ref=support-bot@v9&ref=nlu/intent@v6",
    "merge": "/merge?ref=support-bot@v5&ref=support-bot@v9&method=ties&look=yes",
    "jobs": "/jobs",
    "shipped": "/shipped",
    "bases": "/bases",
    "base": "/bases/tiny-llama",
    "audit": "/audit",
    "tokens": "/tokens",
    "webhooks": "/webhooks",
    "not-found": "/checkpoints/nobody@v1",
}


def test_a_day_with_the_pages(page: Page, site: Site) -> None:
    page.goto("/checkpoints")
    expect(page).to_have_url(re.compile("/sign-in"))
    page.get_by_label("Your token").fill(site.secrets["admin"])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Checkpoints")

    # filter: the table follows, and the address keeps it
    page.get_by_label("Filter").fill("metric.eval_loss < 0.7 and adapter = 'support-bot'")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("link", name="support-bot@v9")).to_be_visible()
    expect(page.get_by_role("link", name="support-bot@v12")).to_have_count(0)
    expect(page).to_have_url(re.compile("where="))
    page.reload()
    expect(page.get_by_label("Filter")).to_have_value("metric.eval_loss < 0.7 and adapter = 'support-bot'")

    # compare two of them
    for ref in ("support-bot@v5", "support-bot@v9"):
        page.get_by_label(f"Choose {ref}", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Compare")
    expect(page.get_by_role("heading", name="Configuration")).to_be_visible()

    # merge them: the plan first, then live progress to the end
    page.get_by_role("link", name="Merge them").click()
    page.get_by_role("button", name="Look at the plan").click()
    expect(page.get_by_role("heading", name="The plan")).to_be_visible()
    page.get_by_label("Note").fill("for the journey")
    page.get_by_role("button", name="Start the merge").click()
    expect(page).to_have_url(re.compile(r"/jobs/\d+$"))
    expect(page.get_by_text("succeeded")).to_be_visible()
    expect(page.get_by_text("Done:")).to_be_visible()
    picture(page, "job")
    page.get_by_label("Result").get_by_role("link").first.click()
    expect(page).to_have_url(re.compile("/merged/"))
    drawn(page)
    picture(page, "merged")
    assert faults(page) == []

    # ship, with a look at what changes and a note
    page.goto("/shipped")
    page.get_by_role("link", name="Ship…").click()
    page.get_by_label("What", exact=True).fill("support-bot@v5")
    page.get_by_label("Where", exact=True).fill("staging")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", name="Ship to staging?")).to_be_visible()
    picture(page, "ship")
    page.get_by_label("Note").fill("the journey's")
    page.get_by_role("button", name="Ship", exact=True).click()
    expect(page.get_by_role("cell", name="the journey's").first).to_be_visible()
    assert site.direct.resolve("support-bot@staging").ref == "support-bot@v5"

    # roll it back
    page.get_by_role("row", name=re.compile("staging.*the journey's")).get_by_role(
        "link", name="Roll back"
    ).first.click()
    expect(page.get_by_role("heading", name=re.compile("Roll back support-bot in staging"))).to_be_visible()
    page.get_by_label("Note").fill("not yet")
    page.get_by_role("button", name="Roll back", exact=True).click()
    expect(page.get_by_role("cell", name="not yet").first).to_be_visible()
    assert site.direct.resolve("support-bot@staging").ref == "support-bot@v9"

    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    page.goto("/shipped")
    expect(page).to_have_url(re.compile("/sign-in"))


def test_notes_tags_and_a_token_are_written_by_hand(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.goto("/checkpoints/support-bot@v7")
    page.get_by_label("Add a note").fill("<script>alert(1)</script> & more")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.get_by_text("<script>alert(1)</script> & more")).to_be_visible()
    page.goto("/checkpoints?adapter=support-bot")
    for ref in ("support-bot@v7", "support-bot@v8"):
        page.get_by_label(f"Choose {ref}", exact=True).check()
    page.get_by_role("button", name="Tag…").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    picture(page, "tagging")
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.goto("/tokens")
    page.get_by_label("Whose it is").fill("grace")
    page.get_by_role("button", name=re.compile("[Mm]ake|[Cc]reate")).first.click()
    expect(page.get_by_text(re.compile("ckpt_r_|ckpt_")).first).to_be_visible()
    assert "grace" in {token.name for token in site.direct.tokens()}


@pytest.mark.parametrize(
    ("kind", "scheme", "size"), [("light", "light", WIDE), ("dark", "dark", WIDE), ("phone", "light", PHONE)]
)
def test_no_page_keeps_anybody_out(browser: Browser, site: Site, kind: str, scheme: str, size: dict[str, int]) -> None:
    found = {}
    with visiting(browser, site, viewport=size, color_scheme=scheme) as context:
        page = context.new_page()
        for name, path in {"sign-in": "/sign-in", **PAGES}.items():
            page.goto(path, wait_until="load")
            drawn(page)
            found[name] = faults(page)
            if page.evaluate("document.documentElement.scrollWidth > innerWidth + 1"):
                found[name].append("wider than the window")
            picture(page, name if kind == "light" else f"{name}-{kind}")
            if name == "sign-in":
                sign_in(page, site)
    assert {name: each for name, each in found.items() if each} == {}


def test_the_keyboard_alone_is_enough(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    expect(page.locator(":focus")).to_have_id("content")
    page.goto("/merge?ref=support-bot@v5")
    page.get_by_role("button", name="Look at the plan").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="The plan")).to_be_visible()


def test_the_theme_is_chosen_and_kept(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.get_by_label("Light or dark").click()
    page.get_by_label("Light or dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(26, 31, 38)"


def test_pages_work_without_scripts(browser: Browser, site: Site) -> None:
    with visiting(browser, site, java_script_enabled=False) as context:
        page = context.new_page()
        sign_in(page, site)
        page.goto("/checkpoints")
        page.get_by_label("Filter").fill("step = 150")
        page.get_by_role("button", name="Apply").click()
        expect(page.get_by_role("link", name="support-bot@v5", exact=True)).to_have_count(0)
        expect(page.get_by_role("link", name="support-bot@v3", exact=True)).to_be_visible()
        page.goto("/shipped/ship?ref=support-bot@v5&environment=staging")
        page.get_by_label("Note").fill("by hand")
        page.get_by_role("button", name="Ship", exact=True).click()
        expect(page.get_by_role("cell", name="by hand").first).to_be_visible()
        assert site.direct.resolve("support-bot@staging").ref == "support-bot@v5"
