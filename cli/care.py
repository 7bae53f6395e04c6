"""`ckpt gc`, `verify`, `doctor`: give back room, see that everything is there, and whether all is set up as it should be."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from cli import output, parse
from cli.options import Json, flag
from registry import connect
from registry.codec import plain

_DAMAGED, _NOT_WELL = 7, 5
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def gc(
    grace: Annotated[
        str, typer.Option(metavar="AGE", help="How long a file must have been marked first, such as 24h or 7d.")
    ] = "24h",
    dry_run: Annotated[bool, flag("--dry-run", "Only say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Mark the files of the store that nothing needs, and remove those that were marked long enough ago. Safe while others work."""
    with connect() as registry:
        swept = registry.sweep(grace=parse.duration(grace), dry_run=dry_run)
    if json:
        output.print_json(plain(swept))
        return
    output.print_line(
        f"{'would remove' if dry_run else 'removed'} {swept.blobs} files, {output.size(swept.size_bytes)}"
    )
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
    with connect() as registry:
        found = registry.diagnose()
    if json:
        output.print_json(plain(found))
    else:
        output.print_table(
            ["", "what", "found", "what to do"],
            [[Text(each.verdict, style=_STYLES[each.verdict]), each.name, each.found, each.advice] for each in found],
        )
    if any(each.verdict == "problem" for each in found):
        raise typer.Exit(_NOT_WELL)
