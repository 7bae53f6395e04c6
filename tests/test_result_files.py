"""Results of other tools: what lm-evaluation-harness, MLflow and Weights & Biases leave, as they leave it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.errors import InvalidInput, PathNotFound
from registry.result_files import Source, read_results

LM_EVAL = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag",
            "acc,none": 0.4521,
            "acc_stderr,none": 0.0049,
            "acc_norm,none": 0.61,
            "acc_norm_stderr,none": 0.0048,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.21,
            "exact_match_stderr,strict-match": "N/A",
            "exact_match,flexible-extract": 0.25,
        },
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 11.5},
    },
    "configs": {},
    "versions": {"hellaswag": 1.0},
    "n-shot": {"hellaswag": 0},
    "higher_is_better": {
        "hellaswag": {"acc": True, "acc_norm": True},
        "gsm8k": {"exact_match": True},
        "wikitext": {"word_perplexity": False},
    },
}
MLFLOW = {
    "info": {"run_id": "a1", "status": "FINISHED"},
    "data": {"metrics": {"eval_loss": 0.52, "accuracy": 0.8}, "params": {"lr": "1e-4"}, "tags": {}},
}
MLFLOW_API = {
    "run": {"info": {}, "data": {"metrics": [{"key": "eval_loss", "value": 0.5, "timestamp": 1, "step": 40}]}}
}
WANDB = {
    "_step": 120,
    "_runtime": 31.5,
    "_timestamp": 1.7e9,
    "_wandb": {"runtime": 31},
    "eval/loss": 0.61,
    "train/epoch": 2,
    "eval": {"f1": "NaN"},
    "note": "fine",
}


def found(path: Path, source: Source | None = None) -> dict[str, float]:
    return {metric.name: metric.value for metric in read_results(path, source)}


def written(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_lm_evaluation_harness(tmp_path: Path) -> None:
    path = written(tmp_path / "results.json", LM_EVAL)
    assert (
        found(path)
        == found(path, "lm-eval")
        == {
            "hellaswag/acc": 0.4521,
            "hellaswag/acc_stderr": 0.0049,
            "hellaswag/acc_norm": 0.61,
            "hellaswag/acc_norm_stderr": 0.0048,
            "gsm8k/exact_match/strict-match": 0.21,
            "gsm8k/exact_match/flexible-extract": 0.25,
            "wikitext/word_perplexity": 11.5,
        }
    )
    directions = {metric.name: metric.direction for metric in read_results(path)}
    assert directions["hellaswag/acc"] == directions["gsm8k/exact_match/strict-match"] == "higher"
    assert directions["wikitext/word_perplexity"] == "lower"
    assert directions["hellaswag/acc_stderr"] is None


def test_mlflow(tmp_path: Path) -> None:
    assert found(written(tmp_path / "run.json", MLFLOW)) == {"eval_loss": 0.52, "accuracy": 0.8}
    (metric,) = read_results(written(tmp_path / "api.json", MLFLOW_API))
    assert (metric.name, metric.value, metric.step) == ("eval_loss", 0.5, 40)
    folder = tmp_path / "run"
    (folder / "metrics/eval").mkdir(parents=True)
    written(folder / "metrics/loss", "1700000000000 0.9 0\n1700000001000 0.4 10\n")
    written(folder / "metrics/eval/f1", "1700000000000 0.7\n")
    assert {(each.name, each.value, each.step) for each in read_results(folder)} == {
        ("loss", 0.4, 10),
        ("eval/f1", 0.7, None),
    }


def test_weights_and_biases(tmp_path: Path) -> None:
    summary = read_results(written(tmp_path / "wandb-summary.json", WANDB))
    assert {(each.name, each.step) for each in summary} == {("eval/loss", 120), ("train/epoch", 120), ("eval/f1", 120)}
    history = '{"_step": 1, "loss": 2.0}\n{"_step": 2, "loss": 1.0}\n'
    (last,) = read_results(written(tmp_path / "history.jsonl", history))
    assert (last.value, last.step) == (1.0, 2)
    table = '"Step","lr-1e-4 - eval/loss","lr-1e-4 - eval/loss__MIN"\n"10","0.5","0.5"\n"20","0.4","0.4"\n'
    (metric,) = read_results(written(tmp_path / "chart.csv", table))
    assert (metric.name, metric.value, metric.step) == ("eval/loss", 0.4, 20)


def test_plain_numbers(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.json", {"f1": 0.5, "sets": {"hard": {"f1": 0.25}}, "ok": True, "why": "because", "_private": 1}
    )
    assert found(path) == {"f1": 0.5, "sets/hard/f1": 0.25}


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("{", None),
        ("[]", None),
        ("3", None),
        ('{"a": "b"}', None),
        ('{"results": 1}', "lm-eval"),
        ('{"data": {}}', "mlflow"),
        ('{"run": 3}', "mlflow"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, source: Source | None) -> None:
    with pytest.raises(InvalidInput):
        read_results(written(tmp_path / "odd.json", text), source)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PathNotFound):
        read_results(tmp_path / "nowhere.json")
    (tmp_path / "metrics").mkdir()
    written(tmp_path / "metrics/loss", "not a metric\n")
    with pytest.raises(InvalidInput, match="time, value and step"):
        read_results(tmp_path)


def test_what_the_harness_says_about_a_task_is_no_metric_and_other_samples_are_other_data(tmp_path: Path) -> None:
    """As lm_eval 0.4.13 writes it."""
    task = {"name": "arc", "alias": "arc", "sample_len": 2, "acc,none": 0.5}
    document = {"results": {"arc": task}, "versions": {"arc": 1.0}, "n-shot": {"arc": 0}, "configs": {}}
    data = set()
    for effective in (2, 100):
        samples = {"n-samples": {"arc": {"original": 100, "effective": effective}}}
        (metric,) = read_results(written(tmp_path / "results.json", document | samples))
        assert metric.name == "arc/acc"
        data.add(metric.data)
    assert len(data) == 2


def test_what_a_run_has_measured_later_is_not_of_a_checkpoint(tmp_path: Path) -> None:
    rows = [{"_step": place, "train/global_step": 20 * place, "eval/loss": 1 / place} for place in (1, 2, 3)]
    history = written(tmp_path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (metric,) = read_results(history, step=40)
    assert (metric.name, metric.value, metric.step) == ("eval/loss", 0.5, 40)
    (last,) = read_results(history)
    assert last.step == 60
    (folder := tmp_path / "run/metrics").mkdir(parents=True)
    written(folder / "loss", "1700000000000 0.9 20\n1700000001000 0.4 40\n1700000002000 0.3 60\n")
    assert [each.value for each in read_results(tmp_path / "run", step=50)] == [0.4]


def test_a_table_of_several_runs_is_refused(tmp_path: Path) -> None:
    table = '"Step","one - loss","one - loss__MIN","two - loss"\n"10","0.5","0.5","0.7"\n'
    with pytest.raises(InvalidInput, match="export one run"):
        read_results(written(tmp_path / "chart.csv", table))
