"""Checkpoints that wait to be registered: kept on this machine until the registry has them, whatever becomes of the run that wrote them.

    <home>/outbox/<time>-<random>/files/…      the checkpoint's files: hard links where the file system has them, else copies
    <home>/outbox/<time>-<random>/said.json    what is said of it; comes last, and makes it complete
    <home>/outbox/<time>-<random>/error.json   why the last try failed

A trainer deletes old checkpoints, but does not write into those that it has written: a link keeps what was there.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from registry.codec import from_json, plain
from registry.disk import Translating
from registry.errors import NotACheckpoint, RegistryError, StorageFailed
from registry.failures import to_document
from registry.intake import Registered, Registration, search
from registry.refs import nearest_name
from registry.training_state import write_beginning
from registry.wording import explain

if TYPE_CHECKING:
    from registry.service import Registry

LIMIT_BYTES = 20 << 30
# What the formats read beside the files that they take.
_BESIDE = ("trainer_state.json",)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A checkpoint in the outbox. `problem` is why the last try failed, empty where there was none."""

    id: str
    said: Registration
    size_bytes: int
    problem: str


@final
class Outbox:
    """The outbox of a home. Several processes may use it.

    Args:
        home: the registry's home on this machine.
        limit_bytes: what it may hold; the oldest are dropped for newer ones.
    """

    def __init__(self, home: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder, self._limit = home / "outbox", limit_bytes

    def put(self, path: Path, said: Registration) -> list[Waiting]:
        """Take a checkpoint in. What the place of its files tells is said with it, since they leave it.

        Args:
            path: its folder.
            said: what is said of it.

        Returns:
            The ones that had to be dropped for it.

        Raises:
            PathNotFound, NotACheckpoint, CorruptFile, UnsafePickle: it is none, or not complete.
            StorageFailed: the disk does not take it.
        """
        found = search(str(path), with_state=said.with_state).found
        if len(found) != 1:
            raise NotACheckpoint(str(path), f"expected one checkpoint, found {len(found)}")
        (only,) = found
        own = {metric.name for metric in said.metrics}
        whole = replace(
            said,
            adapter=said.adapter or str(nearest_name(only.adapter_name, "adapter")),
            run=said.run or only.run,
            step=only.step if said.step is None else said.step,
            metrics=(*(metric for metric in only.metrics if metric.name not in own), *said.metrics),
            source=said.source or only.location.url,
        )
        folder = self._folder / f"{time.time_ns():020}-{secrets.token_hex(4)}"
        with Translating(str(folder)):
            size = _link([*only.adapter.files, *_BESIDE], path, folder / "files")
            if only.began is not None:
                write_beginning(folder, only.began)
            _write(folder / "said.json", {"said": plain(whole), "size_bytes": size})
        return self._make_room(folder.name)

    def _make_room(self, newest: str) -> list[Waiting]:
        waiting = self.waiting()
        dropped = []
        total = sum(each.size_bytes for each in waiting)
        for each in waiting:
            if total <= self._limit or each.id == newest:
                break
            total -= each.size_bytes
            dropped.append(each)
            shutil.rmtree(self._folder / each.id, ignore_errors=True)
        return dropped

    def waiting(self) -> list[Waiting]:
        """Every checkpoint that waits, the oldest first."""
        found = []
        for place in sorted(self._folder.glob("*/said.json")):
            with suppress(OSError, ValueError, KeyError, RegistryError):  # sent meanwhile, or not one of ours
                document = json.loads(place.read_text())
                problem = place.with_name("error.json")
                found.append(
                    Waiting(
                        id=place.parent.name,
                        said=from_json(Registration, document["said"]),
                        size_bytes=int(document["size_bytes"]),
                        problem=str(json.loads(problem.read_text())["message"]) if problem.exists() else "",
                    )
                )
        return found

    def send(self, registry: Registry) -> Iterator[Registered | tuple[Waiting, RegistryError]]:
        """Register what waits, the oldest first; what fails stays, with its error. Only one process sends at a time; others find nothing to do.

        Args:
            registry: where to.
        """
        with self._alone() as is_alone:
            for each in self.waiting() if is_alone else ():
                place = self._folder / each.id
                try:
                    (done,) = registry.register(str(place / "files"), each.said).registered
                except RegistryError as error:
                    self._note_failure(place, error)
                    yield each, error
                    continue
                shutil.rmtree(place, ignore_errors=True)
                yield done

    def _note_failure(self, place: Path, error: RegistryError) -> None:
        with suppress(OSError):
            _write(place / "error.json", {**to_document(error), "message": explain(error).message})

    def drop(self, name: str) -> None:
        """Forget a checkpoint that waits.

        Raises:
            StorageFailed: the disk does not let it go.
        """
        with Translating(str(self._folder)):
            shutil.rmtree(self._folder / Path(name).name)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is sending."""
        if not self._folder.is_dir():
            yield False
            return
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)


def link(old: Path, new: Path) -> None:
    """Have a file in another place too: linked where the file system can, else copied."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _link(names: list[str], source: Path, target: Path) -> int:
    """Link files into a folder, or copy them; gives their bytes. Of those beside, only what is there."""
    total = 0
    for name in names:
        old, new = source / name, target / name
        if name in _BESIDE and not old.is_file():
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        if new.exists():
            continue
        link(old, new)
        total += new.stat().st_size
    if total == 0:
        raise StorageFailed(str(source), "there was nothing to keep")
    return total


def _write(path: Path, document: object) -> None:
    """Write JSON that is there as a whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document))
    draft.replace(path)
