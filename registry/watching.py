"""Watch a folder that a training run writes into, and take in each checkpoint when it is complete.

A checkpoint is complete when it can be read as one (headers and sizes of its files agree, zips have their end), what its trainer writes last
is there, and nothing in it has changed for a while. It is looked at again after it was taken: had it changed meanwhile, it is taken anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from registry.errors import RegistryError
from registry.intake import Registration, check_words
from registry.outbox import Outbox, Waiting

_CHECKPOINT = re.compile(r"(?:checkpoint|step)-\d+|final")
_LITGPT = ("lit_model.pth.lora", "lit_model.pth.adapter", "lit_model.pth.adapter_v2")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", *_LITGPT)
# What a trainer writes last, by what it writes first; another trainer may not write it at all, and is waited for longer.
_LAST = {"adapter_config.json": "trainer_state.json", **dict.fromkeys(_LITGPT, "prompt_style.yaml")}
_LONGER = 10
_Signature = tuple[tuple[str, int, int], ...]


@final
@dataclass(frozen=True, slots=True)
class Taken:
    """A checkpoint that went into the outbox, or why it did not; and the older ones that had to be dropped for it."""

    folder: Path
    problem: RegistryError | None = None
    dropped: tuple[Waiting, ...] = ()


@final
@dataclass(slots=True)
class Watch:
    """A folder that is watched.

    Args:
        folder: where runs write.
        outbox: where checkpoints go.
        said: what is said of each.
        home: where is written down what was taken, so that a new start takes nothing twice.
        settle_seconds: how long nothing may have changed in a checkpoint.

    Raises:
        InvalidReference: a name that is said is none, so that nothing could ever be registered.
    """

    folder: Path
    outbox: Outbox
    said: Registration
    home: Path
    settle_seconds: float = 5.0
    _seen: dict[Path, tuple[_Signature, float]] = field(default_factory=dict)
    _taken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_words(self.said, 1)
        with suppress(OSError, ValueError):
            self._taken = dict(json.loads(self._record.read_text()))

    @property
    def _record(self) -> Path:
        name = hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:32]
        return self.home / "watching" / f"{name}.json"

    def look(self, now: Callable[[], float] = time.monotonic) -> Iterator[Taken]:
        """Take what is complete and new."""
        for place in checkpoint_folders(self.folder):
            found = signature(place)
            mark = _mark(found)
            if not found or self._taken.get(self._key(place)) == mark:
                continue
            before, since = self._seen.get(place, ((), 0.0))
            if before != found:
                self._seen[place] = found, now()
                continue
            if now() - since >= self._patience(found):
                yield from self._take(place, found)

    def _patience(self, found: _Signature) -> float:
        names = {name for name, _, _ in found}
        is_over = all(last in names for first, last in _LAST.items() if first in names)
        return self.settle_seconds if is_over else _LONGER * self.settle_seconds

    def _take(self, place: Path, found: _Signature) -> Iterator[Taken]:
        try:
            dropped = self.outbox.put(place, self.said)
        except RegistryError as error:
            if signature(place) != found:
                return  # deleted or written to meanwhile: it is looked at again
            self._note(place, found)  # not again, until it changes
            yield Taken(place, error)
            return
        is_settled = signature(place) == found or not place.exists()
        if is_settled:
            self._note(place, found)
        if is_settled or dropped:
            yield Taken(place, dropped=tuple(dropped))

    def _note(self, place: Path, found: _Signature) -> None:
        self._taken[self._key(place)] = _mark(found)
        self._record.parent.mkdir(parents=True, exist_ok=True)
        draft = self._record.with_suffix(".draft")
        draft.write_text(json.dumps(self._taken))
        draft.replace(self._record)

    def _key(self, place: Path) -> str:
        return str(place.relative_to(self.folder))

    @property
    def is_waiting(self) -> bool:
        """Whether something that was seen is not taken yet."""
        return any(
            self._taken.get(self._key(place)) != _mark(signature(place)) for place in checkpoint_folders(self.folder)
        )


def checkpoint_folders(folder: Path) -> list[Path]:
    """Every folder that is, or is becoming, a checkpoint: by its name, or by the weights in it. Not those inside of checkpoints."""
    found: list[Path] = []
    for place, names, files in os.walk(folder):
        is_one = _CHECKPOINT.fullmatch(Path(place).name) or (
            Path(place) != folder and any(name in files for name in _WEIGHTS)
        )
        if is_one and any(name in files for name in (*_WEIGHTS, "adapter_config.json")):
            found.append(Path(place))
            names.clear()
        else:
            names[:] = sorted(name for name in names if not name.startswith("."))
    return sorted(found, key=_in_time)


def _in_time(place: Path) -> tuple[str, int, str]:
    number = re.search(r"\d+$", place.name)
    return str(place.parent), int(number[0]) if number else 1 << 62, place.name


def signature(place: Path) -> _Signature:
    """Names, sizes and times of the files of a folder; empty where it is gone."""
    found = []
    for at, _, files in os.walk(place):
        for name in files:
            with suppress(OSError):
                status = os.stat(os.path.join(at, name))
                found.append((os.path.relpath(os.path.join(at, name), place), status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def _mark(found: _Signature) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
