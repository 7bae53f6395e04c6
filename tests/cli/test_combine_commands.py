"""`ckpt merge` of several, `combine`, `sweep`: from what is typed to what is printed, and how each is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import Ckpt


@pytest.fixture
def two(ckpt: Ckpt, tmp_path: Path) -> Ckpt:
    """A registry with `math` and `code`, and `bot`, a run of three steps, on one base."""
    base = tiny.write_base(tmp_path / "base")
    tiny.write_adapter(tmp_path / "math", base=base, seed=1)
    tiny.write_adapter(tmp_path / "code", base=base, seed=2)
    tiny.write_run(tmp_path / "bot", base=base, steps=(10, 20, 30))
    for name in ("math", "code", "bot"):
        assert ckpt("register", name).code == 0
    return ckpt


def test_several_checkpoints_are_merged_and_shown(two: Ckpt, tmp_path: Path) -> None:
    words = ("merge", "math", "code", "--method", "ties", "--weights", "0.5,0.25", "--density", "0.4")
    plan = two(*words, "--dry-run", "--json").json
    assert plan["recipe"]["options"] == {"density": 0.4, "lambda": 1.0}
    assert [each["weight"] for each in plan["recipe"]["inputs"]] == [0.5, 0.25]
    made = two(*words, "--out", "merged", "--json").json
    assert (made["created"], made["checkpoints"], made["recipe_digest"]) == (
        True,
        ["math@v1", "code@v1"],
        plan["recipe_digest"],
    )
    assert (tmp_path / "merged" / "merge.json").is_file()
    again = two(*words, "--out", "merged")
    assert again.out.startswith("merged before")
    assert "math@v1, code@v1 (ties: weights=[0.5, 0.25], density=0.4, lambda=1.0) and base" in " ".join(
        again.out.split()
    )
    assert two("show", "code", "--json").json["merged"][0]["digest"] == made["digest"]


def test_between_and_t_interpolate(two: Ckpt) -> None:
    one = two("merge", "--between", "math", "code", "--t", "0.3", "--json").json
    other = two("merge", "math", "code", "--method", "interpolate", "--t", "0.3", "--json").json
    assert other["created"] is False
    assert one["recipe"] == other["recipe"]
    assert (one["recipe"]["method"], one["recipe"]["options"]) == ("interpolate", {"t": 0.3})


def test_a_combined_adapter_is_registered_with_its_lineage(two: Ckpt) -> None:
    words = (
        "combine",
        "math",
        "code",
        "--weights",
        "0.7,0.3",
        "--as",
        "team/both",
        "--note",
        "try",
        "--tag",
        "team=nlu",
    )
    made = two(*words, "--json").json
    assert (made["ref"], made["created"], made["lost"], made["worst"]) == ("team/both@v1", True, 0.0, None)
    assert made["origin"]["parents"] == ["math@v1", "code@v1"]
    shown = " ".join(two("show", "team/both").out.split())
    assert "made by combine of math@v1, code@v1 (method=linear, shares=[0.7, 0.3], rank=8, lost=0.0)" in shown
    assert "made into team/both@v1" in " ".join(two("show", "math").out.split())
    assert two("show", "math", "--json").json["children"] == ["team/both@v1"]
    assert "known already" in two(*words).out
    assert two("check", "team/both").code == 0
    refused = two("rm", "math@v1", "--yes")
    assert (refused.code, "team/both@v1, which was made of it" in refused.err) == (5, True)


def test_averages_along_a_run(two: Ckpt) -> None:
    last = two("combine", "bot@run:1", "--average", "last:2", "--json").json
    assert last["origin"]["parents"] == ["bot@v2", "bot@v3"]
    assert (last["ref"], last["origin"]["detail"]["shares"]) == ("bot-average@v1", [0.5, 0.5])
    moving = two("combine", "bot@step:30", "--ema", "0.5", "--json").json
    assert moving["origin"]["detail"]["shares"] == [0.25, 0.25, 0.5]
    both = two("combine", "bot@run:bot", "--ema", "0.5", "--average", "last:2", "--as", "ema2", "--json").json
    assert both["origin"]["detail"]["shares"] == [0.5, 0.5]
    everything = two("combine", "bot", "--average", "all", "--rank", "2")
    assert "bot-average@v2" in everything.out
    assert "%, at worst" in everything.out


def test_a_sweep_makes_candidates_to_rank(two: Ckpt) -> None:
    made = two("sweep", "math", "code", "--t", "0:1:0.25", "--as", "both", "--json").json
    assert [(each["ref"], each["tags"]["t"]) for each in made] == [
        ("both@v1", "0"), ("both@v2", "0.25"), ("both@v3", "0.5"), ("both@v4", "0.75"), ("both@v5", "1"),
    ]  # fmt: skip
    for number, value in enumerate((0.1, 0.4, 0.3, 0.2, 0.1), start=1):
        assert two("metric", "add", f"both@v{number}", f"accuracy={value}").code == 0
    best = two("list", "both", "--best", "accuracy", "--json").json[0]
    assert best["tags"] == {"t": "0.25"}
    table = two("sweep", "--between", "math", "code", "--t", "0.2,0.8", "--method", "slerp").out
    assert "math-code-sweep@v1" in table
    assert "t=0.8" in table
    assert two("list", "--where", "tag.t = '0.25'", "--json").json[0]["ref"] == "both@v2"


REFUSALS = [
    ("merge", 2, "name the checkpoints"),
    ("merge math --between math code", 2, "name the checkpoints"),
    ("merge math code --method tise", 2, "tise"),
    ("merge math code --weights 1", 2, "expected one for each of 2 inputs"),
    ("merge math code --weights 1,x", 2, "expected a number"),
    ("merge math code --density 0.5", 2, "linear takes no options"),
    ("merge math nobody", 3, "nobody"),
    ("combine math code --method ties", 2, "which takes full rank"),
    ("combine math code --average last:2", 2, "name one checkpoint"),
    ("combine bot --average newest", 2, "expected last:N or all"),
    ("combine bot --average last:9", 2, "3 checkpoints"),
    ("combine math code --weights 0,0", 4, "would not change"),
    ("combine math code --as bad//name", 2, "bad//name"),
    ("sweep math code --t 0.5", 2, "several values"),
    ("sweep math code --t 0:1:0.5 --lambda 1,2", 2, "several values"),
    ("sweep math code --t 0:1:0", 2, "expected first:last:step"),
]


def test_what_cannot_be_done_is_said_with_its_exit_code_and_changes_nothing(two: Ckpt) -> None:
    before = two("list", "--json").json
    for words, code, said in REFUSALS:
        result = two(*words.split())
        assert (result.code, said in " ".join(result.err.split())) == (code, True), f"{words}: {result.err}"
    assert two("list", "--json").json == before


def test_other_bases_are_refused_by_name(two: Ckpt, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "other", base=tiny.write_base(tmp_path / "elsewhere", seed=5))
    assert two("register", "other").code == 0
    for command in ("merge", "combine"):
        result = two(command, "math", "other")
        assert result.code == 4
        assert "other@v1" in result.err
        assert "elsewhere" in result.err


def test_merged_folders_of_several_are_read_back_by_their_record(two: Ckpt, tmp_path: Path) -> None:
    assert two("merge", "math", "code", "--out", "merged").code == 0
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["shares"] == [0.5, 0.5]
    assert two("base", "add", "merged").code == 0
    result = two("check", "code", "--base", "merged")
    assert result.code == 4
    assert "merged_before" in result.out
