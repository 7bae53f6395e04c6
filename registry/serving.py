"""What a serving engine is started with, so that it serves checkpoints under names that never come to mean another one.

Engines keep a name's weights for ever, and blocks of what they computed with them. So every name here has its version in it, and every version
a place of its own: a folder named by its content, or a repository id.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import Conflict, InvalidInput, NotServable, UnknownRepository
from registry.formats.peft import CONFIG_FILE
from registry.local_copies import used_copy
from registry.manifest import Checkpoint, Report
from registry.progress import Progress, silent
from registry.servability import ENGINE_NAMES, Engine, Servability, Way, rank_flag, rank_of, servable

if TYPE_CHECKING:
    from registry.results import Repository
    from registry.service import Registry

_TOKEN = "$CKPT_TOKEN"  # noqa: S105 - a variable's name, so that no token is ever printed
_CACHED = (
    "a name is loaded once and kept: when another version goes live, serve it under its own name, and ask for that"
)
_SILENT: Mapping[Engine, str] = {
    "vllm": "vLLM answers as the base model, without a word, where an adapter's module names are not its own "
    "(vLLM #34186, #34591): compare one answer with the base model's",
    "sglang": "compare one answer with the base model's: not every part of an adapter that is left out is reported",
}
_ONLY_HERE = "HF_ENDPOINT stands for huggingface.co: whatever the engine downloads, it downloads from this registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What clients ask for by `name`: a checkpoint, and the folder or repository id that the engine reads it from."""

    name: str
    checkpoint: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How to start an engine.

    `lines` are the words of the command, an option with its values in each; in `environment`, a value that begins with `$` names a variable.
    `warnings` are what to look out for, in sentences.
    """

    engine: Engine
    way: Way
    lines: tuple[tuple[str, ...], ...]
    served: tuple[ServedModel, ...]
    warnings: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For a shell, ready to be copied."""
        variables = " ".join(f"{name}={_in_shell(value)}" for name, value in self.environment.items())
        command = " \\\n  ".join(shlex.join(line) for line in self.lines)
        return f"{variables} \\\n{command}" if variables else command


def _in_shell(value: str) -> str:
    return f'"{value}"' if value.startswith("$") else shlex.quote(value)


def serve_unmerged(
    registry: Registry,
    engine: Engine,
    checkpoints: Sequence[Checkpoint],
    endpoint: str = "",
    progress: Progress = silent,
) -> ServeConfig:
    """Serve adapters beside their base model.

    Args:
        registry: that has them.
        engine: what they are served with.
        checkpoints: of one base model.
        endpoint: URL of the registry's server, for engines that read from there; empty: they are copied to this machine.
        progress: told how far copying has come.

    Raises:
        NotServable: the engine does not take one of them unmerged.
        InvalidInput: they are of several base models.
    """
    checkpoints = list({checkpoint.ref: checkpoint for checkpoint in checkpoints}.values())
    if others := [each.ref for each in checkpoints if each.base != checkpoints[0].base]:
        raise InvalidInput("REF", others[0], f"another base model than {checkpoints[0].ref}: an engine serves one")
    found = [_served(registry, engine, checkpoint, endpoint, progress) for checkpoint in checkpoints]
    base = _base_repository(registry, checkpoints[0]) if endpoint else base_name_of(checkpoints[0])
    rank = rank_flag(engine, max(rank for _, rank in found))
    served = tuple(model for model, _ in found)
    return ServeConfig(
        engine=engine,
        way="unmerged",
        lines=_unmerged_lines(engine, base, str(rank), served),
        served=served,
        warnings=(_CACHED, _SILENT[engine], *([_ONLY_HERE] if endpoint else [])),
        environment=_environment(endpoint),
    )


def _served(
    registry: Registry, engine: Engine, checkpoint: Checkpoint, endpoint: str, progress: Progress
) -> tuple[ServedModel, int]:
    """What an adapter is served as, and its rank."""
    if endpoint:
        repository = _repository(registry, version_id(checkpoint))
        config, source = _read_config(registry, repository), repository.id
        demand(registry, checkpoint, engine, "unmerged", config)
    else:
        with admitted_copy(registry, checkpoint, engine, progress) as (folder, config):
            source = str(folder)
    model = ServedModel(name=checkpoint.ref, checkpoint=checkpoint.ref, source=source)
    return model, rank_of(checkpoint.manifest, config)


def _unmerged_lines(engine: Engine, base: str, rank: str, served: Sequence[ServedModel]) -> tuple[tuple[str, ...], ...]:
    if engine == "vllm":
        modules = [_vllm_module(model) for model in served]
        return ("vllm", "serve", base), ("--enable-lora",), ("--max-lora-rank", rank), ("--lora-modules", *modules)
    paths = [f"{model.name}={model.source}" for model in served]
    start = ("python", "-m", "sglang.launch_server", "--model-path", base)
    return start, ("--enable-lora",), ("--max-lora-rank", rank), ("--lora-paths", *paths)


def _vllm_module(model: ServedModel) -> str:
    """vLLM splits `name=path` at every `=`, and takes what has a comma for JSON."""
    if {"=", ","}.isdisjoint(model.name + model.source):
        return f"{model.name}={model.source}"
    return json.dumps({"name": model.name, "path": model.source})


def serve_merged(registry: Registry, engine: Engine, checkpoint: Checkpoint, endpoint: str) -> ServeConfig:
    """Serve a checkpoint merged into its base model, out of a repository whose weights are computed while the engine loads them.

    Raises:
        NotServable: the engine does not take it so.
        InvalidInput: no endpoint.
    """
    if not endpoint:
        raise InvalidInput(
            "endpoint",
            "",
            "the registry's server computes merged models while they are read: say its URL; "
            f"without one, `ckpt merge {checkpoint.ref} --out DIR` writes a folder that any engine serves",
        )
    demand(registry, checkpoint, engine, "merged", {})
    source = _repository(registry, f"{version_id(checkpoint)}-merged").id
    start = ("vllm", "serve", source) if engine == "vllm" else (
        "python", "-m", "sglang.launch_server", "--model-path", source,
    )  # fmt: skip
    return ServeConfig(
        engine=engine,
        way="merged",
        lines=(start, ("--served-model-name", checkpoint.ref)),
        served=(ServedModel(name=checkpoint.ref, checkpoint=checkpoint.ref, source=source),),
        warnings=(_ONLY_HERE,),
        environment=_environment(endpoint),
    )


def _environment(endpoint: str) -> Mapping[str, str]:
    return {"HF_ENDPOINT": endpoint.rstrip("/"), "HF_TOKEN": _TOKEN} if endpoint else {}


# -- what the engine can do with a checkpoint


def demand(registry: Registry, checkpoint: Checkpoint, engine: Engine, way: Way, config: Mapping[str, Any]) -> None:
    """See that an engine takes a checkpoint in one way.

    Raises:
        NotServable: it does not; what to do is said.
    """

    def judge(report: Report | None) -> dict[Way, Servability]:
        found = servable(checkpoint.manifest, config, ref=checkpoint.ref, report=report)
        return {each.way: each for each in found if each.engine == engine}

    if way == "unmerged" and judge(None)[way].is_possible:
        return  # what checking found is about merging
    ways = judge(registry.details(checkpoint).report)
    if ways[way].is_possible:
        return
    advice = ways[way].advice
    if way == "unmerged" and ways["merged"].is_possible:
        advice = (
            f"`ckpt serve-config {engine} {checkpoint.ref} --merged` serves it as the repository "
            f"{version_id(checkpoint)}-merged; or {advice}"
        )
    raise NotServable(checkpoint.ref, f"{ENGINE_NAMES[engine]}, {way},", ways[way].reason, advice)


def version_id(checkpoint: Checkpoint) -> str:
    """The repository that is this version alone, for engines that take no revision."""
    return f"{checkpoint.adapter}-v{checkpoint.version}"


def base_name_of(checkpoint: Checkpoint) -> str:
    """What the adapter's own configuration calls its base model, which engines compare; else what the registry calls it."""
    return checkpoint.manifest.base_name or checkpoint.base_name


def _base_repository(registry: Registry, checkpoint: Checkpoint) -> str:
    try:
        return _repository(registry, checkpoint.base_name).id
    except (InvalidInput, UnknownRepository, Conflict):
        return registry.repository(f"base-{checkpoint.base.short}").id


def _repository(registry: Registry, id_: str) -> Repository:
    if "--" in id_:
        raise InvalidInput(
            "repository", id_, "clients of the Hub take no name with -- in it; folders on this machine do"
        )
    return registry.repository(id_)


def _read_config(registry: Registry, repository: Repository) -> dict[str, Any]:
    pieces = registry.read_file(repository, CONFIG_FILE)
    found: dict[str, Any] = json.loads(b"".join(bytes(piece) for piece in pieces))
    return found


# -- local copies


@contextmanager
def admitted_copy(
    registry: Registry, checkpoint: Checkpoint, engine: Engine, progress: Progress = silent
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A local copy of an adapter that an engine takes unmerged, and its configuration; no sweep takes it within the block.

    Raises:
        NotServable: it does not.
        Changed, StorageFailed: as `registry.local_copies.used_copy`.
    """
    demand(registry, checkpoint, engine, "unmerged", {})  # what the record tells, before anything is copied
    with used_copy(registry, checkpoint, progress) as folder:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_bytes())
        demand(registry, checkpoint, engine, "unmerged", config)
        yield folder, config
