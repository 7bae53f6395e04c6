"""Reports: what they tell, that nobody's words are taken for markup, and that a page needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import populated
import pytest
import tiny

from registry.curves import Point
from registry.errors import InvalidInput, InvalidReference, UnknownAdapter
from registry.manifest import Metric
from registry.registering import Registration
from registry.report_forms import _thinned, to_html, to_markdown
from registry.reporting import Curves, Document, Sentence, Table, report
from registry.resuming import resume
from registry.service import Registry

AT = datetime(2026, 5, 3, 12, 0, tzinfo=UTC)
EVIL = '<script>alert(1)</script> | "quotes" & `ticks` ``` *stars* [x](javascript:1)'
POLICY = "eval_loss min, loss <= 0.9, patience 2"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with something of everything; nothing in it is changed by these tests."""
    folder = tmp_path_factory.mktemp("team")
    with tiny.open_registry(folder / "home") as registry:
        populated.populate(registry, folder / "files")
        yield registry


def table_of(document: Document, title: str, number: int = 0) -> Table:
    (section,) = [each for each in document.sections if each.title == title]
    return [part for part in section.parts if isinstance(part, Table)][number]


def said(document: Document, title: str) -> str:
    (section,) = [each for each in document.sections if each.title == title]
    return "\n".join(part.text for part in section.parts if isinstance(part, Sentence))


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_policy_recommends_and_says_why(team: Registry) -> None:
    found = report(team, "support-bot", POLICY, at=AT)
    chosen = team.select("support-bot", POLICY).chosen
    assert chosen is not None
    assert f"{chosen.checkpoint.ref} has the lowest eval_loss of those with loss <= 0.9" in said(
        found, "Recommendation"
    )
    assert found.about == "12 checkpoints of 2 runs, made 2026-05-03 12:00 UTC by ada"
    table = table_of(found, "Candidates")
    assert table.rows[table.strong[0]][1] == chosen.checkpoint.ref
    assert [row[1] for row in table.rows] == [each.checkpoint.ref for each in team.select("support-bot", POLICY).judged]
    assert any("not loss <= 0.9: " in row[-1] for row in table.rows)
    assert "it may stop" in said(found, "Recommendation")
    assert [section.title for section in found.sections] == [
        "Recommendation",
        "Curves",
        "Candidates",
        "Compared with what is live",
        "Evidence",
        "Lineage",
        "Shipments",
        "Compatibility",
    ]


def test_the_best_is_compared_with_what_is_live(team: Registry) -> None:
    found = report(team, "support-bot", "loss min")
    live = next(each.checkpoint for each in team.shipped("production") if each.checkpoint.startswith("support-bot@"))
    assert f"against {live}, which is live in production and staging" in said(found, "Compared with what is live")
    changes = {row[0]: row[3] for row in table_of(found, "Compared with what is live").rows}
    assert changes["loss"].endswith("better")
    assert changes["eval_loss"].endswith("worse")
    weights = table_of(found, "Compared with what is live", 2)
    assert weights.head == ("weight", "distance", "cosine")
    same = report(team, "support-bot", "eval_loss min")
    assert "is live in production and staging already" in said(same, "Compared with what is live")


def test_without_a_policy_the_shared_metric_ranks(team: Registry) -> None:
    assert "as there is no policy" in said(report(team, "nlu/intent"), "Recommendation")


def test_where_nothing_is_good_enough_that_is_said(team: Registry) -> None:
    found = report(team, "support-bot", "eval_loss min, accuracy >= 2")
    assert "No checkpoint meets every condition" in said(found, "Recommendation")
    assert not table_of(found, "Candidates").strong


def test_an_adapter_of_which_little_is_known(ckpt: Registry, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "bare", base=tiny.write_base(tmp_path / "base"))
    ckpt.register(str(tmp_path / "bare"))
    found = report(ckpt, "bare")
    assert "Nothing can be recommended" in said(found, "Recommendation")
    assert "Nothing of this adapter was ever shipped." in said(found, "Shipments")
    assert "`ckpt try bare@v1` does" in said(found, "Evidence")
    assert not {"Curves", "Candidates"} & {section.title for section in found.sections}
    assert Tags(to_html(found)).open == []
    assert to_markdown(found).startswith("# Report on bare\n")


def test_what_was_resumed_and_combined_has_its_lineage(team: Registry, tmp_path: Path) -> None:
    mixed = table_of(report(team, "support-mix"), "Lineage").rows
    parents = [row[1] for row in mixed if "made by combine of" in row[0]]
    assert len(parents) == 2
    with tiny.open_registry(tmp_path / "home") as ckpt:
        base = tiny.write_base(tmp_path / "base")
        tiny.write_adapter(tmp_path / "bot/checkpoint-5", base=base)
        ckpt.register(str(tmp_path / "bot"))
        resume(ckpt, ckpt.resolve("bot"), tmp_path / "again", weights_only=True)
        tiny.write_adapter(tmp_path / "again/checkpoint-9", base=base, seed=4)
        ckpt.register(str(tmp_path / "again"))
        rows = table_of(report(ckpt, "bot"), "Lineage").rows
    assert ("bot@v2 made by resume of", "bot@v1", "") in rows


def test_no_word_is_taken_for_markup(ckpt: Registry, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "bot/checkpoint-5", base=tiny.write_base(tmp_path / "base"))
    metric = Metric(name=EVIL, value=0.5, direction="lower")
    words = Registration(
        note=f"{EVIL}\n```\n{EVIL}", metrics=(metric,), arch_version="", tags={"tag": EVIL}, source=EVIL
    )
    checkpoint = ckpt.register(str(tmp_path / "bot/checkpoint-5"), words).registered[0].checkpoint
    ckpt.ship(checkpoint, "production", EVIL)
    found = report(ckpt, "bot")
    page = to_html(found)
    tags = Tags(page)
    assert not tags.open
    assert "script" not in {tag for tag, _ in tags.found}
    assert tags.words.count("<script>alert(1)</script>") >= 6
    text = to_markdown(found)
    fence, *_ = re.findall("^`{3,}", text, re.MULTILINE)
    outside = "".join(text.split(fence)[::2])
    assert "<script>" not in outside
    assert "[x](" not in outside
    assert len(fence) == 4
    widths = {line.replace("\\|", "").count("|") for line in outside.splitlines() if line.startswith("| 1 |")}
    assert widths == {7 + 1}


def test_a_page_needs_nothing_else(team: Registry) -> None:
    page = to_html(report(team, "support-bot", POLICY))
    assert "url(" not in page
    for tag, attributes in Tags(page).found:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]


def test_both_forms_tell_the_same(team: Registry) -> None:
    found = report(team, "support-bot", POLICY, at=AT)
    assert to_html(found) == to_html(report(team, "support-bot", POLICY, at=AT))
    words, text = Tags(to_html(found)).words, to_markdown(found).replace("\\", "")
    for section in found.sections:
        for part in section.parts:
            if isinstance(part, Table):
                for cell in (cell for row in part.rows for cell in row):
                    assert cell in words
                    assert " ".join(cell.split()).replace("<", "&lt;").replace(">", "&gt;") in text


def test_what_cannot_be_asked_for(team: Registry, ckpt: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapter):
        report(team, "nobody")
    with pytest.raises(InvalidReference):
        report(team, "")
    with pytest.raises(InvalidInput):
        report(team, "support-bot", "as good as can be")
    base = tiny.write_base(tmp_path / "base")
    for seed, data in ((1, "a" * 64), (2, "b" * 64)):
        metric = Metric(name="eval_loss", value=0.5, data=data)
        ckpt.register(
            str(tiny.write_adapter(tmp_path / f"bot{seed}", base=base, seed=seed)),
            Registration(adapter="bot", metrics=(metric,)),
        )
    mixed = report(ckpt, "bot")
    assert "measured on different data" in said(mixed, "Recommendation")
    assert "No curve: eval_loss was measured on different data" in said(mixed, "Curves")
    assert "Nothing can be recommended" in said(report(ckpt, "bot", "eval_loss min"), "Recommendation")


def test_long_lines_are_thinned_and_keep_their_peaks() -> None:
    points = [Point(x=x, value=float(x % 7), ref=f"bot@v{x}", run="r") for x in range(1000)]
    points[501] = Point(x=501, value=99.0, ref="bot@v501", run="r")
    found = _thinned(points, 100)
    assert len(found) <= 102
    assert points[501] in found
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert [point.x for point in found] == sorted(point.x for point in found)
    assert _thinned(points[:50], 100) == points[:50]


def measured(registry: Registry, folder: Path) -> None:
    """Two checkpoints of `bot`, the first live; `try/agreement` of the second alone, `hard/loss` of each on data of its own."""
    base = tiny.write_base(folder / "base")
    for step, loss in ((10, 0.5), (20, 0.4)):
        tiny.write_adapter(folder / f"bot/checkpoint-{step}", base=base, seed=step)
        found = registry.register(str(folder / f"bot/checkpoint-{step}")).registered[0].checkpoint
        hard = Metric(name="hard/loss", value=loss, data=f"{step:064}")
        registry.add_metrics(found, [Metric(name="eval_loss", value=loss), hard])
    registry.add_metrics(registry.resolve("bot@v2"), [Metric(name="try/agreement", value=1.0, direction="higher")])
    registry.ship(registry.resolve("bot@v1"), "production")


def test_a_metric_that_was_measured_once_tells_no_course(ckpt: Registry, tmp_path: Path) -> None:
    measured(ckpt, tmp_path)
    found = report(ckpt, "bot", "eval_loss min, try/agreement >= 0.5")
    drawn = [part for section in found.sections for part in section.parts if isinstance(part, Curves)]
    assert [each.chart.metric for each in drawn] == ["eval_loss"]


def test_numbers_of_other_data_are_not_called_better(ckpt: Registry, tmp_path: Path) -> None:
    measured(ckpt, tmp_path)
    found = report(ckpt, "bot", "eval_loss min")
    changes = {row[0]: row[3] for row in table_of(found, "Compared with what is live").rows}
    assert changes["hard/loss"] == "measured on other data"
    assert changes["eval_loss"].endswith("better")
