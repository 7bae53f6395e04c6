"""A client that writes without pause until it is killed: `writer.py FOLDER NAME SEED MERGING`. A line of JSON for all that it is told."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from random import Random

from registry import connect
from registry.errors import RegistryError
from registry.manifest import Checkpoint
from registry.registering import Registration
from registry.service import Registry

ADAPTERS = 24
MOST = 4  # so few that most contents come and go


def tell(did: str, **what: object) -> None:
    sys.stdout.write(json.dumps({"did": did, **what}) + "\n")
    sys.stdout.flush()


class Writer:
    def __init__(self, registry: Registry, folder: Path, name: str, random: Random, *, merging: bool) -> None:
        self._registry, self._folder, self._name, self._random, self._merging = registry, folder, name, random, merging
        self._mine: list[Checkpoint] = []
        self._count = 0

    def step(self) -> None:
        chance = self._random.random()
        if len(self._mine) > MOST:
            self.remove()
        elif chance < 0.5 or not self._mine:
            self.register()
        elif chance < 0.75:
            self.note()
        elif chance < 0.9 or not self._merging:
            self.remove()
        else:
            self.merge()

    def register(self) -> None:
        self._count += 1
        place = self._folder / f"adapter-{self._random.randrange(ADAPTERS)}"
        said = Registration(base="base", adapter=f"{self._name}-{self._count}")
        found = self._registry.register(str(place), said).registered[0].checkpoint
        self._mine.append(found)
        tell("register", ref=found.ref, digest=found.digest.hex)

    def note(self) -> None:
        checkpoint = self._random.choice(self._mine)
        text = f"note {self._random.random()}"
        self._registry.note(checkpoint, text)
        tell("note", ref=checkpoint.ref, text=text)

    def remove(self) -> None:
        checkpoint = self._mine.pop(self._random.randrange(len(self._mine)))
        tell("removing", ref=checkpoint.ref)
        self._registry.remove(checkpoint)
        tell("remove", ref=checkpoint.ref)

    def merge(self) -> None:
        checkpoint = self._mine.pop()  # what was merged stays
        self._count += 1
        out = str(self._folder / f"out-{self._name}-{self._count}") if self._random.random() < 0.5 else None
        result = self._registry.merge(self._registry.plan(checkpoint), out=out)
        if result.created:
            tell("merge", digest=result.merged.digest.hex)


def main() -> None:
    folder, name, seed, merging = sys.argv[1:]
    with connect() as registry:
        writer = Writer(registry, Path(folder), name, Random(int(seed)), merging=merging == "1")
        while True:
            try:
                writer.step()
            except RegistryError as error:
                tell("fail", code=error.code, why=str(error))
                time.sleep(0.05)


main()
