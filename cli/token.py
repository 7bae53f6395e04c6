"""`ckpt token`: who may use the server, and for what."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import output
from cli.options import Json
from registry import connect
from registry.access import parse_span
from registry.errors import InvalidInput
from registry.teamwork import Role, Token

token_app = typer.Typer(no_args_is_help=True, help="Tokens: who may use the server, and for what.")


@token_app.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; what is done with it is signed so.")],
    role: Annotated[
        str,
        typer.Option(metavar="ROLE", help="reader, writer, shipper or admin; each may do what those before it may."),
    ],
    namespace: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="See and change only adapters NAME/…; may be repeated.")
    ] = None,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it is good: 12h, 30d, 8w, 1y.")] = "",
    json: Json = False,
) -> None:
    """Make a token, and show its text, this once."""
    if role not in set(Role):
        raise InvalidInput("role", role, f"one of {', '.join(Role)}")
    with connect() as registry:
        made = registry.create_token(name, Role(role), namespace or (), parse_span(expires) if expires else None)
    if json:
        output.print_json(_document(made))
        return
    output.print_line(made.secret)
    output.say("keep it: it is not shown again. `ckpt login URL` takes it, or CKPT_TOKEN")


@token_app.command("list")
def list_(json: Json = False) -> None:
    """Every token, never its text."""
    with connect() as registry:
        tokens = registry.tokens()
    if json:
        output.print_json(_document(tokens))
        return
    rows = [
        [str(token.id), token.name, token.role.value, ", ".join(token.namespaces) or "all", f"…{token.ending}",
         output.ago(token.created_at), _end(token), output.ago(token.last_used_at) if token.last_used_at else ""]
        for token in tokens
    ]  # fmt: skip
    output.print_table(
        ["id", "name", "role", "namespaces", "ends in", "made", "good until", "last used"], rows, right=["id"]
    )


@token_app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(metavar="NAME", help="A token's name, or its number.")]) -> None:
    """End a token: nothing is done with it from now on."""
    with connect() as registry:
        token = registry.revoke_token(name)
    output.print_line(f"token {token.name} is revoked")


def _end(token: Token) -> str:
    if token.revoked_at is not None:
        return f"revoked {output.ago(token.revoked_at)}"
    return output.when(token.expires_at) if token.expires_at else "it is revoked"


def _document(value: object) -> object:
    from registry.codec import plain  # noqa: PLC0415 - the table needs none of it

    found: object = plain(value)
    return found
