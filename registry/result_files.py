"""Numbers that other tools have measured: read out of the files they leave. Pure but for reading the file.

Read are lm-evaluation-harness results (`results.json`), exports of MLflow runs (JSON, or a folder `metrics/` with a file for each metric),
exports of Weights & Biases (`wandb-summary.json`, history as JSON lines or CSV), and plain JSON objects of numbers.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from registry.errors import InvalidInput, PathNotFound
from registry.manifest import Metric, digest_of

Source = Literal["lm-eval", "mlflow", "wandb", "json"]
SOURCES: tuple[Source, ...] = get_args(Source)
_LARGEST_BYTES = 64 << 20
# What trainers log the step as, and what the tools count themselves.
_STEPS = ("train/global_step", "trainer/global_step", "global_step", "_step", "Step", "step")
_NAME = re.compile(r"[\w./@:+ -]{1,200}")


def read_results(path: Path, source: Source | None = None, step: int | None = None) -> tuple[Metric, ...]:
    """The metrics in a file or folder, by name; of several values of one name the last, or the last up to a step.

    Args:
        path: what a tool has left.
        source: which tool; None tells it from the file.
        step: the checkpoint's: what a run has measured later is not of it.

    Raises:
        InvalidInput: it is not such a file, or has no number in it.
        PathNotFound: nothing is there.
    """
    if path.is_dir():
        found = tuple(_mlflow_folder(path))
    else:
        text = _text(path)
        found = tuple(_csv(text) if path.suffix == ".csv" else _json(path, text, source))
    named = [metric for metric in found if _NAME.fullmatch(metric.name)]
    in_time = [metric for metric in named if step is None or metric.step is None or metric.step <= step]
    # a tool may count steps in its own way: where nothing is in time, there is nothing to tell by
    latest = {metric.name: metric for metric in (*named, *in_time)}
    if not latest:
        raise InvalidInput(str(path), "", "there is no number in it")
    return tuple(latest[name] for name in sorted(latest))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise InvalidInput(str(path), "", f"larger than {_LARGEST_BYTES} bytes")
        return path.read_text()
    except OSError as error:
        raise PathNotFound(str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(str(path), "", "expected text in UTF-8") from error


def _json(path: Path, text: str, source: Source | None) -> Iterator[Metric]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = _json_lines(text)
        if rows is None or source not in (None, "wandb"):
            raise InvalidInput(str(path), "", f"expected JSON: {error}") from error
        yield from _history(rows)
        return
    if isinstance(document, list) and all(isinstance(row, dict) for row in document) and source in (None, "wandb"):
        yield from _history(document)
        return
    if not isinstance(document, dict):
        raise InvalidInput(str(path), "", "expected a JSON object")
    yield from _READERS[source or _source_of(document)](document)


def _json_lines(text: str) -> list[dict[str, Any]] | None:
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return None
    return rows if rows and all(isinstance(row, dict) for row in rows) else None


def _source_of(document: Mapping[str, Any]) -> Source:
    if isinstance(document.get("results"), dict) and (
        "configs" in document or "versions" in document or "n-shot" in document
    ):
        return "lm-eval"
    run = document.get("run", document)
    if isinstance(run, dict) and isinstance(run.get("data"), dict) and "metrics" in run["data"]:
        return "mlflow"
    return "wandb" if "_step" in document or "_runtime" in document or "_timestamp" in document else "json"


def _lm_eval(document: Mapping[str, Any]) -> Iterator[Metric]:
    """`{"results": {"hellaswag": {"acc,none": 0.5}}}` becomes `hellaswag/acc`; a filter other than none is kept in the name."""
    results = document.get("results")
    if not isinstance(results, dict):
        raise InvalidInput("results", "", "lm-evaluation-harness writes an object `results`")
    better = document.get("higher_is_better")
    for task, found in results.items():
        data = _task_data(document, task)
        for key, value in found.items() if isinstance(found, dict) else ():
            name, comma, kept = str(key).partition(",")
            number = _number(value)
            if number is not None and comma:  # what has no filter is about the task, such as its length
                whole = f"{task}/{name}" if kept == "none" else f"{task}/{name}/{kept}"
                yield Metric(
                    name=whole, value=number, split="test", direction=_direction(better, task, name), data=data
                )


def _task_data(document: Mapping[str, Any], task: str) -> str:
    """Names what a task has measured on: its version, how many examples were shown, and how many it was asked."""
    tables = (document.get(key) for key in ("versions", "n-shot", "n-samples", "task_hashes"))
    return digest_of([task, *(found.get(task) if isinstance(found, dict) else None for found in tables)]).hex


def _direction(better: Any, task: str, name: str) -> Any:
    """What the harness itself says of a metric; nothing of its standard errors."""
    said = better.get(task, {}).get(name) if isinstance(better, dict) and isinstance(better.get(task), dict) else None
    return {True: "higher", False: "lower"}.get(said) if isinstance(said, bool) else None


def _mlflow(document: Mapping[str, Any]) -> Iterator[Metric]:
    """A run as `mlflow runs describe`, its API or its client give it: metrics as an object, or as a list with key, value and step."""
    run = document.get("run", document)
    metrics = run.get("data", {}).get("metrics") if isinstance(run, dict) else None
    if isinstance(metrics, dict):
        yield from numbers(metrics)
    elif isinstance(metrics, list):
        for each in metrics:
            number = _number(each.get("value")) if isinstance(each, dict) else None
            if number is not None:
                yield Metric(name=str(each.get("key")), value=number, step=_step(each.get("step")))
    else:
        raise InvalidInput("data.metrics", "", "MLflow writes an object or a list there")


def _mlflow_folder(folder: Path) -> Iterator[Metric]:
    """A run's folder of MLflow's file store: `metrics/NAME`, each line time, value and step."""
    place = folder / "metrics" if (folder / "metrics").is_dir() else folder
    for path in sorted(each for each in place.rglob("*") if each.is_file()):
        for line in _text(path).splitlines():
            parts = line.split()
            number = _number(parts[1]) if len(parts) in (2, 3) else None
            if number is None:
                reason = "not time, value and step, as MLflow writes; name the file itself where another tool wrote it"
                raise InvalidInput(str(path), line[:80], reason)
            yield Metric(
                name=str(path.relative_to(place)), value=number, step=_step(parts[2]) if len(parts) == 3 else None
            )


def _wandb(document: Mapping[str, Any]) -> Iterator[Metric]:
    step = _step_of(document)
    for metric in numbers(document):
        if metric.name not in _STEPS:
            yield Metric(name=metric.name, value=metric.value, step=step)


def _step_of(row: Mapping[str, Any]) -> int | None:
    return next((found for name in _STEPS if (found := _step(row.get(name))) is not None), None)


def _history(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    for row in rows:
        yield from _wandb(row)


def _csv(text: str) -> Iterator[Metric]:
    """A table with a head; one of the columns tells the step. W&B writes `run - metric`, and beside it what was least and most."""
    table = csv.DictReader(text.splitlines())
    columns = [name for name in table.fieldnames or () if name and name not in _STEPS and "__M" not in name]
    names = {column: column.rpartition(" - ")[2] for column in columns}
    if len({*names.values()}) < len(columns):
        raise InvalidInput("columns", ", ".join(columns)[:80], "several runs have the same metric: export one run")
    for row in table:
        for column, name in names.items():
            number = _number(row.get(column))
            if number is not None:
                yield Metric(name=name, value=number, step=_step_of(row))


def numbers(document: Mapping[str, Any], before: str = "") -> Iterator[Metric]:
    """Every number of an object; those within others by the way to them."""
    for name, value in document.items():
        if str(name).startswith("_"):  # the tools' own
            continue
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{name}/")
        elif (number := _number(value)) is not None:
            yield Metric(name=f"{before}{name}", value=number)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _step(value: object) -> int | None:
    number = _number(value)
    return None if number is None or not math.isfinite(number) or number < 0 else int(number)


_READERS: Mapping[Source, Callable[[Mapping[str, Any]], Iterator[Metric]]] = {
    "lm-eval": _lm_eval,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "json": numbers,
}
