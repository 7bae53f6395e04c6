"""`ckpt ship`, `shipped`, `rollback`: which version is live where."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output, parse, views
from cli.options import Json, Note, Subject, flag
from registry import connect
from registry.errors import InvalidInput
from registry.manifest import to_json, utc_now


def ship(
    ref: Subject,
    to: Annotated[str, typer.Option("--to", metavar="ENV", help="The environment, such as production.")],
    note: Note = "",
    override: Annotated[
        str, typer.Option(metavar="REASON", help="Ship it although the policy is against it. The reason is recorded.")
    ] = "",
    json: Json = False,
) -> None:
    """Record that a checkpoint or merged model went live in an environment."""
    with connect() as registry:
        shipment = registry.ship(registry.subject(ref), to, note, override=override)
    if json:
        output.print_json(to_json(shipment))
    else:
        output.print_line(f"shipped {shipment.checkpoint} to {to} (no. {shipment.number})")


def shipped(
    environment: Annotated[str | None, typer.Argument(metavar="ENV", help="Of this environment only.")] = None,
    at: Annotated[
        str, typer.Option("--at", metavar="TIME", help="At this time: 2026-05-03, '3 May' (its end), 2026-05-03T14:00.")
    ] = "",
    history: Annotated[bool, flag("--history", "Everything that was ever live.")] = False,
    json: Json = False,
) -> None:
    """Show what is live where, since when, by whom, from which base model and checkpoint; or what was."""
    if at and history:
        raise InvalidInput("--at", at, "not together with --history")
    moment = parse.point_in_time(at, utc_now()) if at else None
    with connect() as registry:
        found = registry.shipments(environment) if history else registry.shipped(environment, moment)
    if moment:
        output.say(f"at {moment.astimezone().isoformat(sep=' ', timespec='seconds')}")
    if json:
        output.print_json([to_json(each) for each in found])
    elif found:
        views.print_shipments(found, history=history or moment is not None)
    else:
        output.say("nothing was live then" if moment else "nothing was shipped yet: `ckpt ship REF --to ENV`")


def rollback(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="The environment.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter, where several are live there.")] = "",
    note: Note = "",
    json: Json = False,
) -> None:
    """Bring back what was live before. Repeated, it walks further back."""
    with connect() as registry:
        before, now = registry.rollback(environment, adapter, note)
    if json:
        output.print_json({"before": to_json(before), "now": to_json(now)})
    else:
        output.print_line(f"{environment} is back on {now.checkpoint}, before {before.checkpoint}")
