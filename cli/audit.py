"""`ckpt audit log`, `verify`, `export`: the chain of everything that was ever changed, checked and written down elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cli import output, parse, views
from cli.options import Json
from registry import connect
from registry.codec import plain
from registry.errors import InvalidInput
from registry.manifest import utc_now

audit_app = typer.Typer(no_args_is_help=True, help="The chain of events: who changed what, provably.")


@audit_app.command("log")
def log(
    since: Annotated[
        str, typer.Option(metavar="TIME", help="From then on: 7d, 24h, 2026-05-03 or 2026-05-03T14:00.")
    ] = "",
    actor: Annotated[str, typer.Option(metavar="NAME", help="By this one only.")] = "",
    subject: Annotated[str, typer.Option(metavar="SUBJECT", help="Of an adapter, checkpoint or base model only.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the last so many.")] = None,
    json: Json = False,
) -> None:
    """Show the events with their numbers and hashes, oldest first."""
    start = _start(since, utc_now()) if since else None
    with connect() as registry:
        events = registry.history(subject, limit, author=actor, since=start)
    if json:
        output.print_json(plain(events))
    elif events:
        rows = [
            [str(e.number), output.when(e.at), e.author, e.action, e.subject, views.detail(e.detail), e.hash[:12]]
            for e in events
        ]
        output.print_table(["number", "when", "who", "did", "to", "detail", "hash"], rows, right=["number"])
    else:
        output.say("no such events")


@audit_app.command("verify")
def verify(
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An export, or its last line, kept elsewhere. May be repeated."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The public P-256 key that must have signed them.")
    ] = None,
    json: Json = False,
) -> None:
    """Walk the chain of events to its end. With checkpoints kept elsewhere it also shows when its end was cut off, or all of it rewritten."""
    from registry import auditing  # noqa: PLC0415 - the help need not wait for it

    if key and not checkpoint:
        raise InvalidInput("--key", str(key), "together with --checkpoint FILE")
    known = [auditing.read_checkpoint(path, key).checkpoint for path in checkpoint or ()]
    with connect() as registry:
        state = auditing.check(registry.export_audit(), known) if known else registry.verify_chain()
    if json:
        output.print_json({**plain(state), "checkpoints": plain(known)})
        return
    compared = {0: "", 1: ", as the checkpoint says"}.get(len(known), f", as {len(known)} checkpoints say")
    output.print_line(f"{state.count} events, every one as it was written{compared}; the last has {state.hash}")
    if not known:
        output.say(
            "a whole chain can be written anew: compare it with a checkpoint kept elsewhere, see `ckpt audit export`"
        )


@audit_app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file: an event a line, then a checkpoint.")],
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="A private P-256 key to sign with.")] = None,
) -> None:
    """Write all events down as JSON lines, closed by a checkpoint. Keep it where whoever may change the database cannot."""
    from registry import auditing  # noqa: PLC0415 - as above

    with connect() as registry:
        origin = registry.settings.address
        signed = auditing.export(registry.export_audit(), file, origin=origin, at=utc_now(), key=key)
    output.print_line(f"{signed.checkpoint.size} events in {file}; the last has {signed.checkpoint.root}")
    if not signed.signature:
        output.say("not signed: anybody could have written it; --key PEM signs it")


def _start(text: str, now: datetime) -> datetime:
    """`7d` ago, or the beginning of a day, or a time; local where it has no zone."""
    try:
        return now - parse.duration(text)
    except InvalidInput:
        pass
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        raise InvalidInput("since", text, "expected for example 7d, 2026-05-03 or 2026-05-03T14:00") from None
