"""32 clients at once: `crowd.py FOLDER COUNT MERGING`. Each is a process of its own; all of them register, note and point to the same names."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from registry import connect
from registry.errors import MergeRunning
from registry.registering import Registration


def work(folder: Path, number: int, *, merging: bool) -> None:
    with connect() as registry:
        own = Registration(base="base", adapter=f"own-{number}", note=f"by {number}")
        mine = registry.register(str(folder / f"adapter-{number % 24}"), own).registered[0].checkpoint
        registry.register(str(folder / f"adapter-{number % 24}"), Registration(base="base", adapter="shared"))
        registry.set_alias(registry.resolve("shared"), "live")
        registry.note(mine, f"second by {number}")
        registry.ship(mine, "production")
        if merging and number % 8 == 0:
            with suppress(MergeRunning):  # somebody else is at this very one
                registry.merge(registry.plan(mine))


def main() -> None:
    folder, count, merging = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                work(folder, number, merging=merging)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a child must not go on as its parent
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(f"{len(failed)} of {count} failed" if failed else 0)


main()
