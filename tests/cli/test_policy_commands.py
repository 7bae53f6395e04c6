"""`ckpt policy`, `select`, `ship --override` and `keep`, as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from commands import Ckpt

POLICY = "eval_loss min, accuracy >= 0.8, patience 1, gate production"
VALUES = {10: (0.5, 0.85), 20: (0.3, 0.7), 30: (0.6, 0.9)}


@pytest.fixture
def bot(ckpt: Ckpt, tmp_path: Path) -> Ckpt:
    """Three checkpoints of `bot`: the best is not accurate enough."""
    base = tiny.write_base(tmp_path / "base")
    for step, (loss, accuracy) in VALUES.items():
        place = tiny.write_adapter(tmp_path / f"bot/checkpoint-{step}", base=base, seed=step)
        assert ckpt("register", str(place), "--adapter", "bot", "--run", "first").code == 0
        assert ckpt("metric", "add", "bot", f"eval_loss={loss}", f"accuracy={accuracy}").code == 0
    return ckpt


def test_a_policy_is_set_shown_and_taken_away(bot: Ckpt) -> None:
    assert "no policy yet" in bot("policy", "list").err
    assert bot("policy", "set", "bot", POLICY).out == "set the policy of bot\n"
    assert bot("policy", "show", "bot").out == f"{POLICY}\n"
    assert bot("policy", "list").out == f"bot: {POLICY}\n"
    assert bot("policy", "show", "bot", "--json").json["text"] == POLICY
    assert "before: eval_loss" in bot("policy", "set", "bot", "loss min").out
    assert bot("policy", "rm", "bot").out == "removed the policy of bot: loss min\n"
    odd = '"score [a]" min'
    bot("policy", "set", "bot", odd)
    assert bot("policy", "show", "bot").out == f"{odd}\n"
    assert bot("policy", "rm", "bot").out == f"removed the policy of bot: {odd}\n"
    missing = bot("policy", "show", "bot")
    assert missing.code == 3
    assert "has no policy" in missing.err
    wrong = bot("policy", "set", "bot", "eval_loss least")
    assert wrong.code == 2
    assert "METRIC min" in wrong.err


def test_select_says_which_and_why(bot: Ckpt) -> None:
    bot("policy", "set", "bot", POLICY)
    found = bot("select", "bot", "--alias", "candidate")
    assert found.code == 0
    assert found.out.startswith("bot@v1  eval_loss 0.50000\n")
    assert "bot@v2" in found.out
    assert "accuracy >= 0.8 is wanted, accuracy is 0.7" in found.out
    assert "first: 1 later checkpoint no better than bot@v2: it may stop" in found.err
    assert bot("show", "bot@candidate", "--json").json["ref"] == "bot@v1"
    assert bot("select", "bot", "--policy", "accuracy max", "--json").json["judged"][0]["checkpoint"]["version"] == 3
    none = bot("select", "bot", "--policy", "eval_loss min, accuracy > 1", "--alias", "candidate")
    assert none.code == 4
    assert "all 3 fail" in none.err
    assert bot("show", "bot@candidate", "--json").json["ref"] == "bot@v1"


def test_ship_is_refused_by_the_policy_unless_a_reason_is_given(bot: Ckpt) -> None:
    bot("policy", "set", "bot", POLICY)
    refused = bot("ship", "bot@v2", "--to", "production")
    assert refused.code == 4
    assert "accuracy is 0.7" in refused.err
    assert "--override" in refused.err
    assert bot("ship", "bot@v2", "--to", "production", "--override", "hotfix").code == 0
    assert "against the policy: hotfix" in bot("shipped").out


def test_keep_shows_first_and_removes_when_told(bot: Ckpt) -> None:
    shown = bot("keep", "bot", "best 1 eval_loss, last 1")
    assert shown.code == 0
    assert "would go" in shown.out
    assert "--yes removes them" in shown.err
    assert len(bot("list", "--json").json) == 3
    done = bot("keep", "bot", "best 1 eval_loss, last 1", "--yes", "--json").json
    assert [each["version"] for each in done["removed"]] == [1]
    assert len(bot("list", "--json").json) == 2
    assert "nothing is to be removed" in bot("keep", "bot", "last 2").err
    assert bot("keep", "bot", "").code == 2


def test_select_says_what_keeps_it_from_choosing(bot: Ckpt) -> None:
    none = bot("select", "bot", "--policy", "eval_loss min, accuracy > 1")
    assert none.code == 4
    assert "no checkpoint of bot meets every condition" in none.err
    assert "--override" not in none.err
    unknown = bot("select", "bot", "--policy", "evall_loss min")
    assert unknown.code == 3
    assert "there are eval_loss" in unknown.err
