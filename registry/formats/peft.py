"""PEFT adapters: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`), and the folders that trainers put around them.

Key grammar and configuration fields as PEFT 0.21 writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from registry.errors import NotACheckpoint
from registry.formats.adapter import Adapter, Found, finite_number, is_number, positive_rank, read_json, read_tensors
from registry.locations import Location, open_location
from registry.manifest import Format, Metric

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINER_STATE = "trainer_state.json"
_STEP_FOLDER = re.compile(r"(?:checkpoint|step|global_step)[-_]?(\d+)")
_NOT_PART_OF_IT = ("runs", "logs", "wandb", "mlruns")
_NOT_METRICS = frozenset({"epoch", "step", "total_flos", "learning_rate", "grad_norm", "num_input_tokens_seen"})
_SCALED = ("lora", "dora", "adalora", "loha", "lokr")  # by alpha over the rank
_SNAPSHOT = re.compile(r"models--(?:(?P<namespace>.+?)--)?(?P<name>.+)")


def is_peft(files: Mapping[str, int]) -> bool:
    """Whether a folder holds a PEFT adapter itself."""
    return CONFIG_FILE in files


def read_peft(location: Location) -> Adapter:
    """Read configuration and tensor header.

    Raises:
        NotACheckpoint: the configuration or the weights are missing.
        CorruptFile: one of them is damaged.
    """
    files = location.files()
    weights = next((name for name in WEIGHTS_FILES if name in files), None)
    if weights is None:
        raise NotACheckpoint(location.url, f"{CONFIG_FILE} without {' or '.join(WEIGHTS_FILES)}")
    config = read_json(location, CONFIG_FILE)
    method = _method(config)
    alpha = config.get("lora_alpha", config.get("alpha"))
    return Adapter(
        format=Format.PEFT,
        method=method,
        rank=_rank(config, method),
        alpha=finite_number(alpha, CONFIG_FILE, "alpha") if alpha is not None else None,
        scaling=("alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r") if method in _SCALED else "",
        targets=_targets(config.get("target_modules")),
        base_name=str(config.get("base_model_name_or_path") or ""),
        weights_file=weights,
        tensors=read_tensors(location, weights),
        config=config,
        files=own_files(files),
    )


def _method(config: Mapping[str, Any]) -> str:
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,40}", peft_type):
        raise NotACheckpoint(CONFIG_FILE, f"peft_type is {peft_type!r}")
    method = peft_type.lower()
    return "dora" if method == "lora" and config.get("use_dora") else method


def _rank(config: Mapping[str, Any], method: str) -> int | None:
    """AdaLoRA is scaled by the rank that it began with. OFT tells the number of its blocks, or 0 where it tells their size."""
    field = "init_r" if method == "adalora" else "r"
    rank = config.get(field)
    if rank is None or (method == "oft" and rank == 0):
        return None
    return positive_rank(rank, CONFIG_FILE, field)


def _targets(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(sorted(map(str, value))) if isinstance(value, Sequence) else ()


def own_files(files: Mapping[str, int]) -> tuple[str, ...]:
    """The files of a checkpoint's folder that are its own: not those of checkpoints, logs or caches below it."""
    nested = {path.rsplit("/", 1)[0] for path in files if path.endswith(f"/{CONFIG_FILE}")}
    return tuple(
        path
        for path in files
        if not any(path.startswith(f"{folder}/") for folder in nested)
        and not any(_is_foreign(part) for part in path.split("/")[:-1])
    )


def _is_foreign(folder: str) -> bool:
    return folder in _NOT_PART_OF_IT or folder.startswith("checkpoint-")


def places_in_peft(location: Location, files: Mapping[str, int]) -> dict[str, Callable[[], Found]]:
    """Readers of every checkpoint of a training run's folder in the order of steps, the folder's own last, by their URLs.

    Empty when there is no PEFT adapter here or one level below.
    """
    urls = [f"{location.url}/{name}" for name in step_folders(files)]
    own = {location.url: partial(_found, location.url, run_of=None)} if is_peft(files) else {}
    return {**{url: partial(_found, url, run_of=location) for url in urls}, **own}


def step_folders(files: Iterable[str]) -> dict[str, int]:
    """The folders of a run's checkpoints among paths, each with the step that its name tells, in the order of steps."""
    folders = {path.split("/")[0] for path in files if re.fullmatch(rf"[^/]+/{CONFIG_FILE}", path)}
    numbered = sorted((int(match[1]), name) for name in folders if (match := _STEP_FOLDER.fullmatch(name)))
    return {name: step for step, name in numbered}


def _found(url: str, run_of: Location | None) -> Found:
    location = open_location(url)
    adapter = read_peft(location)
    parent, name = _last_parts(location.url)
    folder_step = _STEP_FOLDER.fullmatch(name)
    if folder_step:
        name = _last_parts(run_of.url)[1] if run_of is not None else parent
    step, metrics = trainer_state(location)
    if step is None and folder_step:
        step = int(folder_step[1])
    return Found(
        location=location,
        adapter_name=_hub_name(location.url) or name,
        run=name,
        step=step,
        metrics=metrics,
        adapter=adapter,
    )


def _last_parts(url: str) -> tuple[str, str]:
    parts = ["", *url.rstrip("/").split("/")]
    return parts[-2], parts[-1]


def _hub_name(url: str) -> str:
    parts = url.split("/")
    if len(parts) >= 3 and parts[-2] == "snapshots" and (match := _SNAPSHOT.fullmatch(parts[-3])):
        return "/".join(part for part in (match["namespace"], match["name"]) if part)
    return ""


def trainer_state(location: Location) -> tuple[int | None, tuple[Metric, ...]]:
    """Step and metrics from the Hugging Face Trainer's state: of each metric the last value logged up to this step.

    An evaluation's value counts only if it was made at this very step; earlier ones belong to earlier checkpoints.
    """
    if _TRAINER_STATE not in location.files():
        return None, ()
    state = read_json(location, _TRAINER_STATE)
    step, history = state.get("global_step"), state.get("log_history")
    if not isinstance(step, int) or not isinstance(history, list):
        return None, ()
    latest: dict[str, Metric] = {}
    for entry in history:
        logged_at = entry.get("step") if isinstance(entry, dict) else None
        if not isinstance(logged_at, int) or logged_at > step:
            continue
        for name, value in entry.items():
            if _is_metric(name, value) and (not name.startswith("eval_") or logged_at == step):
                split = "eval" if name.startswith("eval_") else "train"
                latest[name] = Metric(name=name, value=float(value), step=logged_at, split=split)
    return step, tuple(latest.values())


def _is_metric(name: str, value: object) -> bool:
    if name in _NOT_METRICS or not is_number(value):
        return False
    return not name.endswith(("_runtime", "_per_second"))
