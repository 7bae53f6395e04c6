"""The main job on the example's real run, as a user would do it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import EXAMPLE, Ckpt


def test_register_says_what_it_did_and_again_changes_nothing(ckpt: Ckpt, run_folder: Path) -> None:
    first, again = ckpt("register", str(run_folder)), ckpt("register", str(run_folder))
    assert [line.split()[1] for line in first.out.splitlines()] == [f"support-bot@v{n}" for n in range(1, 7)]
    assert "step 40, base tiny-llama" in first.out.splitlines()[0]
    assert all(line.startswith("known already as support-bot@v") for line in again.out.splitlines())
    assert len(ckpt("list", "--json").json) == 6


def test_register_takes_what_is_said(ckpt: Ckpt, run_folder: Path) -> None:
    result = ckpt(
        "register", str(run_folder / "checkpoint-80"), "--adapter", "team/bot", "--base", "tiny-llama", "--run", "first",
        "--step", "81", "--metric", "mt_bench_score=7.5", "--metric", "eval_loss=0.5", "--note", "good", "--tag", "team=nlu",
        "--arch-version", "llama-3", "--json",
    )  # fmt: skip
    found = result.json[0]
    assert (found["ref"], found["run"], found["step"], found["arch_version"]) == ("team/bot@v1", "first", 81, "llama-3")
    metrics = {metric["name"]: metric["value"] for metric in found["metrics"]}
    assert (metrics["mt_bench_score"], metrics["eval_loss"]) == (7.5, 0.5)
    assert found["tags"] == {"team": "nlu"}
    assert found["notes"][0]["text"] == "good"
    assert found["notes"][0]["author"] == "ada"


def test_best_is_not_the_last(registered: Ckpt) -> None:
    result = registered("list", "--best")
    assert "support-bot@v4" in result.out
    assert "support-bot@v6" not in result.out
    assert "by eval_loss, lower is better" in result.err
    assert registered("list", "support-bot", "--best", "loss", "--json").json[0]["ref"] == "support-bot@v6"
    assert registered("list", "--best", "loss", "--max", "--json").json[0]["ref"] == "support-bot@v1"


def test_list_marks_the_best_and_counts_those_without(registered: Ckpt) -> None:
    registered("metric", "add", "support-bot@v2", "bleu=0.31")
    listing = registered("list").out
    assert next(line for line in listing.splitlines() if "★" in line).startswith("support-bot@v4")
    result = registered("list", "--best", "bleu")
    assert "5 of 6 left out: no finite bleu" in result.err
    assert "support-bot@v2" in result.out


def test_filter_sort_limit_top_per(registered: Ckpt) -> None:
    def refs(*words: str) -> list[str]:
        return [each["ref"][-2:] for each in registered("list", *words, "--json").json]

    assert refs("--where", "step >= 160 and metric.eval_loss < 0.7") == ["v4", "v6"]
    assert refs("--sort", "-metric.eval_loss", "--limit", "2") == ["v6", "v4"]
    assert refs("--best", "--top", "3") == ["v4", "v6", "v5"]
    assert refs("--best", "--per", "run") == ["v4"]
    assert refs("--where", "step > 1000") == []


def test_annotate_and_show(registered: Ckpt) -> None:
    assert registered("note", "support-bot@v4", "right tone [bold]really[/bold]").code == 0
    assert registered("tag", "support-bot@v4", "team=nlu", "stage=rc").code == 0
    assert registered("tag", "support-bot@v4", "--remove", "stage").code == 0
    assert registered("metric", "add", "support-bot@v4", "human_preference=0.8", "--max", "--step", "160").code == 0
    assert registered("alias", "set", "support-bot@best", "candidate").out.startswith(
        "support-bot@candidate is support-bot@v4"
    )
    moved = registered("alias", "set", "support-bot@v5", "candidate").out
    assert "before support-bot@v4" in moved
    shown = registered("show", "support-bot@v4")
    for text in (
        "right tone [bold]really[/bold]",
        "team=nlu",
        "human_preference",
        "by names and shapes",
        "support-bot@v3",
    ):
        assert text in shown.out
    assert "stage" not in shown.out
    assert registered("alias", "rm", "support-bot@candidate").code == 0
    assert registered("show", "support-bot@candidate").code == 3
    actions = [event["action"] for event in registered("history", "support-bot", "--json").json]
    assert actions == ["register"] * 6 + ["note", "tag", "tag", "metric", "alias.set", "alias.set", "alias.remove"]


def test_check_merge_verify_ship(registered: Ckpt, tmp_path: Path) -> None:
    report = registered("check", "support-bot@best", "--json")
    assert (report.code, report.json["verdict"]) == (0, "pass")
    plan = registered("merge", "support-bot@best", "--dry-run", "--json").json
    result = registered("merge", "support-bot@best", "--out", "merged", "--json").json
    assert result["created"] is True
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "merged").iterdir()}
    assert all(sizes[file["path"]] == file["size_bytes"] for file in plan["files"])
    assert len(result["tensors"]) == 14
    check = [sys.executable, EXAMPLE.parent / "verify.py", "tiny-llama", "support-bot/checkpoint-160", "merged"]
    said = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.startswith("14 tensors are base + 2 · B·A")
    assert registered("merge", "support-bot@best", "--out", "merged").out.startswith("merged before")
    assert registered("ship", result["digest"][7:17], "--to", "production", "--note", "rc1").code == 0
    live = registered("shipped", "production", "--json").json[0]
    assert (live["checkpoint"], live["merged"], live["note"]) == ("support-bot@v4", result["digest"], "rc1")
    assert "merged" in registered("shipped").out


def test_merge_into_the_store_and_pull(registered: Ckpt, tmp_path: Path) -> None:
    merged = registered("merge", "support-bot@v4", "--json").json
    assert merged["location"] is None
    assert registered("merge", "support-bot@v4", "--out", "direct").code == 0
    assert registered("pull", merged["digest"], "pulled").code == 0
    for name in ("model.safetensors", "merge.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "pulled" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    shown = registered("show", merged["digest"][7:20])
    assert "support-bot@v4 and tiny-llama" in shown.out
    provenance = json.loads((tmp_path / "direct" / "merge.json").read_text())
    assert provenance["recipe_digest"] == merged["recipe_digest"]


def test_pull_gives_the_exact_files_back(registered: Ckpt, run_folder: Path, tmp_path: Path) -> None:
    assert registered("pull", "support-bot@step:120", "resume").code == 0
    source = run_folder / "checkpoint-120"
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "resume").iterdir()}
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "resume" / path.name).read_bytes()


def test_rollback_and_history_of_shipments(registered: Ckpt) -> None:
    for version in ("v1", "v2", "v3"):
        assert registered("ship", f"support-bot@{version}", "--to", "production").code == 0
    assert registered("rollback", "production").out == "production is back on support-bot@v2, before support-bot@v3\n"
    assert registered("rollback", "production").out == "production is back on support-bot@v1, before support-bot@v2\n"
    assert registered("rollback", "production").code == 5
    history = registered("shipped", "--history", "--json").json
    assert [each["checkpoint"][-2:] for each in history] == ["v1", "v2", "v3", "v2", "v1"]
    assert [each["restores"] for each in history] == [None, None, None, 2, 1]
    assert registered("show", "support-bot@production", "--json").json["ref"] == "support-bot@v1"
    assert registered("shipped", "--at", "2020-01-01").err.count("nothing was live then") == 1
    assert len(registered("shipped", "--at", "today", "--json").json) == 1


def test_base_commands(ckpt: Ckpt, run_folder: Path) -> None:
    added = ckpt("base", "add", "tiny-llama", "--name", "tiny", "--json").json
    assert added["created"] is True
    assert "known already as tiny" in ckpt("base", "add", str(run_folder.parent / "tiny-llama")).out
    assert "llama" in ckpt("base", "list").out
    assert len(ckpt("base", "show", "tiny", "--json").json["tensors"]) == 21
    assert ckpt("base", "verify", "tiny").out.startswith("intact")
    assert ckpt("base", "show", added["fingerprint"]["weights"][7:15]).code == 0


def test_rm_and_gc(registered: Ckpt) -> None:
    assert registered("rm", "support-bot@v1").code == 2  # nobody to ask
    assert registered("rm", "support-bot@v1", "--yes").code == 0
    assert "removed 0 files" in registered("gc").out  # young ones are spared
    assert registered("gc", "--grace", "0min", "--dry-run").out.startswith("would remove 2 files")
    assert registered("gc", "--grace", "0min").out.startswith("removed 2 files")
    assert registered("check", "support-bot@v2").code == 0
    assert registered("show", "support-bot@v1").code == 3


def test_db_upgrade(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("db", "upgrade").out == "the database is up to date\n"
    assert (tmp_path / "home" / "ckpt.db").is_file()
    assert ckpt("db", "upgrade").code == 0


@pytest.mark.parametrize("words", [(), ("base",), ("alias",), ("metric",), ("db",)])
def test_no_command_shows_help(ckpt: Ckpt, words: tuple[str, ...]) -> None:
    result = ckpt(*words)
    assert "Usage: ckpt" in result.out + result.err


def test_version(ckpt: Ckpt) -> None:
    assert ckpt("--version").out.startswith("ckpt-registry ")
