"""`ckpt list` shows a part of what there is, says so, and goes on from there."""

from __future__ import annotations

import re
from typing import Any


def refs(result: Any) -> list[str]:
    return [each["ref"][-2:] for each in result.json]


def cursor_of(result: Any) -> str:
    match = re.search(r"--cursor (\S+)", result.err)
    return match[1] if match else ""


def test_only_the_last_are_shown_and_the_rest_can_be_asked_for(registered: Any) -> None:
    result = registered("list", "--limit", "4", "--json")
    assert refs(result) == ["v3", "v4", "v5", "v6"]
    assert "only 4 of them: --limit N shows more" in result.err
    before = registered("list", "--limit", "4", "--json", "--cursor", cursor_of(result))
    assert refs(before) == ["v1", "v2"]
    assert before.err == ""


def test_so_it_is_with_an_order_of_ones_own(registered: Any) -> None:
    result = registered("list", "--sort", "-step", "--limit", "2", "--json")
    assert refs(result) == ["v2", "v1"]
    before = registered("list", "--sort", "-step", "--limit", "3", "--json", "--cursor", cursor_of(result))
    assert refs(before) == ["v5", "v4", "v3"]
    assert refs(registered("list", "--sort", "step", "--limit", "2", "--json")) == ["v5", "v6"]


def test_checkpoints_without_the_value_come_last(registered: Any) -> None:
    registered("metric", "add", "support-bot@v2", "bleu=0.3")
    registered("metric", "add", "support-bot@v4", "bleu=0.2")
    shown = refs(registered("list", "--sort", "metric.bleu", "--json"))
    assert shown[:2] == ["v4", "v2"]
    assert sorted(shown) == ["v1", "v2", "v3", "v4", "v5", "v6"]
    assert refs(registered("list", "--sort", "metric.bleu", "--limit", "2", "--json")) == ["v4", "v2"]


def test_best_is_cut_only_when_asked_to(registered: Any) -> None:
    assert len(refs(registered("list", "--best", "loss", "--top", "6", "--json"))) == 6
    assert len(refs(registered("list", "--best", "loss", "--top", "6", "--limit", "2", "--json"))) == 2


def test_nothing_to_rank_is_nothing_to_show(ckpt: Any, registered: Any) -> None:
    result = registered("list", "--best", "--where", "step > 10000", "--json")
    assert (result.code, result.json, "nothing matches" in result.err) == (0, [], True)
    result = registered("list", "--best", "support-bot")
    assert (result.code, "support-bot is an adapter: ckpt list support-bot --best" in result.err) == (3, True)


def test_a_wrong_cursor(registered: Any) -> None:
    result = registered("list", "--cursor", "zork")
    assert (result.code, "cursor" in result.err) == (2, True)
