"""The page of a checkpoint: what is in it, how good it is, where it comes from and what came of it; notes, tags and aliases are written here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from registry.errors import DirectionUnknown, InvalidInput, MixedData, PathNotFound, RegistryError, UnknownMetric
from registry.formats import read_adapter
from registry.locations import Location, pieces_of
from registry.manifest import Checkpoint, FileEntry, Report
from registry.norms import UpdateNorm, update_norms
from registry.refs import CheckpointRef
from registry.remembered import Remembered
from registry.selection import declared_direction
from registry.servability import ENGINE_NAMES, Servability, rank_flag, rank_of, servable
from registry.server.pages.drawing import metric, url_of
from registry.server.pages.heat import Measured, heat_map
from registry.server.pages.lineage import lineage
from registry.server.pages.visits import Moved, Pages, Shown, Visit
from registry.server.scope import Scope
from registry.server.sending_files import send_file
from registry.teamwork import Role
from registry.wording import Words, explain

pages = Pages("checkpoint")

CARD = "README.md"
_CARD_BYTES = 200_000
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_RUN_POINTS, _CURVE_POINTS = 2000, 120
_LONGEST_NOTE = 20_000
_WEIGHTS_TABLE = 2000
_KEPT_CHECKPOINTS = 256


# Of content alone, which never changes: whoever asks, in whichever registry, gets the same.
_kept: Remembered[tuple[Mapping[str, Any], str]] = Remembered(_KEPT_CHECKPOINTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A metric of a checkpoint, with what its run measured: values by step, and this checkpoint's among them."""

    name: str
    value: float
    step: int | None
    split: str
    better: str
    curve: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """What only the files tell: the configuration, the model card, and who can serve it. `words`: why they cannot be read."""

    config: Mapping[str, Any]
    card: str
    servability: tuple[Servability, ...]
    words: Words | None = None


# -- look


@pages.page("GET", "/checkpoints/{ref:path}", Role.READER)
def show_checkpoint(visit: Visit) -> Shown:
    """A checkpoint, by any reference."""
    asked, scope = visit.path["ref"], visit.scope
    details = scope.registry.details(scope.checkpoint(asked))
    checkpoint = details.checkpoint
    inside = _inside(scope, checkpoint, details.report)
    return Shown(
        "checkpoint.html",
        details=details,
        checkpoint=checkpoint,
        words=explain(details.problem) if details.problem else None,
        inside=inside,
        measurements=_measurements(scope, checkpoint),
        lineage=lineage(scope, details),
        signatures=scope.registry.signatures(checkpoint),
        merged=list(filter(scope.sees, details.merged)),
        children=list(filter(scope.sees_ref, details.children)),
        engines=ENGINE_NAMES,
        repository=str(checkpoint.adapter),
        asked_with=_asked_with(asked),
        best=_best(scope, checkpoint),
        tags=[(key, value, _with_tag(key, value)) for key, value in sorted(checkpoint.tags.items())],
        max_rank=rank_flag("vllm", rank_of(checkpoint.manifest, inside.config)),
    )


def _with_tag(key: str, value: str) -> str:
    """The checkpoints with a tag."""
    quoted = value.replace("'", "''")
    return f"/checkpoints?where={quote(f'tag.`{key}` = {chr(39)}{quoted}{chr(39)}', safe='')}"


def _best(scope: Scope, checkpoint: Checkpoint) -> str:
    """The metric that it is the best of its adapter by; empty text where it is not."""
    try:
        ranking = scope.registry.rank(str(checkpoint.adapter))
    except (UnknownMetric, DirectionUnknown, MixedData):
        return ""
    return ranking.metric if ranking.groups[0].checkpoints[0].ref == checkpoint.ref else ""


def _asked_with(text: str) -> str:
    """What else than the version was asked for: such an address may show another checkpoint tomorrow."""
    ref = CheckpointRef.parse(text)
    return "" if ref.selector == "version" or ref.digest_prefix else text


@pages.page("GET", "/checkpoints/{ref:path}/parts/norms", Role.READER, is_slow=True)
def show_norms(visit: Visit) -> Shown:
    """How much it changes each module. The first look measures."""
    norms = update_norms(visit.scope.registry.workspace, visit.scope.checkpoint(visit.path["ref"]))
    return Shown("_norms.html", norms=norms[:_WEIGHTS_TABLE], map=_map(norms), left_out=len(norms[_WEIGHTS_TABLE:]))


def _map(norms: Sequence[UpdateNorm]) -> Any:
    return heat_map(
        [
            Measured(layer=each.layer, module=each.module, value=None if each.problem else each.rms, says=_says(each))
            for each in norms
        ]
    )


def _says(norm: UpdateNorm) -> str:
    if norm.problem:
        return f"{norm.name}: {norm.problem}"
    rank = "" if norm.rank is None else f", effective rank {norm.rank:.1f}"
    return f"{norm.name}: ‖Δ‖ {metric(norm.norm)}, rms {metric(norm.rms)}{rank}"


@pages.page("GET", "/checkpoints/{ref:path}/parts/check", Role.READER, is_slow=True)
def check_fully(visit: Visit) -> Shown:
    """The check that reads all values, and the base model's folder."""
    return Shown("_checked.html", report=visit.scope.registry.check(visit.scope.checkpoint(visit.path["ref"])))


@pages.page("GET", "/checkpoints/{ref:path}/files/{path:path}", Role.READER)
def give_file(visit: Visit) -> Response:
    """The bytes of a file, or a range of them."""
    checkpoint = visit.scope.checkpoint(visit.path["ref"])
    folder = visit.scope.registry.workspace.folder_of(checkpoint)
    return sent(folder, checkpoint.manifest.files, visit)


def sent(folder: Location, files: Sequence[FileEntry], visit: Visit) -> Response:
    """A file of a folder, by the path that was asked for.

    Raises:
        PathNotFound: there is no such file.
    """
    entry = next((each for each in files if each.path == visit.path["path"]), None)
    if entry is None:
        raise PathNotFound(visit.path["path"])

    def pieces(start: int, end: int) -> Iterator[bytes]:
        return pieces_of(folder.open(entry.path), folder.url, start, end)

    return send_file(pieces, entry.size_bytes, entry.digest.hex, visit.headers, name=entry.path.rpartition("/")[2])


def _inside(scope: Scope, checkpoint: Checkpoint, report: Report | None) -> Inside:
    try:
        config, card = _kept.get(checkpoint.digest, lambda: _read(scope, checkpoint))
    except RegistryError as error:
        return Inside(config={}, card="", servability=(), words=explain(error))
    found = servable(checkpoint.manifest, config, ref=checkpoint.ref, report=report)
    return Inside(config=config, card=card, servability=found)


def _read(scope: Scope, checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    with closing(scope.registry.workspace.folder_of(checkpoint)) as folder:
        return read_adapter(folder).config, _card(folder, checkpoint)


def _card(folder: Location, checkpoint: Checkpoint) -> str:
    """The model card without what is there for machines."""
    if all(entry.path != CARD for entry in checkpoint.manifest.files):
        return ""
    with folder.open(CARD) as stream:
        text = stream.read(_CARD_BYTES).decode(errors="replace")
    return _FRONT_MATTER.sub("", text).strip()


# -- measured


def _measurements(scope: Scope, checkpoint: Checkpoint) -> list[Measurement]:
    latest = {each.name: each for each in checkpoint.metrics}
    return [
        Measurement(
            name=name,
            value=latest[name].value,
            step=latest[name].step,
            split=latest[name].split,
            better=declared_direction(name, [checkpoint]) or "",
            curve=_thinned(_of_run(scope, checkpoint, name), latest[name].value),
        )
        for name in sorted(latest)
    ]


def _of_run(scope: Scope, checkpoint: Checkpoint, name: str) -> list[float]:
    with scope.registry.workspace.reading() as catalog:
        return catalog.overview.values_of_run(checkpoint.adapter, checkpoint.run, name, _RUN_POINTS)


def _thinned(values: Sequence[float], own: float) -> tuple[float, ...]:
    """Some of the values of a curve, the checkpoint's own among them: as many as can be seen."""
    every = max(1, len(values) // _CURVE_POINTS)
    return tuple(value for at, value in enumerate(values) if at % every == 0 or value == own)


# -- write


@pages.page("POST", "/checkpoints/{ref:path}/notes", Role.WRITER)
def add_note(visit: Visit) -> Moved:
    """Write a note."""
    text = visit.form.one("text")
    if len(text) > _LONGEST_NOTE:
        raise InvalidInput("note", f"{text[:40]}…", f"at most {_LONGEST_NOTE} characters")
    return _changed(visit, "notes", lambda found: visit.scope.registry.note(found, text))


@pages.page("POST", "/checkpoints/{ref:path}/tags", Role.WRITER)
def change_tags(visit: Visit) -> Moved:
    """Set a tag, or take some away."""
    key, removed = visit.form.one("key"), visit.form.all("remove")
    tags = {key: visit.form.one("value")} if key or not removed else {}
    return _changed(visit, "tags", lambda found: visit.scope.registry.tag(found, tags, removed))


@pages.page("POST", "/checkpoints/{ref:path}/aliases", Role.WRITER)
def set_alias(visit: Visit) -> Moved:
    """Point an alias to it, or take some away."""
    name, registry = visit.form.one("name"), visit.scope.registry

    def change(found: Checkpoint) -> None:
        for alias in set(found.aliases).intersection(visit.form.all("remove")):  # others have moved on meanwhile
            registry.remove_alias(str(found.adapter), alias)
        if name or not visit.form.has("remove"):
            registry.set_alias(found, name)

    return _changed(visit, "aliases", change)


@pages.page("POST", "/checkpoints/{ref:path}/remove", Role.WRITER)
def remove_checkpoint(visit: Visit) -> Moved:
    """Remove it; refused while something needs it."""
    found = visit.scope.checkpoint(visit.path["ref"])
    visit.scope.registry.remove(found)
    return Moved(f"/checkpoints?adapter={quote(str(found.adapter))}")


def _changed(visit: Visit, place: str, change: Callable[[Checkpoint], object]) -> Moved:
    found = visit.scope.checkpoint(visit.path["ref"])
    change(found)
    return Moved(f"{url_of(found)}#{place}")
