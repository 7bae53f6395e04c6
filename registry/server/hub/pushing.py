"""What becomes of a commit: the checkpoints in its files are registered, and it is their newest version's.

An adapter's configuration and weights make a checkpoint, with whatever lies beside them; the folders of a run make one each. What comes without
them waits a day for them, or, where it only goes with a version (a card, a tokenizer), makes the next one out of that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import final

from registry import uploading
from registry.errors import (
    Conflict,
    InvalidInput,
    NotACheckpoint,
    NotFound,
    Outdated,
    Refused,
    UnknownBase,
    UnknownRepository,
)
from registry.formats import read_adapter
from registry.formats.litgpt import is_litgpt
from registry.formats.peft import CONFIG_FILE, WEIGHTS_FILES, step_folders, trainer_state
from registry.intake import Received, Registration
from registry.manifest import BaseModel, Checkpoint, FileEntry
from registry.refs import AdapterName, Digest, check_label
from registry.repository_ids import MAIN, adapter_commit, name_of
from registry.results import Repository
from registry.server.hub.commits import Commit
from registry.server.hub.routing import NO_NAMESPACE
from registry.server.scope import Scope

_NOT_TAKEN = ("runs", "logs", "wandb", "mlruns")
_WHOLE_MODEL = re.compile(r"(?:(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)|.*\.gguf|lit_model\.pth)")
_TOLD_BASES = 5
_ESSENTIAL = (CONFIG_FILE, *WEIGHTS_FILES)
_TRAINERS_WORDS = re.compile(r"Training in progress, step ([0-9]{1,12})\b")
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a commit goes: an adapter, at a revision. `newest` is the adapter as it is, None if it has no checkpoint yet."""

    adapter: AdapterName
    revision: str
    newest: Repository | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What came of a commit: the commit that the target is at, and the files that wait for the rest of their checkpoint."""

    commit: str
    waiting: tuple[str, ...] = ()


# -- where to


def target(scope: Scope, id_: str, revision: str, found: Callable[[], Repository]) -> Target:
    """The adapter that something is to be sent to, which need not exist.

    Args:
        scope: who sends.
        id_: as the client has it.
        revision: `main`, or an alias to move.
        found: looks the id up.

    Raises:
        Conflict: something else has this id, or the revision never changes.
        InvalidReference: the id cannot be an adapter's, or the revision not an alias's.
        Forbidden: it is in another namespace.
    """
    if revision != MAIN:
        _check_movable(scope, revision)
    own = id_.removeprefix(f"{NO_NAMESPACE}/")
    try:
        newest = found()
    except UnknownRepository as unknown:
        if unknown.reason:
            raise Conflict(f"repository {id_}", unknown.reason) from unknown
        scope.may_change(own)
        return Target(adapter=AdapterName.parse(own), revision=revision, newest=None)
    if newest.kind != "adapter":
        what = "a base model's: `ckpt base add` records them" if newest.kind == "base" else "a merged model's"
        raise Conflict(f"repository {id_}", f"it is {what}, and takes no files; checkpoints go to an adapter's own id")
    adapter = (
        AdapterName.parse(newest.checkpoints[0].partition("@")[0]) if newest.checkpoints else AdapterName.parse(own)
    )
    if str(adapter) not in (own, id_):
        raise Conflict(f"repository {id_}", f"it is one version of {adapter}, and versions never change: send to that")
    scope.may_change(str(adapter))
    return Target(adapter=adapter, revision=revision, newest=newest if newest.checkpoints else None)


def _check_movable(scope: Scope, revision: str) -> None:
    """See that a revision is an alias, or could be one."""
    if _COMMIT_ID.fullmatch(revision):
        raise Conflict(f"revision {revision}", "a commit never changes: send to main or to an alias")
    check_label(revision)
    with scope.registry.workspace.reading() as catalog:
        if revision in catalog.shipments.environments():
            raise Conflict(f"revision {revision}", f"it is an environment: `ckpt ship REF --to {revision}` moves it")


def check_no_whole_model(paths: Iterable[str]) -> None:
    """See that what is about to be sent is not a whole model, before it is.

    Raises:
        NotACheckpoint: it is.
    """
    paths = list(paths)
    found = next((path for path in paths if _WHOLE_MODEL.fullmatch(path)), None)
    if (
        found
        and not any(path.rpartition("/")[2] == CONFIG_FILE for path in paths)
        and not is_litgpt(dict.fromkeys(paths, 0))
    ):
        raise NotACheckpoint(
            found,
            "weights of a whole model, and adapters are what can be sent: `ckpt base add PATH --name NAME` records a model",
        )


def is_taken(path: str) -> bool:
    """Whether a file can be part of a checkpoint: not those that are hidden, and not a trainer's logs."""
    *folders, _ = parts = path.split("/")
    return not any(part.startswith(".") for part in parts) and not any(part in _NOT_TAKEN for part in folders)


# -- push


def push(scope: Scope, into: Target, commit: Commit) -> Pushed:
    """Carry out a commit whose files are in the store. The same content again is no new version.

    Raises:
        Conflict: it takes away what a version has.
        Outdated: its target is not at the commit that it is to follow.
        NotACheckpoint, CorruptFile, UnsafePickle: its files are no adapter.
        InvalidInput: the base model that an adapter names is not recorded.
        Refused: an adapter does not fit its base model.
        BlobSwept: a file was taken by a sweep meanwhile; again is fine.
    """
    workspace, name = scope.registry.workspace, str(into.adapter)
    with _following(scope, into, commit.parent):
        waiting = uploading.waiting(workspace, scope.principal, name)
        files = {entry.path: entry for entry in (*(waiting or ()), *commit.files) if is_taken(entry.path)}
        received = [_received(scope, into, commit, *found) for found in _checkpoints(files)]
        at = None if received else _current(scope, into)
        if not received and commit.deleted:
            raise Conflict(
                name,
                f"versions never change: {commit.deleted[0]} stays; a commit with all that is to be there is the next one",
            )
        if not received and at is not None and not _is_part(files):
            check_no_whole_model(files)
            received = [_next(into, commit, at, files)]
        if not received:
            return _keep(scope, into, at, files)
        checkpoint = _register(scope, into, received)
        if into.revision != MAIN:
            point(scope, checkpoint, into.revision)
        if waiting is not None:
            uploading.stop_waiting(workspace, scope.principal, name)
    return Pushed(commit=adapter_commit(checkpoint.digest))


def _register(scope: Scope, into: Target, received: Sequence[Received]) -> Checkpoint:
    """Register checkpoints; gives the last. Refusals call them by the adapter's name."""
    try:
        return uploading.register(scope.registry.workspace, scope.principal, received)[-1].checkpoint
    except Refused as error:
        raise Refused(replace(error.report, checkpoint=str(into.adapter))) from error


@contextmanager
def _following(scope: Scope, into: Target, parent: str) -> Iterator[None]:
    """Where it matters that nothing comes in between, within one transaction."""
    if not parent:
        yield
        return
    with scope.registry.workspace.writing():
        at = _current(scope, into)
        if at is None or adapter_commit(at.digest) != parent:
            raise Outdated("parent_commit", f"{into.adapter} is not at {parent[:12]}: look again")
        yield


def _current(scope: Scope, into: Target) -> Checkpoint | None:
    """The checkpoint that a target is at: what its revision means, or else the adapter's newest; None if there is none."""
    if into.newest is None:
        return None
    if into.revision != MAIN:
        with suppress(NotFound):  # an alias to be
            return scope.checkpoint(f"{into.adapter}@{into.revision}")
    return scope.checkpoint(str(into.adapter))


def point(scope: Scope, checkpoint: Checkpoint, alias: str) -> None:
    """Point an alias to a checkpoint, unless it does."""
    with suppress(NotFound):
        if scope.checkpoint(f"{checkpoint.adapter}@{alias}").digest == checkpoint.digest:
            return
    scope.registry.set_alias(checkpoint, alias)


# -- what a commit's files are


def _checkpoints(files: Mapping[str, FileEntry]) -> Iterator[tuple[int | None, tuple[FileEntry, ...]]]:
    """The checkpoints among files, each with the step that its folder tells: those of a run in order, then the one beside their folders."""
    for folder, step in {**step_folders(files), "": None}.items():
        prefix = folder and f"{folder}/"
        own = {path.removeprefix(prefix): each for path, each in files.items() if path.startswith(prefix)}
        if is_litgpt(dict.fromkeys(own, 0)) or (CONFIG_FILE in own and any(name in own for name in WEIGHTS_FILES)):
            yield step, tuple(replace(each, path=path) for path, each in sorted(own.items()))


def _received(scope: Scope, into: Target, commit: Commit, step: int | None, files: tuple[FileEntry, ...]) -> Received:
    """A checkpoint as it is registered: of what was sent, the files that belong to it."""
    location = scope.registry.workspace.stored_folder(files, str(into.adapter))
    adapter = read_adapter(location)
    logged_at, metrics = trainer_state(location)
    return Received(
        files=tuple(entry for entry in files if entry.path in adapter.files),
        said=_said(into, commit, _base(scope, adapter.base_name).digest),
        step=next((each for each in (logged_at, step, _told_step(commit)) if each is not None), None),
        metrics=metrics,
    )


def _told_step(commit: Commit) -> int | None:
    """The step that the Trainer of transformers tells in its commit's message: it keeps its state to itself."""
    match = _TRAINERS_WORDS.match(commit.message)
    return int(match[1]) if match else None


def _next(into: Target, commit: Commit, at: Checkpoint, files: Mapping[str, FileEntry]) -> Received:
    """A version with other files beside the same weights: what was measured of them holds."""
    together = {**{entry.path: entry for entry in at.manifest.files}, **files}
    return Received(
        files=tuple(together[path] for path in sorted(together)),
        said=replace(_said(into, commit, at.base), origin=at.origin),
        run=at.run,
        step=at.step,
        metrics=at.metrics,
    )


def _said(into: Target, commit: Commit, base: Digest) -> Registration:
    return Registration(adapter=str(into.adapter), base=base.hex, note=commit.message, source=f"hub:{into.adapter}")


def _base(scope: Scope, name: str) -> BaseModel:
    """The base model that an adapter's configuration names: as it is recorded, or by the id of its repository here."""
    if not name:
        raise InvalidInput(
            "base_model_name_or_path", "", f"{CONFIG_FILE} has to name the base model, as it is recorded here"
        )
    with suppress(UnknownBase):
        return scope.registry.base(name)
    found = None
    with suppress(NotFound):
        found = scope.repository(name)
    if found is not None and found.kind == "base":
        return scope.registry.base(found.base)
    advice = f"`ckpt base add PATH --name {name}` records it{_recorded(scope)}"
    if found is not None and found.kind == "merged":
        advice = f"it is a merged model; `ckpt merge` writes it to a folder, and {advice}"
    raise InvalidInput("base_model_name_or_path", name, f"no base model of this name is recorded: {advice}")


def _recorded(scope: Scope) -> str:
    """What could be said instead: whoever trained on a copy of their own has its path there."""
    names = [each.name for each in scope.registry.bases()]
    more = ", …" if len(names) > _TOLD_BASES else ""
    return f"; {CONFIG_FILE} may name {', '.join(names[:_TOLD_BASES])}{more} instead" if names else ""


# -- what waits


def _is_part(files: Iterable[str]) -> bool:
    """Whether files have a part of what makes a checkpoint: the rest is still to come."""
    return any(path.rpartition("/")[2] in _ESSENTIAL for path in files)


def _keep(scope: Scope, into: Target, at: Checkpoint | None, files: Mapping[str, FileEntry]) -> Pushed:
    """Keep files for the rest of their checkpoint. The target stays where it is; one that is not there yet has some commit."""
    check_no_whole_model(files)
    entries = tuple(files[path] for path in sorted(files))
    uploading.keep_waiting(scope.registry.workspace, scope.principal, str(into.adapter), entries)
    commit = name_of([[each.path, each.digest.hex] for each in entries]) if at is None else adapter_commit(at.digest)
    return Pushed(commit=commit, waiting=tuple(sorted(files)))
