"""litgpt outputs: `lit_model.pth.lora`, `.adapter`, `.adapter_v2` beside copies of the base's configuration and tokenizer.

Written against litgpt 0.5.13 and 0.5.4. Nothing in these files names litgpt's version; what a file is follows from its tensors' names.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from registry.errors import NotACheckpoint, PathNotFound
from registry.formats.adapter import Adapter, Found, finite_number, positive_rank, read_tensors, read_text, read_yaml
from registry.locations import Location, open_location
from registry.manifest import Format, Metric
from registry.tensors import StoredTensor

HYPERPARAMETERS_FILE = "hyperparameters.yaml"
MODEL_CONFIG_FILE = "model_config.yaml"
_FULL_WEIGHTS = "lit_model.pth"
LORA_FILE_BEFORE_2024_03 = "lit_model_lora_finetuned.pth"
# Newest names first; before 2024-03 the kind was spelled out, and for some days it was in the full model's name.
_WEIGHTS_FILES = (
    "lit_model.pth.lora", "lit_model.pth.adapter_v2", "lit_model.pth.adapter",
    LORA_FILE_BEFORE_2024_03, "lit_model_adapter_v2_finetuned.pth", "lit_model_adapter_finetuned.pth",
)  # fmt: skip
_STEP_FOLDER = re.compile(r"step-(\d+)")
FLAGS = ("query", "key", "value", "projection", "mlp", "head")


def is_litgpt(files: Mapping[str, int]) -> bool:
    """Whether a folder holds a litgpt output itself."""
    return any(name in files for name in _WEIGHTS_FILES) or (_FULL_WEIGHTS in files and MODEL_CONFIG_FILE in files)


def read_litgpt(location: Location) -> Adapter:
    """Read the adapter's tensors and what the YAML files know.

    Raises:
        NotACheckpoint: full weights only, so a base model and not an adapter.
        CorruptFile, UnsafePickle: the file is damaged, or a pickle with code in it.
    """
    files = location.files()
    weights = next((name for name in (*_WEIGHTS_FILES, _FULL_WEIGHTS) if name in files), None)
    if weights is None:
        raise NotACheckpoint(location.url, "no lit_model.pth.lora, .adapter or .adapter_v2")
    tensors = read_tensors(location, weights)
    method = _method(tensors)
    if method is None:
        raise NotACheckpoint(location.url, f"{weights} holds full weights: a base model, not an adapter")
    hyper = read_yaml(location, HYPERPARAMETERS_FILE) if HYPERPARAMETERS_FILE in files else {}
    rank, alpha = hyper.get("lora_r"), hyper.get("lora_alpha")
    is_lora = method == "lora"
    return Adapter(
        format=Format.LITGPT,
        method=method,
        rank=positive_rank(rank, HYPERPARAMETERS_FILE, "lora_r") if is_lora and rank is not None else None,
        alpha=finite_number(alpha, HYPERPARAMETERS_FILE, "lora_alpha") if is_lora and alpha is not None else None,
        scaling="alpha/r" if is_lora else "",
        targets=tuple(flag for flag in FLAGS if is_lora and hyper.get(f"lora_{flag}") is True),
        base_name=str(hyper.get("checkpoint_dir") or ""),
        weights_file=weights,
        tensors=tensors,
        config=hyper,
        files=_own_files(files, weights),
        base_config=read_yaml(location, MODEL_CONFIG_FILE) if MODEL_CONFIG_FILE in files else {},
    )


def _method(tensors: tuple[StoredTensor, ...]) -> str | None:
    names = [tensor.spec.name for tensor in tensors]
    if any(".lora_" in name for name in names):
        return "lora"
    if any(name.endswith((".adapter_scale", ".adapter_bias")) for name in names):
        return "adapter_v2"
    if any("gating_factor" in name or "adapter_wte" in name for name in names):
        return "adapter"
    return None


def _own_files(files: Mapping[str, int], weights: str) -> tuple[str, ...]:
    return tuple(path for path in files if "/" not in path and (path != _FULL_WEIGHTS or weights == _FULL_WEIGHTS))


def places_in_litgpt(location: Location, files: Mapping[str, int]) -> dict[str, Callable[[], Found]]:
    """Readers of every `step-*` and then `final` of an output folder, or of the single one that the folder is, by their URLs.

    Empty when there is no litgpt adapter here or one level below.
    """
    if is_litgpt(files):
        parent = location.url.rstrip("/").rpartition("/")[0]
        return {location.url: partial(_found, location.url, _parent_of(location), run_url=parent)}
    folders = {path.split("/")[0] for path in files if path.count("/") == 1}
    steps = sorted((int(match[1]), name) for name in folders if (match := _STEP_FOLDER.fullmatch(name)))
    names = [name for _, name in steps] + (["final"] if "final" in folders else [])
    return {
        f"{location.url}/{name}": partial(_found, f"{location.url}/{name}", location, run_url=location.url)
        for name in names
        if is_litgpt(
            {path.removeprefix(f"{name}/"): size for path, size in files.items() if path.startswith(f"{name}/")}
        )
    }


def _parent_of(location: Location) -> Location | None:
    """The output folder around a step, when the step is named as litgpt names it."""
    parent, _, name = location.url.rstrip("/").rpartition("/")
    if name != "final" and not _STEP_FOLDER.fullmatch(name):
        return None
    try:
        return open_location(parent)
    except PathNotFound:
        return None


def _found(url: str, run_folder: Location | None, run_url: str) -> Found:
    location = open_location(url)
    adapter = read_litgpt(location)
    own_name = location.url.rstrip("/").rsplit("/", 1)[-1]
    folder_step = _STEP_FOLDER.fullmatch(own_name)
    is_part_of_run = folder_step is not None or own_name == "final"
    name = run_url.rstrip("/").rsplit("/", 1)[-1] if is_part_of_run else own_name
    rows = _metric_rows(run_folder) if run_folder is not None else []
    step, metrics = _metrics(rows, int(folder_step[1]) if folder_step else None, _accumulation(adapter.config))
    left_out = {}
    if _FULL_WEIGHTS in location.files() and adapter.weights_file != _FULL_WEIGHTS:
        left_out[_FULL_WEIGHTS] = "a merged model, which can be made again"
    return Found(
        location=location, adapter_name=name, run=name, step=step, metrics=metrics, adapter=adapter, left_out=left_out
    )


def _accumulation(hyper: Mapping[str, Any]) -> int | None:
    """Iterations for each optimizer step; None when the files do not tell."""
    train = hyper.get("train")
    train = train if isinstance(train, dict) else {}
    devices = hyper.get("devices", 1), hyper.get("num_nodes", 1)
    numbers = [train.get("global_batch_size"), train.get("micro_batch_size"), *devices]
    known = [number for number in numbers if isinstance(number, int) and number > 0]
    if len(known) < len(numbers):
        return None
    global_batch, micro_batch, device_count, nodes = known
    return max(1, (global_batch // (device_count * nodes)) // micro_batch)


def _metric_rows(run_folder: Location) -> list[dict[str, float]]:
    """Rows of the newest `metrics.csv`, with the numbers in them."""
    logs = [path for path in run_folder.files() if re.fullmatch(r"logs/csv/version_\d+/metrics\.csv", path)]
    if not logs:
        return []
    newest = max(logs, key=lambda path: int(path.split("_")[-1].split("/")[0]))
    rows = csv.DictReader(io.StringIO(read_text(run_folder, newest)))
    return [{key: number for key, text in row.items() if (number := _number(text)) is not None} for row in rows]


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) and text else None
    except ValueError:
        return None


def _metrics(
    rows: list[dict[str, float]], step: int | None, accumulation: int | None
) -> tuple[int | None, tuple[Metric, ...]]:
    """Step and metrics of `step-N` (`step` given) or of `final` (None).

    The column `step` counts iterations, not optimizer steps. Validation rows hold only `step, val_loss, val_ppl`; the last one, made after
    training, has step 0 and belongs to `final`.
    """
    if accumulation is None or not rows:
        return step, ()
    trained = [row for row in rows if "loss" in row and "step" in row]
    iteration = step * accumulation if step is not None else max((int(row["step"]) for row in trained), default=0)
    wanted = iteration if step is not None else 0
    validated = [row for row in rows if "val_loss" in row and int(row.get("step", -1)) == wanted]
    found_step = step if step is not None else math.ceil(iteration / accumulation) or None
    metrics = []
    if losses := [row["loss"] for row in trained if int(row["step"]) == iteration]:
        metrics.append(Metric(name="loss", value=losses[-1], step=found_step, split="train"))
    last = validated[-1] if validated else {}
    metrics += [
        Metric(name=name, value=last[name], step=found_step, split="val")
        for name in ("val_loss", "val_ppl")
        if name in last
    ]
    return found_step, tuple(metrics)
