"""`ckpt serve-config`: how to start a serving engine with checkpoints of the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output
from cli.options import Json, flag
from registry import connect
from registry.errors import InvalidInput

if TYPE_CHECKING:
    from registry.serving import ServeConfig

serving_app = typer.Typer(no_args_is_help=True, help="Print how to start a serving engine with checkpoints.")

Refs = Annotated[
    list[str], typer.Argument(metavar="REF…", help="Checkpoints: name, name@v3, name@production, name@best:METRIC.")
]
Endpoint = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="The server (`ckpt serve`) that the engine reads from. Default: the one that is set, else copies on this machine.",
    ),
]
Merged = Annotated[
    bool, flag("--merged", "Serve one checkpoint merged into its base model; nothing is stored. Needs a server.")
]


@serving_app.command("vllm")
def vllm(refs: Refs, endpoint: Endpoint = "", merged: Merged = False, json: Json = False) -> None:
    """Print how to start vLLM, to be copied into a shell. What it cannot serve is refused with the reason.

    Every name has its version in it, and never means another one.

    ckpt serve-config vllm support-bot@production math@v3

    ckpt serve-config vllm support-bot@v12 --merged --endpoint http://registry:8000
    """
    _print("vllm", refs, endpoint, merged=merged, json=json)


@serving_app.command("sglang")
def sglang(refs: Refs, endpoint: Endpoint = "", merged: Merged = False, json: Json = False) -> None:
    """Print how to start SGLang, to be copied into a shell. What it cannot serve is refused with the reason."""
    _print("sglang", refs, endpoint, merged=merged, json=json)


def _print(engine: Any, refs: list[str], endpoint: str, *, merged: bool, json: bool) -> None:
    if merged and len(refs) > 1:
        raise InvalidInput("--merged", "", "an engine serves one merged model: ask for each of them by itself")
    found = _config(engine, refs, endpoint, merged=merged)
    if json:
        output.print_json(_as_json(found))
    else:
        output.print_line(found.text)
    for warning in found.warnings:
        output.say(f"[yellow]![/yellow] {output.plain(warning)}")


def _config(engine: Any, refs: list[str], endpoint: str, *, merged: bool) -> ServeConfig:
    from registry.serving import serve_merged, serve_unmerged  # noqa: PLC0415 - the help need not wait for it

    with connect() as registry, output.progress() as progress:
        server = endpoint or registry.settings.server
        found = [registry.resolve(ref) for ref in refs]
        if merged:
            return serve_merged(registry, engine, found[0], server)
        return serve_unmerged(registry, engine, found, server, progress)


def _as_json(found: ServeConfig) -> dict[str, Any]:
    return {
        "engine": found.engine,
        "way": found.way,
        "environment": dict(found.environment),
        "command": [word for line in found.lines for word in line],
        "served": [{"name": each.name, "checkpoint": each.checkpoint, "source": each.source} for each in found.served],
        "warnings": list(found.warnings),
    }
