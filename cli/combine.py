"""`ckpt combine`, `sweep`: new adapters made of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import output, parse, views
from cli.options import Between, Density, Epsilon, Gamma, Json, Lambda, Method, Note, Refs, Seed, T, Weights
from registry import connect
from registry.errors import InvalidInput

if TYPE_CHECKING:
    from registry.manifest import Checkpoint
    from registry.service import Registry

As = Annotated[str, typer.Option("--as", metavar="NAME", help="Name of the new adapter. Default: made of the inputs'.")]
Rank = Annotated[
    int | None,
    typer.Option(min=1, metavar="R", help="Cut to this rank; what that loses is told. Default: the ranks' sum, exact."),
]
Tag = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tag. May be repeated.")]


def combine(
    refs: Refs = None,
    method: Method = "",
    weights: Weights = "",
    between: Between = None,
    t: T = "",
    average: Annotated[
        str,
        typer.Option(
            metavar="last:N|all",
            help="The mean along the run of the one checkpoint named, up to it. With --ema: of these.",
        ),
    ] = "",
    ema: Annotated[
        str,
        typer.Option(metavar="DECAY", help="The moving average along that run, or over checkpoints from old to new."),
    ] = "",
    lambda_: Lambda = "",
    density: Density = "",
    epsilon: Epsilon = "",
    gamma: Gamma = "",
    seed: Seed = "",
    rank: Rank = None,
    name: As = "",
    note: Note = "",
    tag: Tag = None,
    json: Json = False,
) -> None:
    """Make a new LoRA adapter of several, and register it with what it was made of. It is served and loaded like any other.

    Methods as for merge; cat and svd are linear at the ranks' sum and cut to a rank. Those that change single elements (ties, dare…) take
    full rank: merge is exact, and here they need --rank.

    ckpt combine math code --weights 0.7,0.3 --as team/both

    ckpt combine support-bot@run:3 --average last:5 --rank 16

    ckpt combine --between math code --t 0.3 --method slerp
    """
    from registry.combining import Making  # noqa: PLC0415 - the help need not wait for it

    wanted = parse.mixture(
        method or ("ema" if ema else "average" if average else ""), weights, t=t, decay=ema, lambda_=lambda_, density=density,
        epsilon=epsilon, gamma=gamma, seed=seed,
    )  # fmt: skip
    making = Making(adapter=name, note=note, tags=parse.pairs(tag or (), "tag"))
    with connect() as registry, output.progress() as progress:
        named = [registry.resolve(ref) for ref in parse.inputs(refs, between)]
        inputs = _along(registry, named, average) if average or (ema and len(named) == 1) else named
        made = registry.combine(*inputs, mixture=wanted, rank=rank, making=making, progress=progress)
    if json:
        output.print_json(views.combination_json(made))
    else:
        views.print_combinations([made])


def _along(registry: Registry, named: list[Checkpoint], average: str) -> list[Checkpoint]:
    """The checkpoints of a run that `last:N` or `all` mean."""
    from registry.combining import last_of  # noqa: PLC0415 - as above

    if len(named) != 1:
        raise InvalidInput("--average", average, "goes along one run: name one checkpoint, such as bot@run:3")
    kind, colon, count = average.partition(":")
    if average not in ("", "all") and not (kind == "last" and colon and count.isdecimal()):
        raise InvalidInput("--average", average, "expected last:N or all")
    return last_of(registry.trail(named[0]), int(count) if colon else None)


def sweep(
    refs: Refs = None,
    method: Method = "",
    weights: Weights = "",
    between: Between = None,
    t: T = "",
    lambda_: Lambda = "",
    density: Density = "",
    epsilon: Epsilon = "",
    gamma: Gamma = "",
    seed: Seed = "",
    rank: Rank = None,
    name: As = "",
    note: Note = "",
    tag: Tag = None,
    json: Json = False,
) -> None:
    """Make one candidate for each value of an option, to be evaluated and ranked: versions of one new adapter, tagged with the value.

    Give the option a range, first:last:step, or values with commas between them. Nothing is merged: a candidate takes an adapter's room.

    ckpt sweep math code --t 0:1:0.1 --as both

    ckpt metric add both@v4 mt_bench_score=7.1 …

    ckpt list both --best mt_bench_score
    """
    from registry.combining import Making, grid  # noqa: PLC0415 - the help need not wait for it

    said = {"t": t, "lambda": lambda_, "density": density, "epsilon": epsilon, "gamma": gamma, "seed": seed}
    grids = {option: grid(text) for option, text in said.items() if ":" in text or "," in text}
    if len(grids) != 1:
        raise InvalidInput("sweep", ", ".join(grids), "give one option several values: --t 0:1:0.1")
    ((option, values),) = grids.items()
    wanted = parse.mixture(
        method, weights, **{key: str(values[0]) if key == option else text for key, text in said.items()}
    )
    making = Making(adapter=name, note=note, tags=parse.pairs(tag or (), "tag"))
    with connect() as registry, output.progress() as progress:
        inputs = [registry.resolve(ref) for ref in parse.inputs(refs, between)]
        made = registry.candidates(
            *inputs, mixture=wanted, option=option, values=values, rank=rank, making=making, progress=progress
        )
    if json:
        output.print_json([views.combination_json(each) for each in made])
    else:
        views.print_combinations(made)
