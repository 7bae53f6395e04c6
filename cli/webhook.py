"""`ckpt webhook`: who is told when something is shipped, merged, pointed to or registered."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output
from cli.options import Json
from registry import connect
from registry.codec import plain
from registry.teamwork import Delivery

webhook_app = typer.Typer(no_args_is_help=True, help="Addresses that are told of changes.")

_Number = Annotated[int, typer.Argument(metavar="ID", help="Its number in `ckpt webhook list`.")]


@webhook_app.command("add")
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to send to: https://…")],
    on: Annotated[
        str,
        typer.Option("--on", metavar="ACTION,…", help="Of what: shipped, rolled_back, merged, alias, registered."),
    ] = "shipped,rolled_back,merged,alias",
    json: Json = False,
) -> None:
    """Tell an address of changes from now on. Prints the secret that messages are signed with, this once."""
    with connect() as registry:
        made = registry.add_webhook(url, [each.strip() for each in on.split(",") if each.strip()])
    if json:
        output.print_json(plain(made))
    else:
        output.print_line(made.secret)
        output.say(f"webhook {made.webhook.id}; keep the secret, it is not shown again")


@webhook_app.command("list")
def list_(json: Json = False) -> None:
    """List the webhooks."""
    with connect() as registry:
        found = registry.webhooks()
    if json:
        output.print_json(plain(found))
        return
    rows = [
        [str(each.id), each.url, ", ".join(each.actions), each.author, output.ago(each.created_at)] for each in found
    ]
    output.print_table(["id", "url", "told of", "by", "added"], rows, right=["id"])


@webhook_app.command("rm")
def rm(number: _Number) -> None:
    """Remove a webhook with the log of its messages."""
    with connect() as registry:
        removed = registry.remove_webhook(number)
    output.print_line(f"removed webhook {number}, {removed.url}")


@webhook_app.command("test")
def try_(number: _Number, json: Json = False) -> None:
    """Send a message now, once. Exits with 1 when it does not arrive."""
    with connect() as registry:
        delivery = registry.test_webhook(number)
    if json:
        output.print_json(plain(delivery))
    else:
        output.print_line(f"{delivery.state}: {_answer(delivery)}")
    if delivery.state != "delivered":
        raise typer.Exit(1)


@webhook_app.command("log")
def log(
    number: _Number,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, metavar="N", help="At most so many.")] = 50,
    json: Json = False,
) -> None:
    """List the last messages to a webhook, the newest first."""
    with connect() as registry:
        found = registry.deliveries(number, limit)
    if json:
        output.print_json(plain(found))
        return
    rows = [
        [str(each.id), each.action, each.state, str(each.attempts), _answer(each), output.ago(each.created_at)]
        for each in found
    ]
    output.print_table(["id", "action", "state", "tries", "answer", "queued"], rows, right=["id", "tries"])


def _answer(delivery: Delivery) -> str:
    return delivery.error or (f"HTTP {delivery.status}" if delivery.status else "")
