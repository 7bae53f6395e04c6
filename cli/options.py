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

# How several checkpoints are weighed together; `cli.parse.mixture` reads them.
Refs = Annotated[list[str] | None, typer.Argument(metavar="REF…", help="Checkpoints, in the order of --weights.")]
Method = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="linear, task_arithmetic, average, interpolate, ema, slerp, nuslerp, multislerp, karcher, model_stock, magnitude, ties, "
        "dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties or sce. Default: linear; with --t interpolate.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(metavar="W,W…", help="One for each checkpoint. Default: equal shares of 1 for linear, else 1 each."),
]
Between = Annotated[
    tuple[str, str] | None, typer.Option(metavar="REF REF", help="The same as naming the two; reads well with --t.")
]
T = Annotated[str, typer.Option("--t", metavar="T", help="Between two: 0 is the first, 1 the second.")]
Lambda = Annotated[str, typer.Option("--lambda", metavar="L", help="Scale of all that is added.")]
Density = Annotated[str, typer.Option(metavar="D", help="Share of the elements that are kept.")]
Epsilon = Annotated[str, typer.Option(metavar="E", help="della: how far the chance to be kept goes up and down.")]
Gamma = Annotated[str, typer.Option(metavar="G", help="breadcrumbs: share of the largest that are dropped.")]
Seed = Annotated[str, typer.Option(metavar="N", help="dare, della: of the random numbers.")]
