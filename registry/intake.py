"""What comes in when checkpoints are registered: what is said about them, where they are found, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from registry.base_folders import AddedBase
from registry.compatibility import Facts, check
from registry.errors import Conflict, InvalidInput, NotACheckpoint, UnreadableFile
from registry.formats import Found, Search, find_checkpoints, resolve
from registry.formats.base_model import places_with_models
from registry.locations import local_folder, open_location
from registry.manifest import BaseModel, Checkpoint, FileEntry, Metric, Origin, Report
from registry.refs import AdapterName, check_name
from registry.training_state import LEFT_OUT, LINEAGE_FILE, Beginning, is_state, read_beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What the caller says about checkpoints; what is left empty, the files have to know.

    `metrics`, `note` and `tags` are recorded beside what the files know. `step` is refused for a run with several checkpoints. Of files that
    the registry itself made, `origin` tells what of, and `source` is recorded instead of where they lay meanwhile. `with_state` keeps what only
    the trainer needs to go on (the optimizer's state is twice an adapter's size).
    """

    adapter: str = ""
    base: str = ""
    run: str = ""
    step: int | None = None
    metrics: tuple[Metric, ...] = ()
    note: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    arch_version: str = ""
    source: str = ""
    origin: Origin | None = None
    with_state: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A registered checkpoint; `created` is False when this content was registered before. `left_out`: files that were not taken, and why."""

    checkpoint: Checkpoint
    created: bool
    report: Report
    left_out: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """The result of registering a place. `unreadable` are checkpoints of a run that are damaged; the others are registered all the same.

    `models` are whole models (full fine-tunes) that were there instead of adapters.
    """

    registered: tuple[Registered, ...]
    unreadable: tuple[UnreadableFile, ...]
    models: tuple[AddedBase, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A checkpoint whose files lie in the store already: what a client found around them, and what its user says.

    `adapter`, `run`, `step`, `metrics` and `began` are what the place of the files told; `left_out` what of it was not taken. `said.base` is to
    name a recorded base model.
    """

    files: tuple[FileEntry, ...]
    said: Registration
    adapter: str = ""
    run: str = ""
    step: int | None = None
    metrics: tuple[Metric, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    began: Beginning | None = None


def search(path: str, *, with_state: bool = False) -> Search:
    """The checkpoints of a place.

    Args:
        path: of a checkpoint's folder, a run's, or the weights file in it; or an fsspec URL.
        with_state: take also what only the trainer needs to go on.

    Raises:
        PathNotFound, NotACheckpoint, CorruptFile, UnsafePickle: nothing there that can be registered.
    """
    file = local_folder(path)
    if file is None or not os.path.isfile(file):
        place = find_checkpoints(open_location(path))
        return replace(place, found=tuple(_of_run(each, with_state=with_state) for each in place.found))
    found = find_checkpoints(open_location(str(file.parent))).found
    own = tuple(each for each in found if each.location.local_path(each.adapter.weights_file) == file)
    if not own:
        raise NotACheckpoint(path, "not the weights of a readable checkpoint")
    return Search(found=tuple(_of_run(each, with_state=with_state) for each in own))


def _of_run(found: Found, *, with_state: bool) -> Found:
    """A checkpoint without the trainer's state, unless that is wanted; of a run that went on from another one, with what that was.

    What a resumed run began with is taken whole, as it was laid out, so that it is known already.
    """
    began = _beginning(found)
    is_whole = with_state or (began is not None and began.is_at(found.step))
    dropped = [path for path in found.adapter.files if is_state(path) and not is_whole]
    files = tuple(path for path in found.adapter.files if path not in {*dropped, LINEAGE_FILE})
    return replace(
        found,
        adapter=replace(found.adapter, files=files),
        adapter_name=str(began.parsed.adapter) if began else found.adapter_name,
        left_out={**found.left_out, **dict.fromkeys(dropped, LEFT_OUT)},
        began=began,
    )


def _beginning(found: Found) -> Beginning | None:
    """What a checkpoint's folder says that its run began with, or else the run's, in which it is."""
    url = found.location.url
    above = url.rpartition("/")[0] or "/"
    # what is above a URL's folder may be a bucket that nobody may list, or no folder at all: only the run's is looked into
    is_run = local_folder(url) is not None or above.endswith(f"/{found.run}")
    return read_beginning(url) or (read_beginning(above) if is_run else None)


def size_of(found: Found) -> int:
    """Bytes of the files that a checkpoint is made of."""
    sizes = found.location.files()
    # A file that is gone by now is noticed when it is to be stored.
    return sum(sizes.get(file, 0) for file in found.adapter.files)


def report_on(found: Found, base: BaseModel, said: Registration) -> Report:
    """What headers alone tell of a checkpoint and the base model that it is to be registered on.

    Raises:
        Conflict: the base model is recorded for another architecture version than is said.
    """
    report = check(found.location.url, found.adapter, base, resolve(found.adapter, base), trained=None, facts=Facts())
    if said.arch_version and base.arch_version and said.arch_version != base.arch_version:
        raise Conflict(base.name, f"recorded as architecture version {base.arch_version}, not {said.arch_version}")
    return report


def take_models(path: str, said: Registration, add: Callable[[str], AddedBase]) -> Intake | None:
    """Record the whole models of a place, which need no base model; None where there are none.

    Their places name them, unless the caller names the only one.

    Args:
        path: of a folder, or of the weights file in it; or a URL.
        said: about them.
        add: records the model in a folder.

    Raises:
        InvalidInput: something is said that a whole model has no place for.
        UnreadableFile: every one of them is damaged.
    """
    places = _model_places(path)
    if not places:
        return None
    _check_model_words(said, len(places))
    added, unreadable = [], []
    for place in places:
        try:
            added.append(add(place))
        except UnreadableFile as error:
            unreadable.append(type(error)(f"{place}/{error.path}", error.reason))
    if not added:
        raise unreadable[0]
    return Intake(registered=(), unreadable=tuple(unreadable), models=tuple(added))


def _model_places(path: str) -> list[str]:
    """Every folder with a whole model in a place: the place itself, or those of a run."""
    file = local_folder(path)
    if file is None or not os.path.isfile(file):
        return list(places_with_models(open_location(path)))
    return list(places_with_models(open_location(str(file.parent)))) if file.suffix in (".pth", ".safetensors") else []


def _check_model_words(said: Registration, count: int) -> None:
    for name in ("base", "run", "step", "metrics", "note", "tags"):
        value = getattr(said, name)
        if value not in ("", None, (), {}):
            raise InvalidInput(name, value, "this is a whole model, to be recorded as a base model, which has none")
    if said.adapter and count > 1:
        raise InvalidInput(
            "adapter", said.adapter, f"there are {count} whole models in this run, each with its own name"
        )


def check_words(said: Registration, count: int) -> None:
    """See that what is said can be said of so many checkpoints.

    Raises:
        InvalidInput: it cannot.
    """
    if said.adapter:
        AdapterName.parse(said.adapter)
    if said.run:
        check_name(said.run)
    for key in said.tags:
        check_name(key)
    if count > 1 and said.step is not None:
        raise InvalidInput("step", said.step, f"there are {count} checkpoints in this run, each with its own step")
    if count > 1 and said.metrics:
        raise InvalidInput(
            "metric", said.metrics[0].name, f"there are {count} checkpoints in this run: register one at a time"
        )
