"""`ckpt watch` and `ckpt outbox`: checkpoints are registered while they are written, or later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output, parse
from cli.errors import explain
from cli.options import Json, flag
from registry import connect
from registry.errors import InvalidInput, MissingPackage, PathNotFound, RegistryError
from registry.manifest import to_json

if TYPE_CHECKING:
    from registry.intake import Registered
    from registry.outbox import Outbox, Waiting
    from registry.service import Registry
    from registry.watching import Watch

outbox_app = typer.Typer(no_args_is_help=True, help="Checkpoints that wait to be registered.")
_LONGEST_WAIT = 30.0


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a run, or several, write their checkpoints.")],
    adapter: Annotated[str, typer.Option(metavar="NAME", help="The adapter's name. Default: from the folders.")] = "",
    base: Annotated[str, typer.Option(metavar="REF", help="The base model. Default: what the files say.")] = "",
    run: Annotated[str, typer.Option(metavar="NAME", help="The run's name. Default: from the folders.")] = "",
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag for each; may be repeated.")] = None,
    settle: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How long nothing may have changed in a checkpoint.")
    ] = 5.0,
    with_state: Annotated[bool, flag("--with-state", "Keep what the trainer needs to go on, too.")] = False,
    once: Annotated[bool, flag("--once", "End when all that is there is registered.")] = False,
    json: Json = False,
) -> None:
    """Register the checkpoints of a run while it writes them, each when it is complete. Ctrl-C ends it; a new start takes nothing twice."""
    from registry.intake import Registration  # noqa: PLC0415 - the help need not wait for it
    from registry.outbox import Outbox  # noqa: PLC0415
    from registry.watching import Watch  # noqa: PLC0415

    if not folder.is_dir():
        raise PathNotFound(str(folder))
    said = Registration(adapter=adapter, base=base, run=run, tags=parse.pairs(tag or (), "tag"), with_state=with_state)
    with connect() as registry:
        box = Outbox(registry.settings.home)
        watched, sending = Watch(folder, box, said, registry.settings.home, settle), _Sending(box, registry, json)
        output.say(f"watching {output.plain(str(folder))}" + ("" if once else "; Ctrl-C ends it"))
        is_all_read = True
        for _ in _ticks(folder, watched, once=once):
            is_all_read &= _take(watched, json=json)
            is_all_sent = sending.send()
            if once and not watched.is_waiting:
                raise typer.Exit(0 if is_all_read and is_all_sent else 1)


def _ticks(folder: Path, watched: Watch, *, once: bool) -> Iterator[None]:
    """Whenever something may have become complete: after each change, once that has settled."""
    yield
    if once:
        while True:
            time.sleep(min(watched.settle_seconds, 1.0))
            yield
    try:
        from watchfiles import watch as changes  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingPackage("watchfiles", "watch") from error
    settle = int(1000 * watched.settle_seconds)
    pause = min(settle, 1000)
    for _ in changes(folder, debounce=pause, rust_timeout=pause, yield_on_timeout=True, raise_interrupt=True):
        yield


def _take(watched: Watch, *, json: bool) -> bool:
    """Take what is complete; tells whether all of it could be read."""
    is_all_read = True
    for taken in watched.look():
        for each in taken.dropped:
            if json:
                output.print_json_line({"dropped": each.said.source, "step": each.said.step})
            else:
                output.say(f"the outbox is full: {_named(each.said.adapter, each.said.step)} is dropped")
        if taken.problem is not None:
            is_all_read, why = False, explain(taken.problem).message
            if json:
                output.print_json_line({"folder": str(taken.folder), "problem": why})
            else:
                output.say(f"{output.plain(str(taken.folder))} is left: {output.plain(why)}")
    return is_all_read


@dataclass(slots=True)
class _Sending:
    """Registers what waits. After a failure nothing is tried for a while, longer and longer."""

    box: Outbox
    registry: Registry
    json: bool
    until: float = 0.0
    pause: float = 1.0

    def send(self) -> bool:
        """Register what waits; tells whether nothing waits any more."""
        if time.monotonic() < self.until:
            return not self.box.waiting()
        is_all_sent = True
        for done in self.box.send(self.registry):
            is_all_sent &= not isinstance(done, tuple)
            if not (isinstance(done, tuple) and done[0].problem == explain(done[1]).message):  # said once
                _tell(done, json=self.json)
        self.pause = 1.0 if is_all_sent else min(2 * self.pause, _LONGEST_WAIT)
        self.until = 0.0 if is_all_sent else time.monotonic() + self.pause
        return is_all_sent


def _tell(done: Registered | tuple[Waiting, RegistryError], *, json: bool) -> None:
    """One that is registered now, or why it waits."""
    if isinstance(done, tuple):
        waiting, error = done
        named = _named(waiting.said.adapter, waiting.said.step)
        output.say(f"{named} waits: {output.plain(explain(error).message)}")
    elif json:
        known = done.checkpoint
        output.print_json_line({"checkpoint": known.ref, "step": known.step, "created": done.created})
    else:
        named = _named(done.checkpoint.ref, done.checkpoint.step)
        output.print_line(f"{'registered' if done.created else 'known'} {named}")


def _named(name: str, step: int | None) -> str:
    return name if step is None else f"{name}, step {step}"


@outbox_app.command("list")
def outbox_list(json: Json = False) -> None:
    """Show what waits to be registered, and why."""
    from registry.outbox import Outbox  # noqa: PLC0415

    with connect() as registry:
        found = Outbox(registry.settings.home).waiting()
    if json:
        output.print_json([to_json(each) for each in found])
        return
    rows = [
        [
            each.id,
            each.said.adapter,
            "" if each.said.step is None else str(each.said.step),
            output.size(each.size_bytes),
            each.problem,
        ]
        for each in found
    ]
    if rows:
        output.print_table(["id", "adapter", "step", "size", "why it waits"], rows, right=["step", "size"])
    else:
        output.say("nothing waits")


@outbox_app.command("send")
def outbox_send(json: Json = False) -> None:
    """Register what waits. What fails stays, and is told of."""
    from registry.outbox import Outbox  # noqa: PLC0415

    failed: RegistryError | None = None
    with connect() as registry:
        for done in Outbox(registry.settings.home).send(registry):
            if isinstance(done, tuple):
                failed = done[1]
            _tell(done, json=json)
    if failed is not None:
        raise failed


@outbox_app.command("rm")
def outbox_rm(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `ckpt outbox list` shows it.")],
    yes: Annotated[bool, flag("--yes", "Do not ask.", "-y")] = False,
) -> None:
    """Forget a checkpoint that waits; its files go with it."""
    from registry.outbox import Outbox  # noqa: PLC0415

    with connect() as registry:
        box = Outbox(registry.settings.home)
        if id not in {each.id for each in box.waiting()}:
            raise InvalidInput("ID", id, "nothing of this id waits")
        if not output.confirm(f"forget {id}?", yes=yes):
            raise typer.Abort
        box.drop(id)
    output.print_line(f"forgot {id}")
