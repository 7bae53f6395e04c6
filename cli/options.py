"""Options and arguments that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def flag(name: str, help: str, *more: str, **settings: Any) -> Any:
    """A switch. Typer would show `<bool>` behind it, as if it took a value."""
    return typer.Option(name, *more, help=help, metavar="", **settings)


Json = Annotated[bool, flag("--json", "Print JSON for programs.")]
Ref = Annotated[
    str, typer.Argument(metavar="REF", help="A checkpoint: name, name@v3, name@alias, name@best:METRIC, or a digest.")
]
Subject = Annotated[str, typer.Argument(metavar="REF", help="A checkpoint, or a merged model by its digest.")]
BaseName = Annotated[str, typer.Argument(metavar="NAME", help="Name, or 6 and more digits of the digest.")]
Note = Annotated[str, typer.Option(metavar="TEXT", help="A note, kept with the record.")]
ArchVersion = Annotated[str, typer.Option(metavar="V", help="Your own label for the model's architecture.")]
Lower = Annotated[bool, flag("--min", "Lower is better.")]
Higher = Annotated[bool, flag("--max", "Higher is better.")]
