"""`ckpt gc`, `verify`, `doctor`: give back room, see that everything is there, and whether all is set up as it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cli import output, parse
from cli.options import Json, flag
from registry import connect
from registry.codec import plain
from registry.local_copies import sweep_copies

if TYPE_CHECKING:
    from registry.sweeping import Swept

_DAMAGED, _NOT_WELL = 7, 5
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def gc(
    grace: Annotated[
        str, typer.Option(metavar="AGE", help="How long a file must have been marked first, such as 24h or 7d.")
    ] = "24h",
    unused: Annotated[
        str,
        typer.Option(
            metavar="AGE",
            help="How long a copy on this machine, of what engines and `ckpt chat` read, must not have been used.",
        ),
    ] = "30d",
    local: Annotated[bool, flag("--local", "Only the copies on this machine, for which no right is needed.")] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Only say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Mark the files of the store that nothing needs, and remove those that were marked long enough ago. Safe while others work.

    Messages to webhooks that arrived or failed 30 days ago are forgotten, and copies on this machine removed that are used no more.
    """
    waits, idle = parse.duration(grace), parse.duration(unused)
    with connect() as registry:
        swept = None if local else registry.sweep(grace=waits, dry_run=dry_run)
        copies = sweep_copies(registry.settings.home, unused=idle, dry_run=dry_run)
    if json:
        output.print_json({**(plain(swept) if swept else {}), **plain(copies)})
        return
    done = "would remove" if dry_run else "removed"
    if swept is not None:
        _print_swept(swept, done, grace)
    if local or copies.copies:
        output.print_line(f"{done} {copies.copies} copies on this machine, {output.size(copies.copies_bytes)}")


def _print_swept(swept: Swept, done: str, grace: str) -> None:
    output.print_line(f"{done} {swept.blobs} files, {output.size(swept.size_bytes)}")
    if swept.deliveries:
        output.print_line(f"{done} {swept.deliveries} messages to webhooks from their log")
    if swept.marked:
        output.say(
            f"{swept.marked} more, {output.size(swept.marked_bytes)}, are not needed: a `ckpt gc` in {grace} removes them"
        )


def verify(
    read_data: Annotated[bool, flag("--read-data", "Read all bytes and compare their digests, too.")] = False,
    subset: Annotated[
        str, typer.Option(metavar="N/T", help="Only the n-th of t parts, such as 1/10; always the same ones.")
    ] = "",
    json: Json = False,
) -> None:
    """Name every object that is missing or damaged, and what needs it. Changes nothing; exits with 7 when there is one."""
    with connect() as registry, output.progress() as progress:
        found = registry.verify(read_data=read_data, subset=subset, progress=progress)
    if json:
        output.print_json(plain(found))
    else:
        rows = [[each.what, each.found, each.expected, ", ".join(each.needed_by)] for each in found.damages]
        if rows:
            output.print_table(["what", "found", "expected", "needed by"], rows)
        read = f", {output.size(found.read_bytes)} read" if read_data else ""
        output.say(f"{found.objects} objects{read}, {len(rows) or 'nothing'} wrong")
    if not found.is_sound:
        raise typer.Exit(_DAMAGED)


def doctor(json: Json = False) -> None:
    """Look at the settings, the database, the store, clocks, versions and room, and say what to do. Exits with 5 on a problem."""
    from registry.diagnosing import diagnose_from  # noqa: PLC0415 - the other commands need not wait for it

    with connect() as registry:
        settings = registry.settings
        found = diagnose_from(settings, registry.diagnose) if settings.server else registry.diagnose()
    if json:
        output.print_json(plain(found))
    else:
        output.print_table(
            ["", "what", "found", "what to do"],
            [[Text(each.verdict, style=_STYLES[each.verdict]), each.name, each.found, each.advice] for each in found],
        )
    if any(each.verdict == "problem" for each in found):
        raise typer.Exit(_NOT_WELL)
