"""The list of checkpoints in a real Chromium: choosing over several pages of it, going back, and what a long name must not do."""

from __future__ import annotations

import re

import pytest
import tiny
from browsing import PHONE, WIDE, drawn, sign_in, visiting
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from visiting import Site

from registry.manifest import Metric
from registry.registering import Registration

pytestmark = pytest.mark.xdist_group("browser")

LIST = "/checkpoints?adapter=support-bot&limit=5"


def test_what_is_chosen_stays_chosen_on_the_next_page(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.goto(LIST)
    page.get_by_label("Choose all on this page").check()
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_label("Choose support-bot@v7", exact=True)).not_to_be_checked()
    expect(page.get_by_text("5 chosen, 5 of them not on this page")).to_be_visible()
    page.get_by_label("Choose support-bot@v7", exact=True).check()
    expect(page.get_by_text("6 chosen, 5 of them not on this page")).to_be_visible()
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    page.get_by_role("link", name="Previous").click()
    expect(page.get_by_label("Choose support-bot@v12", exact=True)).to_be_checked()
    page.get_by_label("Choose support-bot@v12", exact=True).uncheck()
    expect(page.get_by_text("5 chosen, 1 of them not on this page")).to_be_visible()

    page.get_by_role("button", name="Tag…").click()
    expect(page.get_by_role("heading", name="Tag 5 checkpoints")).to_be_visible()
    page.get_by_role("textbox", name="Set").fill("reviewed=yes")
    page.get_by_role("button", name="Tag", exact=True).click()
    expect(page.locator("#list").get_by_text("Tagged 5 checkpoints.")).to_be_visible()
    tagged = [each.version for each in site.direct.checkpoints("support-bot") if each.tags.get("reviewed")]
    assert sorted(tagged) == [7, 8, 9, 10, 11]


def test_checkpoints_of_two_pages_are_compared_or_let_go(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.goto(LIST)
    page.get_by_label("Choose support-bot@v12", exact=True).check()
    page.get_by_role("link", name="Next").click()
    page.get_by_label("Choose support-bot@v4", exact=True).check()
    page.get_by_role("button", name="Choose none").click()
    expect(page.get_by_text("chosen")).to_be_hidden()
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    page.get_by_label("Choose support-bot@v4", exact=True).check()
    page.get_by_role("link", name="Previous").click()
    page.get_by_label("Choose support-bot@v11", exact=True).check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("link", name="support-bot@v11", exact=True).first).to_be_visible()
    assert sorted(re.findall(r"ref=support-bot%40(v\d+)", page.url)) == ["v11", "v4"]


def test_going_back_leads_through_what_was_asked(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.goto(LIST)
    page.locator("#sort-2").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("Step")
    page.get_by_label("Filter").fill("step > 100")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="support-bot@v1", exact=True)).to_have_count(0)
    page.get_by_label("Choose support-bot@v3", exact=True).check()
    page.go_back()
    expect(page.get_by_role("link", name="support-bot@v1", exact=True)).to_be_visible()
    expect(page.get_by_label("Filter")).to_have_value("")
    expect(page.get_by_label("Choose support-bot@v3", exact=True)).to_be_checked()
    page.go_back()
    expect(page.locator("th[aria-sort=ascending]")).to_have_count(0)
    page.go_forward()
    page.go_forward()
    expect(page.get_by_label("Filter")).to_have_value("step > 100")


def test_the_next_page_begins_at_its_beginning(page: Page, site: Site) -> None:
    sign_in(page, site)
    page.set_viewport_size({"width": 1000, "height": 400})
    page.goto(LIST)
    page.get_by_role("link", name="Next").focus()
    assert page.evaluate("scrollY") > 100
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="support-bot@v7", exact=True)).to_be_visible()
    expect(page.get_by_role("region", name="Checkpoints")).to_be_focused()
    expect(page.get_by_label("Filter")).to_be_in_viewport()


def test_of_two_steps_at_once_the_last_is_shown(page: Page, site: Site) -> None:
    """Whichever is answered first: here the first step is answered last."""
    sign_in(page, site)
    page.goto(LIST)
    for text in ("step > 100", "step > 150"):
        page.get_by_label("Filter").fill(text)
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile(text[-3:]))
    held: list[Route] = []
    page.route("**/checkpoints?*100*", lambda route: held.append(route), times=1)
    page.go_back(wait_until="commit")
    page.go_back(wait_until="commit")
    expect(page.get_by_label("Filter")).to_have_value("")
    for route in held:
        route.continue_()
    page.get_by_label("Filter").fill("step > 50")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("step%20%3E%2050"))
    expect(page.get_by_label("Filter")).to_have_value("step > 50")


def test_going_back_to_a_filter_that_cannot_be_read_shows_what_is_wrong(context: BrowserContext, site: Site) -> None:
    page = context.new_page()  # of one's own: that the answer is 400 is a complaint of the browser's
    sign_in(page, site)
    page.goto("/checkpoints")
    page.get_by_label("Filter").fill("step >")
    page.keyboard.press("Enter")
    expect(page.locator("#where-problem")).to_be_visible()
    page.get_by_label("Filter").fill("step > 100")
    page.keyboard.press("Enter")
    expect(page.locator("#where-problem")).to_have_count(0)
    page.go_back()
    expect(page.locator("#where-problem")).to_contain_text("expected a number")
    expect(page.get_by_label("Filter")).to_have_value("step >")


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_long_names_and_notes_stay_within_the_page(browser: Browser, site: Site, size: dict[str, int]) -> None:
    long = "a-name-that-was-made-from-a-configuration-" + "0123456789abcdef" * 3
    folder = tiny.write_adapter(site.server.home / "long", base="tiny-llama", seed=5)
    metrics = (Metric(name=f"metric_{'x' * 60}", value=-1.5e-17, step=123_456_789),)
    said = Registration(adapter=f"{long}/{long}", run="r" * 90, step=123_456_789, metrics=metrics)
    found = site.direct.register(str(folder), said).registered[0].checkpoint
    site.direct.note(found, "x" * 2000)
    site.direct.tag(found, {f"tag{number}": "v" * 60 for number in range(8)})
    site.direct.set_alias(found, "b" * 60)
    site.direct.ship(found, long, "note " * 60)
    with visiting(browser, site, viewport=size) as context:
        page = context.new_page()
        sign_in(page, site)
        name = f"{long}/{long}"
        wide = []
        for path in (
            "/",
            f"/checkpoints/{name}",
            f"/adapters/{name}",
            f"/compare?ref={name}&ref=support-bot@v9",
            f"/merge?ref={name}&look=yes",
            "/shipped",
            f"/shipped/ship?ref={name}&environment=production",
            "/checkpoints",
            f"/checkpoints?where=tag.tag1 = '{'v' * 60}' and step = {'1' * 60} and",
        ):
            page.goto(path)
            drawn(page)
            if page.evaluate("document.documentElement.scrollWidth > innerWidth + 1"):
                wide.append(path)
    assert wide == []
