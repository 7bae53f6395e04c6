"""Checkpoints side by side."""

from __future__ import annotations

import re
from pathlib import Path

import tiny
from visiting import Site

from registry.manifest import Metric
from registry.registering import Registration

TWO = "/compare?ref=support-bot@v9&ref=support-bot@v5"


def rows(page: str, caption: str) -> dict[str, list[str]]:
    """The rows of the table with a caption, as text by their heads."""
    table = next(each for each in re.findall(r"<table.*?</table>", page, re.DOTALL) if caption in each)
    found = {}
    for row in re.findall(r"<tr.*?</tr>", table.partition("<tbody>")[2], re.DOTALL):
        head = re.sub(r"<[^>]*>", "", re.findall(r"<th.*?</th>", row, re.DOTALL)[0]).split()
        cells = [
            re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip()
            for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)
        ]
        found[head[0]] = cells
    return found


def test_metrics_stand_side_by_side_with_the_best_marked_and_differences_to_the_first(site: Site) -> None:
    page = site.visitor("reader").get(TWO).text
    found = rows(page, "Metrics side by side")
    assert found["eval_loss"] == ["0.62601 ★ best", "0.63318 +0.00717"]
    assert found["loss"] == ["0.74999", "0.67596 ★ best -0.07403"]
    assert re.search(r'class="small bad">\+0.00717', page)
    assert re.search(r'class="small good">-0.07403', page)


def test_values_on_different_data_are_not_called_better_or_worse(site: Site) -> None:
    for ref, value, data in (("support-bot@v9", 0.9, "a" * 64), ("support-bot@v5", 0.7, "b" * 64)):
        found = site.direct.resolve(ref)
        site.direct.add_metrics(found, [Metric(name="bleu", value=value, direction="higher", data=data)])
    page = site.visitor("reader").get(TWO).text
    assert rows(page, "Metrics side by side")["bleu"] == ["0.9", "0.7"]
    assert "measured on different data" in page


def test_only_what_differs_is_shown_until_all_is_asked_for(site: Site) -> None:
    client = site.visitor("reader")
    some, everything = (rows(client.get(url).text, "Configuration side by side") for url in (TWO, f"{TWO}&all=1"))
    assert some["run"] == ["lr-3e-4", "lr-1e-4"]
    assert "rank" not in some
    assert everything["rank"] == ["4", "4"]
    assert some.keys() < everything.keys()
    other = rows(client.get("/compare?ref=support-bot@v9&ref=nlu/intent@v1").text, "Configuration side by side")
    assert other["rank"] == ["4", "8"]


def test_checkpoints_are_added_and_dropped_in_the_address(site: Site) -> None:
    client = site.visitor("reader")
    dropped = client.get(f"{TWO}&metric=loss&drop=support-bot@v5")
    assert dropped.headers["location"] == "/compare?ref=support-bot%40v9&metric=loss"
    assert "One more" in client.get("/compare?ref=support-bot@v9").text
    assert "Choose two to five" in client.get("/compare").text
    assert client.get("/compare?" + "&".join(f"ref=support-bot@v{number}" for number in range(1, 7))).status_code == 400
    assert client.get(f"{TWO}&ref=none@v1").status_code == 404
    assert "One more" in client.get("/compare?ref=support-bot@v9&ref=support-bot@candidate").text  # the same twice


def test_curves_of_all_runs_lie_together(site: Site) -> None:
    page = site.visitor("reader").get(f"{TWO}&ref=nlu/intent@v6").text
    assert page.count('"chosen"') == 3
    assert "support-bot lr-3e-4" in page
    assert "nlu/intent first" in page


def test_cosines_are_those_that_diff_finds(site: Site) -> None:
    client = site.visitor("reader")
    part = client.get("/compare/cosine?ref=support-bot@v9&ref=support-bot@v5&ref=support-mix@v1").text
    difference = site.direct.diff(site.direct.resolve("support-bot@v9"), site.direct.resolve("support-bot@v5"))
    assert f"cosine {difference.weights[0].cosine:.3f}" in part
    assert part.count('class="cell"') == 6
    # half of each: 45 degrees from both, about
    mixed = [float(each) for each in re.findall(r'aria-label="[^"]*weight by weight"[^>]*>(-?[\d.]+)<', part)]
    assert all(0.5 < each < 0.9 for each in (mixed[1], mixed[3]))
    other = client.get("/compare/cosine?ref=support-bot@v9&ref=support-bot@v5&ref=support-mix@v1&pair=2").text
    assert "support-bot@v5 and support-mix@v1, weight by weight" in re.sub(r"\s+", " ", other)
    assert client.get("/compare/cosine?ref=support-bot@v9").status_code == 400
    assert client.get("/compare/cosine?ref=support-bot@v9&ref=support-bot@v5&pair=1").status_code == 400


def test_what_is_no_low_rank_change_is_compared_too(site: Site) -> None:
    part = site.visitor("reader").get("/compare/cosine?ref=vision/caption@v1&ref=support-bot@v1")
    assert part.status_code == 200
    assert part.text.count('class="d') >= 4


def test_on_other_bases_only_facts_and_metrics_are_compared(site: Site, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "other-base", seed=5)
    folder = tiny.write_adapter(tmp_path / "stray", base=base)
    site.direct.register(str(folder), Registration(base=str(base), adapter="stray"))
    client = site.visitor("reader")
    page = client.get("/compare?ref=support-bot@v9&ref=stray").text
    assert "They are on different base models (tiny-llama, other-base)" in page
    assert "/compare/cosine" not in page
    assert client.get("/compare/cosine?ref=support-bot@v9&ref=stray").status_code == 409


def test_nobody_compares_what_they_may_not_see(site: Site) -> None:
    outsider = site.visitor("nlu")
    assert outsider.get("/compare?ref=nlu/intent@v1&ref=support-bot@v9").status_code == 404
    assert outsider.get("/compare/cosine?ref=nlu/intent@v1&ref=support-bot@v9").status_code == 404
